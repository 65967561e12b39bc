"""What a node reports, where it serves several shards: to each its own.

A message's stamp says which shard it is of: the node has another incarnation in each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from celery_affinity.held import Held
from celery_affinity.message import Stamp
from celery_affinity.reporter import Reporter

__all__ = ("Reporters",)


def _of_stamp(name: str) -> Any:
    def call(self: HeldByShard, stamp: Stamp, *args: Any) -> Any:
        return getattr(self.of(stamp), name)(stamp, *args)

    return call


class HeldByShard(Held):
    """The messages of all shards that a node holds.

    Arguments:
        shards: Incarnation -> what is held of that shard.
    """

    def __init__(self, shards: Mapping[str, Held]) -> None:
        super().__init__()
        self.shards = shards

    def of(self, stamp: Stamp) -> Held:
        """The shard of a message; of a stray one of another node, the first."""
        return self.shards.get(stamp.incarnation) or next(iter(self.shards.values()))

    sent = _of_stamp("sent")
    unsent = _of_stamp("unsent")
    arrived = _of_stamp("arrived")
    accepted = _of_stamp("accepted")
    ended = _of_stamp("ended")
    stopping = _of_stamp("stopping")
    refused = _of_stamp("refused")
    was_refused = _of_stamp("was_refused")
    discarded = _of_stamp("discarded")
    was_discarded = _of_stamp("was_discarded")
    may_run = _of_stamp("may_run")
    copies = _of_stamp("copies")

    def flushed(self) -> None:
        """See `Held.flushed`."""
        for held in self.shards.values():
            held.flushed()

    def names(self) -> list[str]:
        """See `Held.names`."""
        return [name for held in self.shards.values() for name in held.names()]

    def content(self) -> list[tuple[Stamp, Any, bool]]:
        """See `Held.content`."""
        return [one for held in self.shards.values() for one in held.content()]

    def running_slots(self) -> set[int]:
        """See `Held.running_slots`."""
        return {slot for held in self.shards.values() for slot in held.running_slots()}

    def other_request(self, task_id: str, request: Any) -> Any:
        """See `Held.other_request`."""
        found = (held.other_request(task_id, request) for held in self.shards.values())
        return next((one for one in found if one is not None), None)


class Reporters:
    """One node's reporters, as one.

    Arguments:
        by_incarnation: The reporter of each shard, the first one's first.
    """

    def __init__(self, by_incarnation: Mapping[str, Reporter]) -> None:
        self._of = dict(by_incarnation)
        self.all = list(self._of.values())
        held = {incarnation: reporter.held for incarnation, reporter in self._of.items()}
        self.held: Held = HeldByShard(held) if len(held) > 1 else self.all[0].held

    @property
    def loops(self) -> list[Callable[[], None]]:
        """What beats in each shard, until `leave`: a thread for each."""
        return [reporter.run for reporter in self.all]

    def register(self) -> None:
        """See `Reporter.register`."""
        for reporter in self.all:
            reporter.register()

    def changed(self) -> None:
        """See `Reporter.changed`."""
        for reporter in self.all:
            reporter.changed()

    def reconnected(self) -> None:
        """See `Reporter.reconnected`."""
        for reporter in self.all:
            reporter.reconnected()

    def drain(self) -> None:
        """See `Reporter.drain`."""
        for reporter in self.all:
            reporter.drain()

    def leave(self) -> None:
        """See `Reporter.leave`."""
        for reporter in self.all:
            reporter.leave()

    def request_drain(self) -> None:
        """See `Reporter.request_drain`."""
        for reporter in self.all:
            reporter.request_drain()

    # Called for single messages, in the worker's main thread (LedgerEnds)

    def discard(self, stamp: Stamp, verdict: str, reason: str = "") -> bool:
        """See `Reporter.discard`."""
        return self._for(stamp).discard(stamp, verdict, reason)

    def finish(self, stamp: Stamp) -> None:
        """See `Reporter.finish`."""
        self._for(stamp).finish(stamp)

    def past_limit(self, stamp: Stamp, answered: Callable[[int], None]) -> None:
        """See `Reporter.past_limit`."""
        self._for(stamp).past_limit(stamp, answered)

    def process_lost(self, stamp: Stamp) -> str:
        """See `Reporter.process_lost`."""
        return self._for(stamp).process_lost(stamp)

    def told(self, stamp: Stamp) -> None:
        """See `Reporter.told`."""
        self._for(stamp).told(stamp)

    def _for(self, stamp: Stamp) -> Reporter:
        # A stray message of another node is refused by any.
        return self._of.get(stamp.incarnation, self.all[0])
