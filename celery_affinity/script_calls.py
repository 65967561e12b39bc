"""How the ledger's scripts are called: loaded, over which connection, while memory is full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis import Redis
from redis.commands.core import Script
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError

from celery_affinity.exceptions import SchemaVersionError
from celery_affinity.keys import Keys
from celery_affinity.lua_text import LET_THROUGH, source, source_although_full

__all__ = ("SCHEMA_VERSION", "ScriptCalls", "text_of")

#: Version of the layout of the ledger. Nodes of another version refuse to touch it.
SCHEMA_VERSION = "2"


def text_of(value: Any) -> str:
    """An answer's text."""
    return value.decode() if isinstance(value, bytes) else str(value)


class ScriptCalls:
    """How a script of the ledger is called, for one namespace.

    Arguments:
        client: The ledger's Redis.
        single_threaded: Whether one thread makes all calls. They then go over one connection of
            their own, which halves the client's CPU time for a call (39 instead of 78 us,
            measured with redis-py 8.1.0; a pool process makes two for each task).
    """

    def __init__(self, client: Redis, keys: Keys, *, single_threaded: bool = False) -> None:
        self.client = client
        self.keys = keys
        self._scripts: dict[str, Script] = {}
        self._single_threaded = single_threaded
        self._connection: Any = None

    def _call(self, name: str, *args: object, lists: Sequence[str] = ()) -> Any:
        try:
            return self._run(name, source(name), args, lists)
        except OutOfMemoryError:
            if name not in LET_THROUGH:
                raise
        return self._run_although_full(name, args, lists)

    def _run_although_full(self, name: str, args: Sequence[object], lists: Sequence[str]) -> Any:
        return self._run(f"{name} although full", source_although_full(name), args, lists)

    def _run(self, name: str, text: str, args: Sequence[object], lists: Sequence[str]) -> Any:
        try:
            return self._evaluate(name, text, args, lists)
        except ResponseError as error:
            # What a command inside a script meets is an error of another kind on Redis 6.2.
            if " -OOM " in str(error):
                raise OutOfMemoryError(str(error)) from None
            raise

    def _evaluate(self, name: str, text: str, args: Sequence[object], lists: Sequence[str]) -> Any:
        script = self._scripts.get(name)
        if script is None:
            script = self._scripts[name] = self.client.register_script(text)
        if self._single_threaded and not lists:
            try:
                return self._call_directly(script, args)
            except OutOfMemoryError:
                raise
            except RedisError:
                # Not loaded, or the connection is gone: the pooled call below loads and retries.
                # The scripts answer a repeat as they did the first time.
                pass
        return script(keys=[self.keys.prefix, *lists], args=list(args))  # type: ignore[arg-type]

    def _call_directly(self, script: Script, args: Sequence[object]) -> Any:
        if self._connection is None:
            self._connection = self.client.connection_pool.get_connection()
        try:
            self._connection.send_command("EVALSHA", script.sha, 1, self.keys.prefix, *args)
            return self._connection.read_response()
        except BaseException:
            # A time limit can strike between the two: the next call must not read this reply.
            self._hang_up()
            raise

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.disconnect()
            self.client.connection_pool.release(self._connection)
            self._connection = None

    def _check_schema(self, answer: list[Any]) -> None:
        if answer[0] == -5:
            raise SchemaVersionError(text_of(answer[1]), SCHEMA_VERSION)
