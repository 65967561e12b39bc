"""The election of the one node that schedules an affinity queue.

A term is a key in Redis, ``<candidate> <number>``, that expires after ``leader_ttl``.

    candidate --claim--> leader --renew--> leader
                            |--renew refused, or not possible in time--> candidate (concede)
                            `--stop--> resign --> gone; the others are woken at once

- A claim succeeds only while the key is absent. The number only grows (see claim.lua).
- Every script that a leader runs takes its fence, ``<candidate> <number>``, and does nothing
  unless the key still holds it. So a leader that was frozen, cut off or superseded changes
  nothing, whatever it believes.
- The leader stops trusting its term before the key can expire: the trusted time is counted, on
  its own monotonic clock, from *before* the claim or renewal was sent.

Crash windows: after a claim and before the first pass, or anywhere in a term: the key expires,
another candidate claims (test_a_killed_leader_is_replaced_within_its_ttl). After a claim whose
reply was lost: the same candidate claims again and gets the same term
(test_a_repeated_claim_gets_the_same_term).
"""

from __future__ import annotations

import os
import time
from uuid import uuid4

from celery_affinity.scripts import Scripts

__all__ = ("Elector", "candidate_name")


def candidate_name(node: str) -> str:
    """A name that no other candidate has: node, pid and a random part, without spaces."""
    return f"{node.replace(' ', '_')}/{os.getpid()}/{uuid4().hex[:8]}"


class Elector:
    """One candidate's part in the election of one queue.

    Does not: run threads or sleep; the scheduler calls it.
    """

    def __init__(self, scripts: Scripts, state: str, candidate: str, ttl_seconds: float) -> None:
        self._scripts = scripts
        self._state = state
        self.candidate = candidate
        self._ttl = ttl_seconds
        self._trusted_until = 0.0
        #: Number of the term held, or None.
        self.term: str | None = None

    @property
    def fence(self) -> str:
        """What a leader's scripts compare."""
        return f"{self.candidate} {self.term}"

    @property
    def leading(self) -> bool:
        """Whether the term can be trusted now."""
        return self.term is not None and time.monotonic() < self._trusted_until

    @property
    def renew_at(self) -> float:
        """Monotonic time at which the term should be renewed: a third of it is over."""
        return self._trusted_until - self._ttl * 0.6

    def claim(self) -> float:
        """Try to get elected; returns seconds after which to try again if that failed."""
        asked = time.monotonic()
        self.term, wait_ms = self._scripts.claim(self._state, self.candidate, int(self._ttl * 1000))
        if self.term is not None:
            self._trust_from(asked)
            return 0.0
        return min(max(wait_ms, 10) / 1000, self._ttl)

    def renew(self) -> bool:
        """Prolong the term; concedes if that is refused."""
        asked = time.monotonic()
        if self.term is not None and self._scripts.renew(
            self._state, self.fence, int(self._ttl * 1000)
        ):
            self._trust_from(asked)
            return True
        self.concede()
        return False

    def concede(self) -> None:
        """Stop leading without a word: the term is over or cannot be trusted."""
        self.term = None

    def resign(self) -> None:
        """End the own term at once, so that another candidate need not wait for its end."""
        if self.term is not None:
            self._scripts.resign(self._state, self.fence)
        self.term = None

    def _trust_from(self, asked: float) -> None:
        self._trusted_until = asked + self._ttl * 0.9
