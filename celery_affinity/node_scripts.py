"""The transitions that nodes and their gates ask for: one typed method for each Lua script."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from celery_affinity.script_calls import SCHEMA_VERSION, ScriptCalls, text_of

__all__ = ("Demand", "NodeScripts")


def _lines(queues: Sequence[tuple[str, int, str]]) -> str:
    return "\n".join(f"{state}\t{limit}\t{listkey}" for state, limit, listkey in queues)


def _away(slot: int) -> str:
    return f"away:{slot}"


class Demand(NamedTuple):
    """A shard's tags and a node's slots in it."""

    #: Tags that could have a slot now: none of a queue that is paused or evacuated, and none for a
    #: node that takes no more.
    ready: int
    #: Slots of any node that are free for them.
    free: int
    #: Tags that have one.
    held: int
    #: The node's own slots: free, leased, and those that work for other shards.
    idle: frozenset[int]
    leased: frozenset[int]
    away: frozenset[int]
    #: Those that run an ordinary task.
    ordinary: frozenset[int] = frozenset()
    #: The tokens of these tasks; they are the same in all shards, where slots are processes.
    tokens: frozenset[str] = frozenset()
    #: For how long the first of the ready tags has waited, in seconds of that server's clock.
    waited: float = 0.0


class NodeScripts(ScriptCalls):
    """Calls of those scripts."""

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
        away: Sequence[int] = (),
        change: int = 0,
    ) -> int:
        """Announce an incarnation and offer its slots; the number of the change in force.

        Arguments:
            busy: Slots that still run something.
            away: Slots that work for another shard.
        """
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
            "\n".join([*map(str, busy), *map(_away, away)]),
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
        return text_of(self._call("settle", *fence, grant, least_ms, outcome, *rest))

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
        entries = map(text_of, found[::2])
        return int(code), list(zip(entries, found[1::2], strict=True))

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
        return text_of(self._call("settle_batch", incarnation, slot, entry, epoch, token, *words))

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
        return text_of(self._call("lost", incarnation, slot, entry, epoch, state))

    def known(self, state: str, entry: str) -> bool:
        """Whoever waits for the result of an entry that this node buried has been told."""
        return bool(self._call("known", state, entry))

    def finish(
        self,
        incarnation: str,
        slot: int,
        entry: str,
        epoch: str,
        outcome: str = "",
        state: str = "",
    ) -> int:
        """Note that the parent ended a running task, whose process still has to stop; its code.

        Arguments:
            outcome: "failed" past its time limit; then also its queue.
        """
        return int(self._call("finish", incarnation, slot, entry, epoch, outcome, state))

    def process_up(self, incarnation: str, slot: int) -> bool:
        """A slot has a new process."""
        return bool(self._call("process_up", incarnation, slot))

    def occupy(self, incarnation: str, slot: int | None, token: str) -> bool:
        """An ordinary task begins in a slot."""
        return bool(self._call("occupy", incarnation, "" if slot is None else slot, token))

    def stays(self, incarnation: str) -> list[str]:
        """What occupies slots of a node: names of stays, and notes of slots."""
        return [text_of(name) for name in self.client.hkeys(self.keys.worker(incarnation, "busy"))]

    def vacate(self, incarnation: str, token: str) -> bool:
        """An ordinary task has ended."""
        return bool(self._call("vacate", incarnation, token))

    # Slots of nodes that serve several shards

    def lend(self, incarnation: str, slot: int) -> None:
        """Another shard is to have this slot: no more leases, and the one that it has gets no more
        than its share. A repeat changes nothing.
        """
        self._call("occupy", incarnation, slot, _away(slot))

    def get_back(self, incarnation: str, slot: int) -> None:
        """This shard has the slot (again)."""
        self._call("vacate", incarnation, _away(slot))

    def demand(self, incarnation: str, states: Sequence[str]) -> Demand:
        """How a shard stands with a node's slots, in one moment and round trip. Reads only.

        Arguments:
            states: The queues of the shard that the node serves.
        """
        queue, worker = self.keys.queue, partial(self.keys.worker, incarnation)
        with self.client.pipeline(transaction=True) as pipe:
            pipe.time()
            pipe.hget(worker("info"), "state")
            pipe.smembers(worker("idle"))
            pipe.smembers(worker("leased"))
            pipe.hgetall(worker("busy"))
            for state in states:
                pipe.zcard(queue(state, "idle"))
                pipe.hlen(queue(state, "held"))
                pipe.zcard(queue(state, "ring"))
                pipe.zrange(queue(state, "ring"), 0, 0, withscores=True)
                pipe.hmget(queue(state, "conf"), "evac", "paused")
            (seconds, micros), alive, idle, leased, busy, *found = pipe.execute()
        runs = [alive == b"active" and not any(stops) for stops in found[4::5]]
        first = [heads[0][1] for go, heads in zip(runs, found[3::5], strict=True) if go and heads]
        away = {token[5:] for token in busy if token.startswith(b"away:")}
        ordinary = {
            text_of(token): slot
            for token, slot in busy.items()
            if not token.startswith(b"away:") and slot != b"-"
        }
        return Demand(
            ready=sum(ready for go, ready in zip(runs, found[2::5], strict=True) if go),
            free=sum(found[0::5]),
            held=sum(found[1::5]),
            idle=frozenset(map(int, idle)),
            leased=frozenset(map(int, leased)),
            away=frozenset(map(int, away)),
            ordinary=frozenset(map(int, ordinary.values())),
            tokens=frozenset(token for token in ordinary if not token.startswith("slot:")),
            waited=max(0.0, seconds + micros / 1e6 - min(first) / 1e6) if first else 0.0,
        )
