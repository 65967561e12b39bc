"""The ledger's transitions: one typed method for each Lua script (lua_text.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from redis import Redis
from redis.commands.core import Script
from redis.exceptions import OutOfMemoryError, RedisError

from celery_affinity.broker import Taken
from celery_affinity.exceptions import SchemaVersionError
from celery_affinity.keys import Keys
from celery_affinity.lua_text import LET_THROUGH, source, source_although_full

__all__ = ("SCHEMA_VERSION", "Scripts")

#: Version of the layout of the ledger. Nodes of another version refuse to touch it.
SCHEMA_VERSION = "2"


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _lines(queues: Sequence[tuple[str, int, str]]) -> str:
    return "\n".join(f"{state}\t{limit}\t{listkey}" for state, limit, listkey in queues)


class Scripts:
    """Calls of the ledger's scripts for one namespace.

    Arguments:
        client: The ledger's Redis.
        single_threaded: Whether one thread makes all calls. They then go over one connection of
            their own, which halves the client's CPU time for a call (39 instead of 78 us,
            measured with redis-py 8.1.0; a pool process makes two for each task).

    Does not: decide anything; what a script answers is handed on as it is.
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
            raise SchemaVersionError(_text(answer[1]), SCHEMA_VERSION)

    # Leadership

    def claim(self, state: str, candidate: str, ttl_ms: int) -> tuple[str | None, int]:
        """Returns (term, 0) if elected, else (None, ms until the present term can end)."""
        answer = self._call("claim", state, candidate, ttl_ms, SCHEMA_VERSION)
        self._check_schema(answer)
        return (_text(answer[1]), 0) if answer[0] == 1 else (None, int(answer[1]))

    def renew(self, state: str, fence: str, ttl_ms: int) -> bool:
        """Prolong the term; False if it is over."""
        return bool(self._call("renew", state, fence, ttl_ms))

    def resign(self, state: str, fence: str) -> bool:
        """End the term at once; False if it was over."""
        return bool(self._call("resign", state, fence))

    def configure(
        self, state: str, fence: str, limits: Mapping[str, int], own: Mapping[str, int]
    ) -> int:
        """Write the queue's limits (names: conf in base.lua) and tags' own concurrencies."""
        pairs = [part for item in (*limits.items(), *own.items()) for part in item]
        return int(self._call("configure", state, fence, len(limits), *pairs))

    # What the leader does

    def admit(
        self,
        state: str,
        fence: str,
        lists: Sequence[str],
        limit: int,
        *,
        although_full: bool = False,
    ) -> tuple[int, bool, int, bytes]:
        """Returns (admitted, more, 1-based list to resolve or 0, its oldest message).

        Admitted is -1 if not the leader, -2 if the queue is evacuated.

        Raises:
            redis.exceptions.OutOfMemoryError: If Redis' memory is full; see `idle_slots`.
        """
        args = (state, fence, limit)
        answer = (
            self._run_although_full("admit", args, lists)
            if although_full
            else self._call("admit", *args, lists=lists)
        )
        if answer[0] < 0:
            return int(answer[0]), False, 0, b""
        stop = int(answer[2])
        return int(answer[0]), bool(answer[1]), stop - 1 if stop else 0, answer[3]

    def carry(
        self,
        state: str,
        token: str,
        fence: str,
        taken: Sequence[Taken],
        kept_ms: int,
        most: int,
    ) -> tuple[int, int]:
        """Returns (carried, length of the inbox); carried is -1 if not the leader, -2 if the
        queue is evacuated; see carry.lua.
        """
        words = [
            word for one in taken for word in (one.identity, "again" if one.again else "", one.raw)
        ]
        answer = self._call("carry", state, token, fence, kept_ms, most, *words)
        return int(answer[0]), int(answer[1]) if len(answer) > 1 else 0

    def inbox_length(self, state: str) -> int:
        """Messages that were carried and wait for intake. Reads only."""
        return int(self.client.llen(self.keys.inbox(state)))

    def is_evacuated(self, state: str) -> bool:
        """Whether the queue is stopped. Reads only."""
        return bool(self.client.hexists(self.keys.queue(state, "conf"), "evac"))

    def note_abroad(self, incarnation: str, queues: Mapping[str, str]) -> None:
        """Note what a node consumes on another broker: state name -> worker queue."""
        for state, name in queues.items():
            self.client.hset(self.keys.abroad(state), name, incarnation)

    def forget_abroad(self, state: str, names: Sequence[str]) -> None:
        """These worker queues are deleted."""
        self.client.hdel(self.keys.abroad(state), *names)

    def queues_abroad_of_the_lost(self, state: str) -> list[str]:
        """Worker queues whose node is not registered (any more). Reads only."""
        found: Any = self.client.hgetall(self.keys.abroad(state))
        return [
            _text(name)
            for name, incarnation in found.items()
            if self.client.zscore(self.keys.workers, incarnation) is None
        ]

    def idle_slots(self, state: str) -> int:
        """Free slots that no ready tag waits for. Reads only."""
        key = self.keys.queue
        ready: Any = self.client.zcard(key(state, "ring"))
        free: Any = self.client.zcard(key(state, "idle"))
        return 0 if ready else int(free)

    def resolve(
        self, state: str, fence: str, pending: str, raw: bytes, verdict: Sequence[object]
    ) -> int:
        """Admit or bury the message that `admit` stopped at; -1 not leader, 0 it is gone."""
        return int(self._call("resolve", state, fence, raw, *verdict, lists=[pending]))

    def promote(self, state: str, fence: str, limit: int) -> tuple[int, int, int]:
        """Returns (promoted or -1, ms until there is more to do or -1, untold burials)."""
        answer = self._call("promote", state, fence, limit)
        return (-1, -1, 0) if answer[0] == -1 else tuple(map(int, answer))  # type: ignore[return-value]

    def untold(self, state: str, limit: int) -> list[tuple[int, str, bytes]]:
        """Buried entries whose callers do not know yet, with reason and message. Reads only."""
        found: Any = self.client.lrange(self.keys.queue(state, "untold"), 0, limit - 1)
        answer = []
        for entry in found:
            meta: Any = self.client.hget(self.keys.queue(state, "dead"), entry)
            raw: Any = self.client.hget(self.keys.queue(state, "deadm"), entry)
            reason = (
                json.loads(meta.decode("utf-8", "replace"))["reason"]
                if meta
                else "taken out of the dead letters"
            )
            answer.append((int(entry), str(reason), raw or b""))
        return answer

    def told(
        self, state: str, fence: str, entries: Sequence[int], failed: int | None = None
    ) -> int:
        """Note that callers know of these burials; -1 if not the leader."""
        postponed = "" if failed is None else failed
        return int(self._call("told", state, fence, postponed, *entries))

    def requeue(
        self, state: str, token: str, entries: Sequence[int], kept: Sequence[object] = ("", "", "")
    ) -> tuple[int, list[int]]:
        """Requeue dead letters; see requeue.lua. Returns (how many, entries to be judged).

        Arguments:
            kept: For a single entry: the message to admit in its place, its tag, its due time.
        """
        done, *unread = self._call("requeue", state, token, *kept, *entries)
        return int(done), [int(entry) for entry in unread]

    def purge(self, state: str, token: str, entries: Sequence[int]) -> int:
        """Delete dead letters whose callers know; returns how many."""
        return int(self._call("purge", state, token, *entries)[0])

    def resume_tag(self, state: str, tag: str) -> bool:
        """Let a halted tag go on; False if it was not halted (any more)."""
        return bool(self._call("resume_tag", state, tag))

    def buried_message(self, state: str, entry: int) -> bytes | None:
        """A dead letter's message, or None. Reads only."""
        found: Any = self.client.hget(self.keys.queue(state, "deadm"), str(entry))
        return found if found is None else bytes(found)

    def last_entry(self, state: str) -> int:
        """The highest entry that was ever admitted. Reads only."""
        found: Any = self.client.hget(self.keys.queue(state, "c"), "seq")
        return int(found or 0)

    def revoke(self, states: Sequence[str], ids: Sequence[str]) -> int:
        """Note tasks that must not run; see revoke.lua."""
        return int(self._call("revoke", len(states), *states, *ids))

    def evacuate(
        self, state: str, pending: str, entries: Sequence[int]
    ) -> tuple[int, int, int, bool]:
        """Returns (slots that hold a tag, entries left, moved, done); see evacuate.lua."""
        held, left, moved, done = self._call("evacuate", state, *entries, lists=[pending])
        return int(held), int(left), int(moved), bool(done)

    def resume(self, state: str) -> bool:
        """End an evacuation; False if it has to be finished first."""
        return bool(self._call("resume", state))

    def rescue(
        self, state: str, fence: str, budget: int, looked: tuple[int, int] | None = None
    ) -> list[Any]:
        """See rescue.lua."""
        answer: list[Any] = self._call("rescue", state, fence, budget, *(looked or ()))
        return answer

    def rebase(self, state: str, fence: str, credit_ms: int | None = None) -> bool:
        """Count every worker's heartbeat as new, or as so much newer; False if not the leader."""
        credit = () if credit_ms is None else (credit_ms,)
        cursor = 0
        while True:
            answer = self._call("rebase", state, fence, cursor, *credit)
            if answer[0] == -1:
                return False
            cursor = int(answer[1])
            if cursor == 0:
                return True

    # What the elected beat does

    def claim_run(self, state: str, fence: str, name: str, known: str, new: str, how: str) -> int:
        """1 recorded, 0 the record is another one, -1 not elected; see claim_run.lua."""
        return int(self._call("claim_run", state, fence, name, known, new, how))

    def confirm_run(self, state: str, name: str, due: int) -> bool:
        """The claimed run was published; see confirm_run.lua."""
        return bool(self._call("confirm_run", state, name, due))

    def forget_runs(self, state: str, fence: str, records: Sequence[tuple[str, str]]) -> int:
        """Drop records; returns how many, -1 if not elected."""
        pairs = [part for record in records for part in record]
        return int(self._call("forget_runs", state, fence, *pairs))

    # What a node does

    def register(
        self,
        incarnation: str,
        *,
        name: str,
        depth: int,
        slots: int,
        queues: Sequence[tuple[str, int, str]],
        junk: Sequence[str],
        role: str,
        timeout_ms: int,
        busy: Sequence[int] = (),
        change: int = 0,
    ) -> int:
        """Announce an incarnation and offer its slots; the number of the change in force."""
        answer = self._call(
            "register",
            incarnation,
            name,
            depth,
            slots,
            _lines(queues),
            "\n".join(junk),
            role,
            timeout_ms,
            "\n".join(str(i) for i in busy),
            SCHEMA_VERSION,
            change,
        )
        self._check_schema(answer)
        return int(answer[1])

    def serve(
        self,
        incarnation: str,
        change: int,
        *,
        slots: int,
        queues: Sequence[tuple[str, int, str]],
        junk: Sequence[str],
        budget: int = 100,
    ) -> int | None:
        """Change the queues and slots of a registered node.

        Returns the entries given back; None if it is not registered, or a later change is in force.
        """
        back = 0
        while True:
            code, done, more = self._call(
                "serve", incarnation, change, slots, _lines(queues), "\n".join(junk), budget
            )
            if code != 1:
                return None
            back += int(done)
            if not more:
                return back

    def heartbeat(
        self, incarnation: str, beat: str, grace_ms: int, held: Sequence[str]
    ) -> tuple[bool, int, int, int]:
        """Returns (registered, messages sent again, entries taken back, last change in force)."""
        registered, *counts = self._call("heartbeat", incarnation, beat, grace_ms, *held)
        again, back, change = map(int, counts or (0, 0, 0))
        return bool(registered), again, back, change

    def drain(self, incarnation: str, budget: int = 100) -> int:
        """Take no more, give back what has not started; returns how many entries."""
        return self._until_done("drain", incarnation, budget)

    def leave(self, incarnation: str, budget: int = 100) -> int:
        """Take a stopped node out of the ledger; returns entries given back."""
        return self._until_done("leave", incarnation, budget)

    def _until_done(self, name: str, incarnation: str, budget: int) -> int:
        back = 0
        while True:
            done, more = self._call(name, incarnation, budget)
            back += int(done)
            if not more:
                return back

    # What happens to a dispatched message

    def start(
        self,
        incarnation: str,
        slot: int,
        entry: str,
        epoch: str,
        send: str,
        token: str,
        least_ms: int,
    ) -> int:
        """1 to run it; negative to refuse this copy; see start.lua."""
        return int(self._call("start", incarnation, slot, entry, epoch, send, token, least_ms))

    def refused(self, state: str) -> None:
        """Count a copy that was refused."""
        self._call("refused", state)

    def settle(
        self,
        incarnation: str,
        slot: int,
        entry: str,
        epoch: str,
        token: str,
        outcome: str,
        *rest: object,
        grant: str = "",
        least_ms: int = 0,
    ) -> str:
        """End a started task; see settle.lua.

        Arguments:
            grant: A start token for the next entry, if that has its lease for `least_ms` at least.
        """
        fence = incarnation, slot, entry, epoch, token
        return _text(self._call("settle", *fence, grant, least_ms, outcome, *rest))

    def decline(self, incarnation: str, slot: int, entry: str, epoch: str, token: str) -> bool:
        """Give back a start that was granted and not used."""
        return bool(self._call("decline", incarnation, slot, entry, epoch, token))

    def take(
        self,
        incarnation: str,
        slot: int,
        entry: str,
        epoch: str,
        token: str,
        least_ms: int,
        task: str,
        most_bytes: int,
    ) -> tuple[int, list[tuple[str, bytes]]]:
        """What joins a started batch task, as (entry, message); see take.lua."""
        code, *found = self._call(
            "take", incarnation, slot, entry, epoch, token, least_ms, task, most_bytes
        )
        return int(code), [(_text(e), raw) for e, raw in zip(found[::2], found[1::2], strict=True)]

    def settle_batch(
        self,
        incarnation: str,
        slot: int,
        entry: str,
        epoch: str,
        token: str,
        ends: Sequence[tuple[str, str, Sequence[object]]],
    ) -> str:
        """End all entries of a call: (entry, outcome, more words) of each; see settle_batch.lua."""
        words = [word for one, outcome, rest in ends for word in (one, outcome, len(rest), *rest)]
        return _text(self._call("settle_batch", incarnation, slot, entry, epoch, token, *words))

    def discard(
        self,
        incarnation: str,
        slot: int,
        entry: str,
        epoch: str,
        send: str,
        verdict: str,
        reason: str = "",
        alone: bool = False,
    ) -> int:
        """End a dispatched message that was never started; see discard.lua."""
        copies = "alone" if alone else ""
        return int(
            self._call("discard", incarnation, slot, entry, epoch, send, copies, verdict, reason)
        )

    def lost(self, incarnation: str, slot: int, entry: str, epoch: str, state: str) -> str:
        """What becomes of a task whose process is gone: settled, requeued or buried."""
        return _text(self._call("lost", incarnation, slot, entry, epoch, state))

    def finish(self, incarnation: str, slot: int, entry: str, epoch: str, outcome: str = "") -> int:
        """Note that the parent ended a running task, whose process still has to stop; its code."""
        return int(self._call("finish", incarnation, slot, entry, epoch, outcome))

    def process_up(self, incarnation: str, slot: int) -> bool:
        """A slot has a new process."""
        return bool(self._call("process_up", incarnation, slot))

    def occupy(self, incarnation: str, slot: int | None, token: str) -> bool:
        """An ordinary task begins in a slot."""
        return bool(self._call("occupy", incarnation, "" if slot is None else slot, token))

    def vacate(self, incarnation: str, token: str) -> bool:
        """An ordinary task has ended."""
        return bool(self._call("vacate", incarnation, token))
