"""Takes back what lost workers held.

A worker is lost when its heartbeat is overdue by Redis' clock. That clock can jump, and stands
still while Redis is down; in both cases heartbeats look overdue that are not. So before each
rescue the clock's advance is compared with the own monotonic clock and the server's run id with
the last one; after a jump or a restart all heartbeats count as new. A jump also ends the leader's
term, so candidates look at the clock too: whoever follows must know of it. A change of master is
seen as a restart is, by its run id. What the new master did not get in time it does not have, so
the term that began on the old one ends there (scheduler.py). So it is when a cluster moves the
ledger's slot to another node.

While Redis is paused, slow, out of connections, or refuses all writes (a full disk), heartbeats do
not get through either. So what the leader or candidate finds of that is not held against them:
after an error all heartbeats count as new; after a long time between two looks they get that time
more. What happens between the look and the rescue itself is seen by rescue.lua, which refuses an
old look
(test_a_pause_between_the_look_and_the_rescue_gives_nobody_up).

Jumps to and fro between two looks show nothing of themselves. So whatever that clock says, only a
worker is given up whose deadline has stayed the same for three quarters of a timeout by our own
clock: one that is alive moves it three times in a timeout
(test_a_clock_that_jumps_to_and_fro_rescues_nobody_alive). That costs no time, as leader and
candidates look four times in a timeout.

Crash windows: rescue.lua takes out a bounded number of leases at a time; a rescue cut off half
way is finished by the next pass, of whichever leader
(test_what_a_lost_worker_held_goes_back_to_the_head_in_order).
"""

from __future__ import annotations

import logging
import time

from celery_affinity.connection import server_clock
from celery_affinity.scripts import Scripts

__all__ = ("Rescuer",)

logger = logging.getLogger(__name__)

#: Seconds by which the server's clock may differ from ours between two looks.
TOLERANCE_SECONDS = 1.0


class Rescuer:
    """One queue's rescue passes.

    Does not: decide who is lost; rescue.lua compares the heartbeat in the step that takes over.
    """

    #: Leases that one script takes back at most.
    BATCH = 50
    #: Workers whose deadlines are watched at most: the first ones to be overdue.
    WATCHED = 1000

    def __init__(self, scripts: Scripts, state: str, settle_seconds: float) -> None:
        self._scripts = scripts
        self._state = state
        self._settle_seconds = settle_seconds
        self._last: tuple[str, float, float] | None = None
        self._moved = False
        self._credit = 0.0
        #: Incarnation -> its deadline, and since when it is that (monotonic).
        self._deadlines: dict[str, tuple[int, float]] = {}
        #: Whether another server answers than before; whoever acts on that sets it back.
        self.replaced = False

    @property
    def timeout(self) -> float:
        """Seconds without a heartbeat after which a worker is lost."""
        return self._settle_seconds

    @property
    def pause(self) -> float:
        """Seconds between two looks at most. A worker beats three times in its timeout, so one
        that was heard on time is not overdue after half a timeout without a look."""
        return self._settle_seconds / 4

    def run(self, fence: str) -> float:
        """One pass. Returns seconds until a worker can be overdue; -1 if not the leader."""
        self.look()
        if self._moved or self._credit:
            credit = None if self._moved else int(self._credit * 1000)
            if not self._scripts.rebase(self._state, fence, credit):
                return -1
            self._moved, self._credit = False, 0.0
            self._watch(credit or 0)
        while True:
            answer = self._scripts.rescue(
                self._state, fence, self.BATCH, self._looked(), self._silent()
            )
            if answer[0] == -1:
                return -1
            if answer[0] == -2:
                return 0.0
            if answer[0] == 0:
                # A worker that registers after this look is overdue in one timeout at the earliest.
                left = self._settle_seconds if answer[1] < 0 else float(answer[1]) / 1000
                return min(left, self._settle_seconds)
            name, incarnation, back = answer[1].decode(), answer[2].decode(), int(answer[3])
            logger.warning(
                "Worker %r is lost (no heartbeat): %d tasks go back to the head of their tags.",
                name,
                back,
                extra={
                    "action": "rescue",
                    "worker": name,
                    "incarnation": incarnation,
                    "entries": back,
                },
            )

    def look(self) -> None:
        """Compare the server's clock with the last look, so that the next pass knows of a jump; and
        the workers' deadlines with what they were."""
        self._moved = self._clock_moved() or self._moved
        self._watch()

    def unanswered(self) -> None:
        """Redis did not answer, or refused to: nobody's heartbeat need have got through."""
        self._moved = True

    def _looked(self) -> tuple[int, int] | None:
        if self._last is None:
            return None
        return int(self._last[1] * 1000), int(self.pause * 1000)

    def _watch(self, credit: int = 0) -> None:
        """Note the deadlines. One that was only given the credit (ms) has stayed the same."""
        found = self._scripts.deadlines(self.WATCHED)
        now, known = time.monotonic(), self._deadlines
        self._deadlines = {}
        for incarnation, due in found.items():
            before, since = known.get(incarnation, (due, now))
            same = before in (due, due - credit)
            self._deadlines[incarnation] = due, since if same else now

    def _silent(self) -> list[tuple[str, int]]:
        """Workers that may be overdue, with their deadlines, which are the same for long."""
        if self._last is None:
            return []
        latest = (self._last[1] + self.pause) * 1000
        long_since = time.monotonic() - (self._settle_seconds - self.pause)
        return [
            (incarnation, due)
            for incarnation, (due, since) in self._deadlines.items()
            if since <= long_since and due <= latest
        ]

    def _clock_moved(self) -> bool:
        run_id, server = server_clock(self._scripts.client, self._scripts.keys.prefix)
        own = time.monotonic()
        last, self._last = self._last, (run_id, server, own)
        if last is None:
            # Nothing is known of the time before: who was elected at once waits one timeout.
            return True
        gap = own - last[2]
        if gap > 2 * self.pause:
            self._credit += gap - self.pause
        drift = abs((server - last[1]) - gap)
        self.replaced = self.replaced or run_id != last[0]
        if run_id == last[0] and drift < TOLERANCE_SECONDS:
            return False
        logger.warning(
            "Redis %s: all heartbeats count as new, nobody is rescued before they are due again.",
            "was restarted, or another one is the master now"
            if run_id != last[0]
            else f"changed its clock by {drift:.1f} s",
            extra={"action": "rebase", "queue": self._state},
        )
        return True
