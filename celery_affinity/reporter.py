"""What a worker node reports to the ledger: that it lives, what it holds, that it stops.

Crash windows: a node that dies at any point stops beating and is rescued; one that was rescued
while it was frozen learns it from its next beat, and registers anew without the slots that
still run something (test_a_frozen_worker_starts_nothing_before_it_has_registered_anew); each of
those is vacated when that has ended, also if it ends in the middle of the registration
(test_a_slot_that_was_busy_when_its_node_registered_anew_is_vacated).

What a node serves and how many slots it has may change while it runs (remote control, autoscale).
Each beat looks at both, numbers a change, and tells it to the ledger until the ledger's answer
names it as the one in force. So a lost reply, a change made while Redis was away and a ledger that
was restored from an older copy are made good by the next beats, and an older change that arrives
late changes nothing (test_a_change_that_comes_late_changes_nothing_and_a_repeat_does_no_harm,
test_a_change_is_told_until_the_ledger_has_it).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from redis.exceptions import RedisError

from celery_affinity.connection import Reachability
from celery_affinity.held import Held
from celery_affinity.message import Stamp
from celery_affinity.readable import wait_readable
from celery_affinity.scripts import Scripts
from celery_affinity.unanswered import Unanswered
from celery_affinity.watchdog import Lifeline, seconds

__all__ = ("Reporter",)

logger = logging.getLogger(__name__)

#: A dispatched message that has not arrived after so long is sent again.
GRACE_MS = 1000


class Reporter:
    """One incarnation's reports.

    Arguments:
        connect: Makes a client; one for the heartbeat's thread, one for the caller's.
        announcement: Keyword arguments of `Scripts.register`, as they are at this moment.
        lifeline: Told of each answered heartbeat.
        looks: Called after each beat, in the heartbeat's thread.
        pulse: Called before each beat, whether Redis answers it or not.
        away: Slots that work for another shard at this moment.
        in_turn: See `Held`.
    """

    def __init__(
        self,
        connect: Callable[[], Scripts],
        incarnation: str,
        announcement: Callable[[], dict[str, Any]],
        interval_seconds: float,
        lifeline: Lifeline,
        looks: Sequence[Callable[[Scripts], None]] = (),
        pulse: Callable[[], None] = lambda: None,
        away: Callable[[], Sequence[int]] = tuple,
        in_turn: bool = False,
    ) -> None:
        self._lifeline = lifeline
        self.held = Held(in_turn)
        self.held.on_end = self._on_end
        self._connect = connect
        self._scripts = connect()
        self._incarnation = incarnation
        self._announcement = announcement
        self._interval = interval_seconds
        self._looks = looks
        self._pulse = pulse
        self._away = away
        self._beats = count(1)
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._draining = self._drained = self._stopping = False
        #: What the numbered change says, and which one is in force.
        self._numbering = threading.Lock()
        self._said: object = None
        self._change = self._in_force = 0
        self._busy_slots: set[int] = set()
        self._reachability = Reachability(logger, "heartbeats")
        self._unanswered = Unanswered(self._scripts, self._reachability, self._wake)

    # Called by the worker's start and stop

    def register(self) -> None:
        """Announce this incarnation (again); a repeat changes nothing."""
        change, announcement = self._numbered()
        sent = seconds()
        self._scripts.register(
            self._incarnation, **announcement, away=self._away(), change=change
        )
        self._lifeline.answered(sent)

    def changed(self) -> None:
        """The announcement is another one now: tell the ledger soon. Safe in any thread."""
        self._wake()

    def reconnected(self) -> None:
        """After a broker connection was lost: have sent again what had not started.

        A ledger that does not answer is no reason to stop: the next heartbeats do it.
        """
        self.held.flushed()
        self._tell(lambda: self._beat(self._scripts, 0))

    def drain(self, scripts: Scripts | None = None) -> None:
        """Take no more work; give back what has not started. Repeats change nothing."""
        try:
            back = (scripts or self._scripts).drain(self._incarnation)
        except RedisError as error:
            logger.warning("Could not drain: %s", error, extra={"action": "drain_failed"})
            return
        if not self._drained:
            logger.info(
                "Draining: %d tasks went back to the head of their tags.",
                back,
                extra={"action": "drain", "entries": back},
            )
        self._drained = True

    def leave(self) -> None:
        """The pool has stopped: take this incarnation out of the ledger."""
        self._stopping = True
        self._wake()
        try:
            self._unanswered.again(self._scripts)
            back = self._scripts.leave(self._incarnation)
        except RedisError as error:
            logger.warning(
                "Could not leave (%s): if it had registered, the leader rescues this worker after "
                "its heartbeat timeout.",
                error,
                extra={"action": "leave_failed"},
            )
        else:
            logger.info(
                "Left the ledger; %d tasks given back.",
                back,
                extra={"action": "leave", "entries": back},
            )

    def request_drain(self) -> None:
        """Drain soon, from the heartbeat's thread. Safe in a signal handler."""
        self._draining = True
        self._wake()

    # Called for single messages, in the worker's main thread (LedgerEnds)

    def discard(self, stamp: Stamp, verdict: str, reason: str = "") -> bool:
        """A dispatched message ended here without being started.

        False if it was requeued (unknown), or had been started before (bury).
        """
        alone = self.held.copies(stamp) <= 1
        answer = self._tell(
            lambda: self._scripts.discard(
                stamp.incarnation,
                stamp.slot,
                stamp.entry,
                stamp.epoch,
                stamp.send,
                verdict,
                reason,
                alone,
            )
        )
        if answer:
            self.held.discarded(stamp)
        # Untold, or no longer this node's: the ledger has it still, and it comes again somewhere.
        return bool(answer == 1 if verdict == "unknown" else answer != 0)

    def finish(self, stamp: Stamp) -> None:
        """A running task was ended; its process is being stopped."""
        self._tell(lambda: self._scripts.finish(*_lease_of(stamp)))

    def past_limit(self, stamp: Stamp, answered: Callable[[int], None]) -> None:
        """A task's hard time limit is over. `answered` gets the code of finish.lua, now or in the
        heartbeat's thread.
        """
        self._unanswered.tell(
            lambda scripts: answered(scripts.finish(*_lease_of(stamp), "failed", stamp.state))
        )

    def process_lost(self, stamp: Stamp) -> str:
        """What becomes of a task whose process is gone."""
        answer = self._tell(
            lambda: self._scripts.lost(
                stamp.incarnation, stamp.slot, stamp.entry, stamp.epoch, stamp.state
            )
        )
        return answer if isinstance(answer, str) else "requeued"

    def told(self, stamp: Stamp) -> None:
        """Whoever waits for the result of what `process_lost` or `discard` buried was told."""
        self._unanswered.tell(lambda scripts: scripts.known(stamp.state, stamp.entry))

    def _tell(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RedisError as error:
            # Nothing is lost: the next heartbeats find the message missing.
            self._reachability.unanswered(error)
            return None

    # The heartbeat's thread

    def run(self) -> None:
        """Beat until `leave`."""
        scripts = self._connect()
        while not self._stopping:
            try:
                wait_readable([self._reader], self._interval)
                self._clear_wake()
                if self._stopping:
                    return
                self._pulse()
                if self._draining and not self._drained:
                    self.drain(scripts)
                # Before the beat: it would give back what was over its limit.
                self._unanswered.again(scripts)
                self._tell_changes(scripts)
                self._beat(scripts, GRACE_MS)
                for look in self._looks:
                    look(scripts)
            except RedisError as error:
                self._reachability.unanswered(error)
                time.sleep(min(0.5, self._interval))
            except Exception:
                logger.exception("The heartbeat failed.", extra={"action": "heartbeat_failed"})
                time.sleep(min(0.5, self._interval))

    def _beat(self, scripts: Scripts, grace_ms: int) -> None:
        sent = seconds()
        registered, again, back, self._in_force = scripts.heartbeat(
            self._incarnation, f"{os.getpid()}.{next(self._beats)}", grace_ms, self.held.names()
        )
        self._reachability.answered()
        if registered:
            self._lifeline.answered(sent)
        if again or back:
            logger.warning(
                "%d messages were lost on the way and sent again, %d tasks taken back.",
                again,
                back,
                extra={"action": "resend", "again": again, "back": back},
            )
        if not registered and not self._draining and not self._stopping:
            self._register_anew(scripts)

    def _numbered(self) -> tuple[int, dict[str, Any]]:
        """The announcement as it is now, and its number: no two that differ have the same one."""
        with self._numbering:
            announcement = self._announcement()
            said = _changeable(announcement)
            if self._said is not None and said != self._said:
                self._change += 1
            self._said = said
            return self._change, announcement

    def _tell_changes(self, scripts: Scripts) -> None:
        change, announcement = self._numbered()
        if self._in_force >= change:
            return
        slots, queues, junk = (announcement[name] for name in ("slots", "queues", "junk"))
        for slot in self._away():  # new slots are offered at once
            scripts.lend(self._incarnation, slot)
        back = scripts.serve(self._incarnation, change, slots=slots, queues=queues, junk=junk)
        if back is None:
            return  # not registered (any more): the next beat finds out
        self._in_force = change
        logger.info(
            "Now serving %s with %d slots; %d tasks went back to the head of their tags.",
            ", ".join(repr(state) for state, _, _ in queues) or "no affinity queue",
            slots,
            back,
            extra={"action": "serve", "slots": slots, "entries": back},
        )

    def _register_anew(self, scripts: Scripts) -> None:
        logger.warning(
            "This worker was given up as lost; it registers anew. What it still runs may run "
            "elsewhere too.",
            extra={"action": "register_anew"},
        )
        self._lifeline.given_up()
        busy = self.held.running_slots()
        self._busy_slots = set(busy)
        sent = seconds()
        change, announcement = self._numbered()
        self._in_force = scripts.register(
            self._incarnation, **announcement, busy=sorted(busy), away=self._away(), change=change
        )
        self._lifeline.answered(sent)
        for slot in busy - self.held.running_slots():
            self._free(slot)  # it may have ended before it was noted as busy

    def _on_end(self, stamp: Stamp) -> None:
        self._free(stamp.slot)

    def _free(self, slot: int) -> None:
        if slot in self._busy_slots:
            self._busy_slots.discard(slot)
            self._unanswered.tell_soon(
                lambda scripts: scripts.vacate(self._incarnation, f"slot:{slot}")
            )

    def _wake(self) -> None:
        try:
            os.write(self._writer, b"!")
        except (BlockingIOError, OSError):
            pass

    def _clear_wake(self) -> None:
        if wait_readable([self._reader], 0):
            os.read(self._reader, 4096)


def _lease_of(stamp: Stamp) -> tuple[str, int, str, str]:
    return stamp.incarnation, stamp.slot, stamp.entry, stamp.epoch


def _changeable(announcement: dict[str, Any]) -> tuple[int, list[Any]]:
    return announcement["slots"], announcement["queues"]
