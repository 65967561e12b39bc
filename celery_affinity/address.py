"""Where the ledger's Redis is: one URL that says all of it, and how it is read and shown.

kombu spells a Redis broker in three places: its URL, ``broker_use_ssl`` and
``broker_transport_options``. The ledger's URL has all of that in its query, so that it alone is
handed to threads and processes:

- ``redis://``, ``rediss://``, ``unix://``; ``redis+socket://`` as kombu spells a socket;
- ``sentinel://host:port;sentinel://host:port/0?master_name=mymaster``. With ``ssl_`` options the
  Redis servers are spoken to by TLS; ``sentinel_<name>`` is an option of the connections to the
  sentinels themselves;
- ``redis+cluster://host:port;redis+cluster://host2:port2``, ``rediss+cluster://``: nodes of a Redis
  Cluster, of which one has to answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from ssl import TLSVersion
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from celery_affinity.exceptions import ConfigurationError

__all__ = ("CLUSTERS", "Address", "ledger_url", "masked", "same_server")

SENTINEL = "sentinel"
SENTINEL_PORT = 26379
CLUSTERS = ("redis+cluster", "rediss+cluster")
SCHEMES = ("redis", "rediss", "unix", "redis+socket", SENTINEL, *CLUSTERS)

#: What stands before the last "@" of a host, or is the value of an option that is a secret.
_SECRETS = re.compile(r"(//[^@/;?]*:)[^;]*(?=@)|([?&](?:\w+_)?password=)[^&]*")


@dataclass(frozen=True)
class Address:
    """A ledger's URL, taken apart.

    Arguments:
        hosts: Host and port; several for sentinels and nodes of a cluster, none for a socket.
        path: A socket's.
        options: The query, as it is written.
    """

    scheme: str
    hosts: tuple[tuple[str, int], ...]
    path: str
    db: int
    username: str | None
    password: str | None
    options: Mapping[str, str]

    @classmethod
    def parse(cls, url: str) -> Address:
        """Take a URL apart.

        Raises:
            ConfigurationError: If that is not possible. It does not show the URL: what cannot be
                taken apart may have its password anywhere.
        """
        text, _, query = url.partition("?")
        try:
            found = [urlsplit(one) for one in text.split(";")]
            ports = [one.port for one in found]
            paths = {one.path.strip("/") for one in found} - {""}
            options = dict(parse_qsl(query))
            first = found[0]
            scheme = first.scheme
            if any(one.scheme != scheme for one in found) or len(paths) > 1:
                raise ValueError
            local = scheme in ("unix", "redis+socket")
            number = options.pop("virtual_host", options.pop("db", ""))
            if not local:
                number = number or next(iter(paths), "")
            db = int(number.strip("/") or 0)
        except ValueError:
            raise ConfigurationError(_unreadable()) from None
        if scheme not in SCHEMES:
            raise ConfigurationError(
                f"the ledger's Redis has a URL that begins with {scheme + '://'!r}, expected one "
                f"of {', '.join(known + '://' for known in SCHEMES)}"
            )
        if scheme in CLUSTERS and db:
            raise ConfigurationError(
                f"redis_url names the database {db}, and a Redis Cluster has none but 0"
            )
        port = SENTINEL_PORT if scheme == SENTINEL else 6379
        hosts = [
            (unquote(one.hostname or "localhost"), known or port)
            for one, known in zip(found, ports, strict=True)
        ]
        return cls(
            scheme="unix" if local else scheme,
            hosts=() if local else tuple(hosts),
            path=unquote(first.path) if local else "",
            db=db,
            username=unquote(first.username) if first.username else None,
            password=unquote(first.password) if first.password else None,
            options=options,
        )

    @property
    def tls_options(self) -> dict[str, Any]:
        """Options whose names begin with ``ssl_``, as redis-py takes them."""
        found: dict[str, Any] = {
            name: value for name, value in self.options.items() if name.startswith("ssl_")
        }
        if requirement := found.get("ssl_cert_reqs"):
            found["ssl_cert_reqs"] = requirement.removeprefix("CERT_").lower()
        if "ssl_check_hostname" in found:
            found["ssl_check_hostname"] = found["ssl_check_hostname"].lower() not in ("false", "0")
        if version := found.get("ssl_min_version"):
            found["ssl_min_version"] = TLSVersion[version]
        return found

    @property
    def is_tls(self) -> bool:
        """Whether TLS is spoken to Redis itself."""
        by_options = self.scheme in (SENTINEL, "redis+cluster") and bool(self.tls_options)
        return self.scheme.startswith("rediss") or by_options

    @property
    def is_cluster(self) -> bool:
        """Whether the hosts are nodes of a Redis Cluster."""
        return self.scheme in CLUSTERS

    @property
    def other_options(self) -> dict[str, str]:
        """Options that are for redis-py as they are, such as ``protocol``."""
        ours = ("ssl_", f"{SENTINEL}_", "master_name")
        return {name: value for name, value in self.options.items() if not name.startswith(ours)}

    @property
    def sentinel_options(self) -> dict[str, str]:
        """Options of the connections to the sentinels."""
        start = SENTINEL + "_"
        return {
            name.removeprefix(start): value
            for name, value in self.options.items()
            if name.startswith(start)
        }

    @property
    def master_name(self) -> str:
        """What the sentinels call the master.

        Raises:
            ConfigurationError: If nobody said so.
        """
        if name := self.options.get("master_name"):
            return name
        raise ConfigurationError(
            "the ledger is found by Sentinel, but master_name is not known: set "
            'broker_transport_options = {"master_name": "mymaster"}, or end redis_url with '
            "?master_name=mymaster"
        )


def _unreadable() -> str:
    return (
        "the URL of the ledger's Redis cannot be taken apart (redis_url, else broker_url). "
        "Expected redis://[user:password@]host:port/db, and percent-encoding of what is special in "
        "a password (urllib.parse.quote(password, safe='')); of several sentinels or nodes of a "
        "cluster each with its own scheme, separated by ';', all of one database: "
        "sentinel://host:port;sentinel://host2:port/db, "
        "redis+cluster://host:port;redis+cluster://host2:port"
    )


def ledger_url(
    url: str, use_ssl: Any = None, transport_options: Mapping[str, Any] | None = None
) -> str:
    """The one URL of what kombu is told in three places.

    Arguments:
        url: The broker's, or the ledger's own.
        use_ssl: ``broker_use_ssl``; only a dict has a meaning for Redis.
        transport_options: ``broker_transport_options``.
    """
    address = Address.parse(url)
    more: dict[str, str] = {}
    if isinstance(use_ssl, Mapping):
        more.update((name, _written(name, value)) for name, value in use_ssl.items())
        if address.scheme == "redis":
            url = "rediss" + url.removeprefix("redis")
    if address.scheme == SENTINEL:
        options = transport_options or {}
        if name := options.get("master_name"):
            more["master_name"] = str(name)
        for key, value in (options.get("sentinel_kwargs") or {}).items():
            more[f"{SENTINEL}_{key}"] = _written(f"sentinel_kwargs {key}", value)
    more = {name: value for name, value in more.items() if name not in address.options}
    return f"{url}{'&' if '?' in url else '?'}{urlencode(more)}" if more else url


def _written(name: str, value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.name)
    if isinstance(value, str | int | float):
        return str(value)
    raise ConfigurationError(
        f"{name} is a {type(value).__name__}, which the ledger's connections cannot be given; "
        "expected text or a number, such as the path of a file"
    )


def masked(url: str) -> str:
    """The URL without its passwords, for people."""
    return _SECRETS.sub(lambda match: f"{match[1] or match[2]}**", url)


def same_server(one: str, other: str) -> bool:
    """Whether two URLs name one database of one server, as far as their text tells."""

    def identity(url: str) -> object:
        found = Address.parse(url)
        hosts = {({"localhost": "127.0.0.1"}.get(host, host), port) for host, port in found.hosts}
        named = found.options.get("master_name")
        return hosts, found.path, found.db, named, found.is_cluster

    return identity(one) == identity(other)
