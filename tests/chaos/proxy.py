"""A TCP proxy between workers and Redis, whose faults are named verbs."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any, Literal

Mode = Literal["pass", "blackhole", "drop_replies"]
_RST = struct.pack("ii", 1, 0)


class Proxy:
    """Forwards connections to a port of 127.0.0.1, until a verb says otherwise.

    A connection that has lost bytes is useless: what heals it resets it, as the kernels at both
    ends would.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        #: Bytes that were swallowed since the last `heal`, by direction.
        self.swallowed = {"requests": 0, "replies": 0}
        self._mode: Mode = "pass"
        self._delay = 0.0
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(10)

    def url(self, db: int = 0) -> str:
        """The broker's URL through this proxy."""
        return f"redis://127.0.0.1:{self.port}/{db}"

    def blackhole(self) -> None:
        """Swallow all bytes, keep all connections: a half-open TCP."""
        self._do(lambda: self._set("blackhole"))

    def drop_replies(self) -> None:
        """Requests pass, replies do not."""
        self._do(lambda: self._set("drop_replies"))

    def delay(self, seconds: float) -> None:
        """Hold each piece for so long, in both directions; 0 ends it."""
        self._do(lambda: setattr(self, "_delay", seconds))

    def reset(self) -> None:
        """RST to all connections, at both ends."""
        self._do(self._reset_all)

    def heal(self) -> None:
        """Pass again what comes; connections that lost bytes are reset."""

        def heal() -> None:
            if self._mode != "pass":
                self._reset_all()
            self._delay = 0.0
            self._set("pass")

        self._do(heal)

    def close(self) -> None:
        """Close all."""
        with contextlib.suppress(RuntimeError):
            self._do(self._reset_all)
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def _set(self, mode: Mode) -> None:
        self._mode = mode
        self.swallowed = {"requests": 0, "replies": 0}

    def _do(self, verb: Callable[[], Any]) -> None:
        done = threading.Event()

        def call() -> None:
            verb()
            done.set()

        self._loop.call_soon_threadsafe(call)
        assert done.wait(10)

    def _reset_all(self) -> None:
        for writer in list(self._writers):
            sock = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
            writer.transport.abort()
        self._writers.clear()

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        self._loop.run_forever()
        server.close()
        pumps = asyncio.all_tasks(self._loop)
        for pump in pumps:
            pump.cancel()
        self._loop.run_until_complete(asyncio.gather(*pumps, return_exceptions=True))
        self._loop.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, up_writer}
        try:
            await asyncio.gather(
                self._pump(reader, up_writer, "requests"), self._pump(up_reader, writer, "replies")
            )
        finally:
            self._writers -= {writer, up_writer}
            for each in (writer, up_writer):
                each.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, what: str
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if self._delay:
                    await asyncio.sleep(self._delay)
                if self._mode == "blackhole" or (self._mode == "drop_replies" and what == "replies"):
                    self.swallowed[what] += len(data)
                    continue
                writer.write(data)
                await writer.drain()
        while self._mode == "blackhole":  # the other end does not learn that this one has gone
            await asyncio.sleep(0.05)
        writer.transport.abort()
