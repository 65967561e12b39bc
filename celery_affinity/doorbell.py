"""Waiting for an arrival in any of several lists, without taking anything out of them.

``BLMOVE key key RIGHT RIGHT`` blocks while a list is empty and, once it is not, moves its last
element onto itself. One connection waits for each list.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from redis import Redis
from redis.exceptions import RedisError, ResponseError

from celery_affinity.readable import wait_readable

__all__ = ("Doorbell",)

#: Seconds to wait where the server refuses to wait for us: its memory is full, or its disk.
REFUSED_SECONDS = 0.25


class Doorbell:
    """Wakes on the first arrival in its lists, or when `ring` is called from another thread.

    Does not: say which message arrived, or keep it from anyone.
    """

    def __init__(self, client: Redis, lists: Sequence[str]) -> None:
        self._pool = client.connection_pool
        self._lists = list(lists)
        self._armed: dict[str, Any] = {}
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)

    def ring(self) -> None:
        """Wake the waiting thread. Safe from any thread and from signal handlers."""
        try:
            os.write(self._writer, b"!")
        except (BlockingIOError, OSError):
            pass  # it is awake already, or gone

    def wait(self, seconds: float) -> bool:
        """Block until an arrival, a `ring`, or the time is over; False if it is over.

        Raises:
            redis.RedisError: If the server cannot be reached; call again to reconnect.
        """
        try:
            for key in self._lists:
                if key not in self._armed:
                    self._arm(key)
            sockets = {conn._sock: key for key, conn in self._armed.items()}
            ready = wait_readable([*sockets, self._reader], seconds)
            for one in ready:
                if one == self._reader:
                    os.read(self._reader, 4096)
                elif not self._answer(sockets[one]):
                    wait_readable([self._reader], min(seconds, REFUSED_SECONDS))
            return bool(ready)
        except Exception:
            self._hang_up()
            raise

    def close(self) -> None:
        """Give up the connections."""
        self._hang_up()
        for end in (self._reader, self._writer):
            os.close(end)

    def _arm(self, key: str) -> None:
        connection: Any = self._pool.get_connection()
        self._armed[key] = connection
        # Bounded on the server, so that a connection whose client vanished frees itself.
        connection.send_command("BLMOVE", key, key, "RIGHT", "RIGHT", 60)

    def _answer(self, key: str) -> bool:
        """Take what a connection has to say; False if it is that the server refuses."""
        connection = self._armed.pop(key)
        try:
            connection.read_response()
        except ResponseError:
            connection.disconnect()
            return False
        except RedisError:
            # Of an earlier server, maybe: the caller's next command tells whether this one answers.
            connection.disconnect()
        except Exception:
            connection.disconnect()
            raise
        finally:
            self._pool.release(connection)
        return True

    def _hang_up(self) -> None:
        while self._armed:
            _, connection = self._armed.popitem()
            connection.disconnect()
            self._pool.release(connection)
