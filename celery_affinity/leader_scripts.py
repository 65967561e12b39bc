"""The transitions that leaders ask for, and elected beats: one typed method for each Lua script."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from celery_affinity.script_calls import SCHEMA_VERSION, ScriptCalls, text_of

__all__ = ("LeaderScripts",)


class LeaderScripts(ScriptCalls):
    """Calls of those scripts."""

    # Leadership

    def claim(self, state: str, candidate: str, ttl_ms: int) -> tuple[str | None, int]:
        """Returns (term, 0) if elected, else (None, ms until the present term can end)."""
        answer = self._call("claim", state, candidate, ttl_ms, SCHEMA_VERSION)
        self._check_schema(answer)
        return (text_of(answer[1]), 0) if answer[0] == 1 else (None, int(answer[1]))

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

    def shards(self, state: str) -> int | None:
        """Over how many shards the ledger has the queue; None before its first term. Reads only."""
        found: Any = self.client.hget(self.keys.queue(state, "conf"), "shards")
        return None if found is None else int(found)

    def is_empty(self, state: str) -> bool:
        """Whether a queue, or a shard of it, has nothing that waits or runs or is being given back
        by an evacuation, and no dead letters: they may be requeued. Reads only.
        """
        names = ("m", "dead", "inbox", "stage", "back", "batch")
        return not self.client.exists(*(self.keys.queue(state, name) for name in names))

    def reshape(self, state: str, goes: bool) -> bool:
        """Take off an empty queue, or shard of one, what is set of single tags; see reshape.lua.

        Arguments:
            goes: Whether this shard is no more.

        Returns:
            False if it is not empty: nothing was changed.
        """
        return bool(self._call("reshape", state, "goes" if goes else ""))

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

    def is_evacuated(self, state: str) -> bool:
        """Whether the queue is stopped. Reads only."""
        return bool(self.client.hexists(self.keys.queue(state, "conf"), "evac"))

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

    def requeue_elsewhere(self, state: str, token: str, entry: int) -> int:
        """Take out a dead letter whose message was published for another shard; how many."""
        return int(self._call("requeue", state, token, "elsewhere", "", "", entry)[0])

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

    def deadlines(self, most: int) -> dict[str, int]:
        """Workers, and when their heartbeats are overdue (ms of Redis' clock); the first ones."""
        found: Any = self.client.zrange(self.keys.workers, 0, most - 1, withscores=True)
        return {incarnation.decode(): int(due) for incarnation, due in found}

    def rescue(
        self,
        state: str,
        fence: str,
        budget: int,
        looked: tuple[int, int] | None = None,
        silent: Sequence[tuple[str, int]] = (),
    ) -> list[Any]:
        """See rescue.lua."""
        known = [part for worker in silent for part in worker]
        answer: list[Any] = self._call("rescue", state, fence, budget, *(looked or ()), *known)
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
