"""The demo, on a few files of each distribution: it runs through, and it can be stopped."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from harness import wait_until
from pools import long

pytestmark = pytest.mark.acceptance

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def demo(
    tmp_path: Path, server_binary: Path, request: pytest.FixtureRequest
) -> Iterator[subprocess.Popen[str]]:
    """A running demo of so many files a distribution, as a shell would start it."""
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "demo.run"],
            cwd=ROOT,
            env={
                **os.environ,
                "FILES": request.param,
                "DEMO_VAR": str(tmp_path / "var"),
                "COLUMNS": "200",
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    family = psutil.Process(process.pid)
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in [*family.children(recursive=True), family]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        process.wait()


def output(tmp_path: Path) -> str:
    return (tmp_path / "output").read_text()


@long
@pytest.mark.parametrize("demo", ["5"], indirect=True)
def test_every_digest_is_that_of_one_process_alone(
    demo: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert demo.wait(100) == 0, output(tmp_path)
    found = re.search(r"digests equal to one process\D+(\d+)/(\d+)", output(tmp_path))
    assert found, output(tmp_path)
    assert found[1] == found[2]


@pytest.mark.parametrize("demo", ["20"], indirect=True)
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=long), signal.SIGKILL])
def test_a_stopped_demo_leaves_no_process_behind(
    demo: subprocess.Popen[str], tmp_path: Path, number: signal.Signals
) -> None:
    wait_until(lambda: "files, " in output(tmp_path), 60, "the first tasks")
    family = psutil.Process(demo.pid).children(recursive=True)
    # A server, two workers with two processes each, and the beat service.
    assert len(family) >= 8
    demo.send_signal(number)
    demo.wait(15)
    _, alive = psutil.wait_procs(family, timeout=5)
    assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []
    assert "Traceback" not in output(tmp_path)
