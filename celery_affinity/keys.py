"""The only place in Python where a Redis key of the ledger is spelled (Lua: include/base.lua)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ("Keys",)


@dataclass(frozen=True)
class Keys:
    """Keys of one namespace, or of one shard of it. All of them share one hash slot."""

    namespace: str
    shard: int = 0

    @property
    def prefix(self) -> str:
        """What every key begins with; the only key that scripts are given."""
        shard = f"#{self.shard}" if self.shard else ""
        return "{affinity:" + self.namespace + shard + "}:"

    @property
    def workers(self) -> str:
        """Sorted set: incarnation -> when its heartbeat is overdue, in ms of Redis' clock."""
        return self.prefix + "workers"

    def queue(self, state: str, name: str) -> str:
        """A key of the queue's part of the ledger."""
        return f"{self.prefix}q:{state}:{name}"

    def inbox(self, state: str) -> str:
        """List: messages that were carried here from another broker, the oldest at its tail."""
        return self.queue(state, "inbox")

    def back(self, state: str) -> str:
        """List: what an evacuation gives back to another broker, the oldest at its tail."""
        return self.queue(state, "back")

    def outbox(self, incarnation: str) -> str:
        """List: dispatched messages that the node has not published on another broker yet."""
        return self.worker(incarnation, "out")

    def abroad(self, state: str) -> str:
        """Hash: worker queue on another broker -> the incarnation that consumes it."""
        return self.queue(state, "abroad")

    @staticmethod
    def beat_state(app: str) -> str:
        """What stands for a queue's name in the election of an app's beats and in its last runs.

        No queue can have that name: theirs hold no double quotes.
        """
        return f'"beat:{app}"'

    def backlog(self, state: str, tag: str) -> str:
        """List: a tag's entries that are not dispatched, in order."""
        return f"{self.prefix}b:{len(state.encode())}:{state}:{tag}"

    def worker(self, incarnation: str, name: str) -> str:
        """A key of a worker."""
        return f"{self.prefix}w:{incarnation}:{name}"

    def slot(self, incarnation: str, index: int) -> str:
        """Hash: a slot's lease."""
        return f"{self.prefix}s:{incarnation}:{index}"
