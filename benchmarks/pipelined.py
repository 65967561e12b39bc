"""A scripted worker of many slots that starts and settles what it got in one round trip.

    python -m benchmarks.pipelined <port> <name> <slots>

Speaks Redis' protocol itself, so that the client's CPU time does not hide the server's.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from redis import Redis

from benchmarks.scripted import STAMP, ScriptedLedger
from celery_affinity.keys import Keys
from celery_affinity.lua_text import source
from celery_affinity.scripts import Scripts

__all__ = ("Pipeline", "Recorder")

#: Seconds without any message after which a worker ends.
_IDLE_SECONDS = 3.0


class Pipeline:
    """One connection; commands are sent together, and their replies read in order."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._replies = self._socket.makefile("rb", 1 << 16)

    def send(self, commands: list[bytes]) -> None:
        """Send encoded commands."""
        self._socket.sendall(b"".join(commands))

    def reply(self) -> Any:
        """The next reply: int, bytes, None or a list."""
        line = self._replies.readline()
        kind, rest = line[:1], line[1:-2]
        if kind == b":":
            return int(rest)
        if kind == b"$":
            size = int(rest)
            return None if size < 0 else self._replies.read(size + 2)[:-2]
        if kind == b"*":
            size = int(rest)
            return None if size < 0 else [self.reply() for _ in range(size)]
        if kind == b"+":
            return rest
        raise RuntimeError(line.decode(errors="replace") or "the server hung up")


def encoded(*parts: bytes) -> bytes:
    """A command as Redis reads it."""
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(p), p) for p in parts)


class Recorder(Scripts):
    """Encodes the calls of scripts, for many to be sent at once."""

    def __init__(self, pipeline: Pipeline, keys: Keys) -> None:
        super().__init__(Redis(), keys)  # which never connects
        self._pipeline = pipeline
        self._shas: dict[str, bytes] = {}
        self.commands: list[bytes] = []

    def _call(self, name: str, *args: object, lists: Sequence[str] = ()) -> Any:
        if name not in self._shas:
            self._pipeline.send([encoded(b"SCRIPT", b"LOAD", source(name).encode())])
            self._shas[name] = self._pipeline.reply()
        # What is not text is a number.
        texts = [one if isinstance(one, bytes) else str(one).encode() for one in args]
        prefix = self.keys.prefix.encode()
        self.commands.append(encoded(b"EVALSHA", self._shas[name], b"1", prefix, *texts))
        return 0

    def flush(self) -> list[Any]:
        """Send what was called; its answers."""
        calls = len(self.commands)
        self._pipeline.send(self.commands)
        self.commands.clear()
        return [self._pipeline.reply() for _ in range(calls)]


def work(pipeline: Pipeline, keys: Keys, messages: bytes, at_once: int) -> int:
    """Run what is dispatched until nothing comes; how many tasks."""
    scripts = Recorder(pipeline, keys)
    take = encoded(b"RPOP", messages, str(at_once).encode())
    done, last = 0, time.monotonic()
    batch: list[bytes] = []
    while batch or time.monotonic() - last < _IDLE_SECONDS:
        _start_and_settle(scripts, batch, done)
        done += len(batch)
        asked = len(scripts.commands)
        pipeline.send([*scripts.commands, take])
        scripts.commands.clear()
        for _ in range(asked):
            # start: 1; settle: how the lease goes on, or why not.
            answer = pipeline.reply()
            if answer == b"stale" or (isinstance(answer, int) and answer != 1):
                raise RuntimeError(f"a script answered {answer!r}")
        batch = pipeline.reply() or []
        if batch:
            last = time.monotonic()
        else:
            time.sleep(0.0005)
    return done


def _start_and_settle(scripts: Any, batch: list[bytes], done: int) -> None:
    """Call for each message what a pool process calls.

    The second message of a lease is started by the settle of the first.
    """
    marks = []
    latest: dict[tuple[bytes, bytes], int] = {}
    following: dict[int, int] = {}
    for k, raw in enumerate(batch):
        found = STAMP.search(raw)
        assert found is not None
        entry, epoch, send, incarnation, slot = found.groups()
        marks.append((incarnation, slot, entry, epoch, send))
        if (slot, epoch) in latest:
            following[latest[slot, epoch]] = k
        latest[slot, epoch] = k
    granted = set(following.values())
    tokens = [f"41210:4711:0a1b2c3d:{done + k}" + "?" * (k in granted) for k in range(len(batch))]
    for k, (*where, send) in enumerate(marks):
        if k not in granted:
            scripts.start(*where, send, tokens[k], 1000)
        grant = tokens[following[k]] if k in following else ""
        scripts.settle(*where, tokens[k], "done", grant=grant, least_ms=1000)


def main() -> None:
    """Register, work, print how many tasks it ran."""
    port, name, slots = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    ledger = ScriptedLedger(Redis(port=port))
    messages = ledger.node(name, slots)
    pipeline = Pipeline(port)
    print(work(pipeline, ledger.scripts.keys, messages.encode(), 2 * slots))


if __name__ == "__main__":
    main()
