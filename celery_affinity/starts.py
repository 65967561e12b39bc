"""A process' starts: those that it asks the ledger for, and the one that a settle granted it.

A settle may start the lease's next entry in the same step (settle.lua): the caller proposes a
token, and the answer names the entry that has it now. When that entry's message reaches this
process, it runs without asking: one round trip a task instead of two.

Crash windows, each with its law:
- the process is gone before it ran what was granted: the ledger cannot know, so it counts a start
  (test_a_granted_start_counts_when_its_process_is_lost). Whatever ran was counted, and no entry is
  granted a start that the count could bury (test_no_start_is_granted_that_a_loss_could_bury).
- the message is lost: it comes again, and is asked for with the token that was granted
  (test_a_lost_message_whose_start_was_granted_comes_again_and_counts_no_delivery).
- the process is frozen in between: a grant is as old as the question that brought it, the lost
  replies before it included. A late one is asked for
  (test_a_grant_that_is_late_is_asked_for_with_its_token).
- the process ends, or an ordinary task is next: the grant is declined (decline.lua). Where that
  call was not answered it may still arrive late, so it is made again before the entry is asked
  for, which then has another token
  (test_a_grant_that_could_not_be_declined_is_declined_later).
- the message is overtaken by the one behind it: then it was lost, or thrown away unheard. Nobody
  but this process knows that it does not run, so it declines
  (test_a_grant_whose_message_was_overtaken_is_declined).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from celery_affinity.message import Stamp
from celery_affinity.scripts import Scripts
from celery_affinity.watchdog import seconds

__all__ = ("Starts",)

logger = logging.getLogger(__name__)

#: What start.lua answers while the worker's heartbeat is late: its lease may soon be over.
HEARTBEAT_LATE = -5
#: What a granted token ends in (include/lease.lua).
GRANTED = "?"
#: When a grant was asked for whose decline was not answered.
UNANSWERED = float("-inf")

Caller = Callable[[Callable[[], Any]], Any]
_Found = TypeVar("_Found")


@dataclass
class _Grant:
    stamp: Stamp
    entry: str
    token: str
    asked: float

    def is_for(self, stamp: Stamp) -> bool:
        return (self.entry, self.stamp.epoch) == (stamp.entry, stamp.epoch)

    def is_void_for(self, stamp: Stamp) -> bool:
        """Whether this message of the same lease shows that the grant is not to be used."""
        if self.stamp.epoch != stamp.epoch:
            return False
        overtaken = int(stamp.entry) > int(self.entry)
        return overtaken or (self.entry == stamp.entry and self.asked == UNANSWERED)


class Starts:
    """What one process starts, one after the other.

    Arguments:
        token: Makes a start token.
        trust_seconds: How old the permission to start may be when it arrives, and for how long a
            task must have its lease at least when it starts.
        granted: Whether a settle may grant starts here: where all messages of a lease come to this
            process, and nothing else takes them.
    """

    #: Share of `trust_seconds` for which a granted start is used without a question. A watchdog
    #: counts on it (watchdog.py): a task begins while more than 0.4 of its lease is left.
    SHARE = 0.2

    def __init__(
        self, scripts: Scripts, token: Callable[[], str], trust_seconds: float, granted: bool
    ) -> None:
        self._scripts = scripts
        self._token = token
        self._trust_seconds = trust_seconds
        self._may_be_granted = granted
        self._grant: _Grant | None = None

    @property
    def least_ms(self) -> int:
        """For how long a task must have its lease at least when it starts."""
        return int(self._trust_seconds * 1000)

    def begin(self, stamp: Stamp, patiently: Caller) -> tuple[int, str]:
        """Whether this message may run (1, or why not), and the token of its start."""
        if self._grant is not None and self._grant.is_void_for(stamp):
            self.decline(lambda ask: (patiently(ask), True)[1])
        grant = self._grant
        if grant is None or not grant.is_for(stamp):
            token = self._token()
            answer = self._ask(stamp, token, patiently)
            if answer == 1:
                self._grant = None  # of a lease that is over
            return answer, token
        self._grant = None
        if seconds() - grant.asked < self._trust_seconds * self.SHARE:
            return 1, grant.token
        return self._ask(stamp, grant.token, patiently), grant.token

    def join(
        self, stamp: Stamp, token: str, task: str, most_bytes: int, patiently: Caller
    ) -> tuple[int, Sequence[tuple[str, bytes]]]:
        """What waits behind a started batch task and joins it (take.lua), with a code as a start's.

        A granted start has begun with this at the latest: the ledger takes it for running.
        """
        fence = stamp.incarnation, stamp.slot, stamp.entry, stamp.epoch, token
        return self._trusted(
            lambda: self._scripts.take(*fence, self.least_ms, task, most_bytes), patiently
        )

    def _ask(self, stamp: Stamp, token: str, patiently: Caller) -> int:
        fence = stamp.incarnation, stamp.slot, stamp.entry, stamp.epoch
        return self._trusted(
            lambda: (self._scripts.start(*fence, stamp.send, token, self.least_ms), ()), patiently
        )[0]

    def _trusted(
        self, ask: Callable[[], tuple[int, _Found]], patiently: Caller
    ) -> tuple[int, _Found]:
        """What the ledger answers, asked again while that is too old or the heartbeat too late."""
        while True:
            asked = seconds()
            code, found = patiently(ask)
            if code == HEARTBEAT_LATE:
                patiently(lambda: time.sleep(0.05))
            elif code != 1 or seconds() - asked < self._trust_seconds:
                return code, found

    def proposal(self) -> str:
        """A token for the start that a settle may grant; "" if it may not."""
        return self._token() + GRANTED if self._may_be_granted else ""

    def settled(self, stamp: Stamp, answer: str, proposal: str, asked: float) -> str:
        """Note what a settle granted; the rest of its answer.

        Arguments:
            asked: When the settle was asked for, the first time (`watchdog.seconds`).
        """
        outcome, _, entry = answer.partition(" ")
        self._grant = _Grant(stamp, entry, proposal, asked) if entry else None
        return outcome

    def decline(self, call: Callable[[Callable[[], Any]], bool]) -> None:
        """What was granted is not going to run now.

        Arguments:
            call: Makes a call to the ledger; whether it was answered.
        """
        grant, self._grant = self._grant, None
        if grant is None:
            return
        stamp = grant.stamp
        answered = call(
            lambda: self._scripts.decline(
                stamp.incarnation, stamp.slot, grant.entry, stamp.epoch, grant.token
            )
        )
        if not answered:  # the ledger may have the token still: asked with another it would refuse
            grant.asked = UNANSWERED
            self._grant = grant
