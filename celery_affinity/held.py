"""The dispatched messages that a node holds, from their arrival to their end there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from celery_affinity.message import Stamp

__all__ = ("Held",)

#: Seconds for which a published message that does not arrive counts as on its way. (When the
#: broker's connection is lost, it counts no more at once.)
UNDER_WAY_SECONDS = 10.0


@dataclass(eq=False)
class _Copy:
    """One of the messages that a broker delivered of a dispatched one: it may deliver it twice."""

    request: Any
    #: Whether a process (thread, greenlet) has taken it.
    accepted: bool = False


class Held:
    """What the node's heartbeat reports. Its methods are single steps on a dict, so threads and
    greenlets may call them side by side.

    Arguments:
        in_turn: Whether a slot is a process, which takes its messages one after the other.
    """

    #: Entries remembered that were announced here and then refused, flushed, or ended unstarted.
    REFUSED = 1000

    def __init__(self, in_turn: bool = False) -> None:
        self._in_turn = in_turn
        self._stamps: dict[str, Stamp] = {}
        self._copies: dict[str, list[_Copy]] = {}
        self._refused: dict[tuple[str, str], None] = {}
        #: Entries, with their lease, that the ledger has ended on this node's word.
        self._discarded: dict[tuple[str, str, str], None] = {}
        #: The same of messages that the pool may have thrown away: then they never end.
        self._flushed: dict[str, list[_Copy]] = {}
        #: Messages that were given their end while they ran -> whether their process has stopped.
        self._stopping: dict[str, Callable[[], bool]] = {}
        #: Messages on their way over another broker, until when that is believed (monotonic).
        self._under_way: dict[str, float] = {}
        #: Called with the stamp of each message that ends, or of which no copy runs any more.
        self.on_end: Callable[[Stamp], None] = lambda stamp: None

    def sent(self, stamp: Stamp) -> None:
        """It is being published for this node: it counts as held, or the heartbeat would have it
        sent again as long as it has not arrived.
        """
        self._under_way[stamp.held] = time.monotonic() + UNDER_WAY_SECONDS

    def unsent(self, stamp: Stamp) -> None:
        """It was not published after all."""
        self._under_way.pop(stamp.held, None)

    def arrived(self, stamp: Stamp, request: Any) -> None:
        """A message reached the node."""
        self._under_way.pop(stamp.held, None)
        self._stamps.setdefault(stamp.held, stamp)
        self._copies.setdefault(stamp.held, []).append(_Copy(request))

    def accepted(self, stamp: Stamp, request: Any) -> None:
        """A process (thread, greenlet) has taken it.

        A slot's process has no older copy any more, then: what was thrown away before this one
        came runs no more, or never has. (If it counted as what may run, a start that was granted in
        a ledger that was restored would be sent again with each heartbeat.)
        """
        for copy in self._copies.get(stamp.held, ()):
            if copy.request is request:
                copy.accepted = True
                if self._in_turn:
                    self._forget_flushed(stamp)

    def _forget_flushed(self, stamp: Stamp) -> None:
        for held in list(self._flushed):
            if held.startswith(_entry_of(stamp)):
                self._flushed.pop(held, None)

    def ended(self, stamp: Stamp, request: Any) -> None:
        """It has ended here, in whatever way. While another copy of it is here it stays held. A
        repeat changes nothing.
        """
        held = stamp.held
        self._under_way.pop(held, None)
        for found in (self._copies, self._flushed):
            copies = found.get(held, [])
            copy = next((copy for copy in copies if copy.request is request), None)
            if copy is None:
                continue
            copies.remove(copy)
            if not copies:
                found.pop(held, None)
            if found is not self._copies:
                return
            if not copies:
                self._stamps.pop(held, None)
            # Its slot runs it no more, also if a copy that waits is flushed unheard later.
            if not copies or (copy.accepted and not any(other.accepted for other in copies)):
                self.on_end(stamp)
            return

    def stopping(self, stamp: Stamp, is_gone: Callable[[], bool]) -> None:
        """It has ended here, but its process may still clean up: its tag must wait for that."""
        self._stopping[stamp.held] = is_gone

    def refused(self, stamp: Stamp) -> None:
        """It was announced here and then not run: its entry may come again."""
        self._refused[stamp.state, stamp.entry] = None
        if len(self._refused) > self.REFUSED:
            self._refused.pop(next(iter(self._refused)), None)

    def was_refused(self, stamp: Stamp) -> bool:
        """Whether a copy of this entry was announced here before. Forgets it."""
        return self._refused.pop((stamp.state, stamp.entry), False) is None

    def discarded(self, stamp: Stamp) -> None:
        """The ledger has ended its entry, unstarted: no other copy of it may get to its process,
        which may have been granted its start.
        """
        self._discarded[stamp.state, stamp.entry, stamp.epoch] = None
        if len(self._discarded) > self.REFUSED:
            self._discarded.pop(next(iter(self._discarded)), None)

    def was_discarded(self, stamp: Stamp) -> bool:
        """Whether its entry has ended here, in the same lease."""
        return (stamp.state, stamp.entry, stamp.epoch) in self._discarded

    def may_run(self, stamp: Stamp) -> None:
        """It is of no use here, but another copy of it may run: have one more sent, so that its
        gate decides.
        """
        self._may_run(stamp.held, [_Copy(None)])

    def flushed(self) -> None:
        """The pool has thrown away what no process had taken.

        One that a process has just taken may be among them: the pool does not tell of its end. So
        it is to be sent again if it did not start, but not taken back if it did.
        """
        self._under_way.clear()
        for held, copies in list(self._copies.items()):
            taken = [copy for copy in copies if copy.accepted]
            if len(taken) == len(copies):
                continue
            self._may_run(held, [copy for copy in copies if not copy.accepted])
            if taken:
                self._copies[held] = taken
            else:
                self._copies.pop(held, None)
                self._stamps.pop(held, None)

    def _may_run(self, held: str, copies: list[_Copy]) -> None:
        self._flushed[held] = copies
        if len(self._flushed) > self.REFUSED:
            self._flushed.pop(next(iter(self._flushed)), None)

    def names(self) -> list[str]:
        """What is held, as heartbeats name it; what may be held has ":?" behind its name."""
        for held, is_gone in list(self._stopping.items()):
            if is_gone():
                self._stopping.pop(held, None)
        now = time.monotonic()
        for held, until in list(self._under_way.items()):
            if until <= now:
                self._under_way.pop(held, None)
        return [
            *list(self._under_way),
            *list(self._copies),
            *list(self._stopping),
            *(f"{held}:?" for held in list(self._flushed)),
        ]

    def content(self) -> list[tuple[Stamp, Any, bool]]:
        """What is held: stamp, request, and whether a process has taken it."""
        return [
            (stamp, copies[0].request, any(copy.accepted for copy in copies))
            for held, stamp in list(self._stamps.items())
            if (copies := list(self._copies.get(held, ())))
        ]

    def running_slots(self) -> set[int]:
        """Slots whose process works on something."""
        return {stamp.slot for stamp, _, runs in self.content() if runs}

    def copies(self, stamp: Stamp) -> int:
        """How many messages of its entry and lease are here, or may be."""
        return sum(
            len(copies)
            for found in (self._copies, self._flushed)
            for held, copies in list(found.items())
            if held.startswith(_entry_of(stamp))
        )

    def other_request(self, task_id: str, request: Any) -> Any:
        """Another live request with the same task id, or None."""
        for copies in list(self._copies.values()):
            for copy in list(copies):
                other = copy.request
                if other is not None and other is not request and other.id == task_id:
                    return other
        return None


def _entry_of(stamp: Stamp) -> str:
    """What the names of all messages of its entry and lease begin with."""
    return stamp.held.rsplit(":", 1)[0] + ":"
