"""What the ledger keeps where the broker is elsewhere: the inbox, and the nodes' queues abroad."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from celery_affinity.broker import Taken
from celery_affinity.script_calls import ScriptCalls, text_of

__all__ = ("CarryingScripts",)


class CarryingScripts(ScriptCalls):
    """Reads and changes of that."""

    def carry(
        self,
        state: str,
        token: str,
        fence: str,
        taken: Sequence[Taken],
        kept_ms: int,
        most: int,
        shards: int = 1,
    ) -> tuple[int, int]:
        """Returns (carried, length of the inbox); carried is -1 if not the leader, -2 if the
        queue is evacuated, -3 if it has so many shards as the second number says; see carry.lua.
        """
        answer = self._call(
            "carry", state, token, fence, shards, kept_ms, most, *_words(taken)
        )
        return int(answer[0]), int(answer[1]) if len(answer) > 1 else 0

    def set_aside(
        self, state: str, taken: Sequence[Taken], kept_ms: int, most: int, part: int = 1000
    ) -> bool:
        """Put what is younger behind what is given back; see set_aside.lua.

        Arguments:
            taken: What was taken off the broker; the inbox's comes before.
            part: Messages of the inbox that one step moves at most.

        Returns:
            False if the queue is not evacuated (any more).
        """
        token = uuid4().hex
        while True:
            answer = self._call("set_aside", state, token, kept_ms, most, part, *_words(taken))
            if answer != 2:
                return bool(answer)

    def give(self, state: str, done: str, name: str, most: int) -> tuple[str, list[bytes]]:
        """Returns (name of the batch to publish, or "" when all is; its messages); see give.lua."""
        found, *raws = self._call("give", state, done, name, most)
        return text_of(found), raws

    def is_being_given(self, state: str) -> bool:
        """Whether a part of what an evacuation gives back is published. Reads only."""
        return bool(self.client.exists(self.keys.queue(state, "giving")))

    def has_nothing_to_give(self, state: str) -> bool:
        """Whether an evacuation has left nothing for the broker. Reads only."""
        return not self.client.exists(self.keys.back(state))

    def inbox_length(self, state: str) -> int:
        """Messages that were carried and wait for intake. Reads only."""
        return int(self.client.llen(self.keys.inbox(state)))

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
            text_of(name)
            for name, incarnation in found.items()
            if self.client.zscore(self.keys.workers, incarnation) is None
        ]

    def bring_home(self, state: str, fence: str, pending: str, most: int = 1000) -> int:
        """Put an inbox in front of the pending list, a part at a time; returns how many were moved,
        -1 if not the leader; see bring_home.lua.
        """
        moved = 0
        while self.inbox_length(state):
            part = int(self._call("bring_home", state, fence, most, lists=[pending]))
            if part < 0:
                return part
            moved += part
        return moved


def _words(taken: Sequence[Taken]) -> list[str | bytes]:
    return [word for one in taken for word in (one.identity, "again" if one.again else "", one.raw)]
