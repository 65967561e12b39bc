"""Broker -> ledger, where they are not one Redis: the leader carries messages into the inbox.

The inbox is a list of the ledger that plays the pending queue for intake (intake.py). The broker
keeps each message until it is told that the ledger has it:

    take --> carry.lua (inbox, tombstone) --> done

Crash windows:

- before carry.lua: the broker hands the message out again
  (test_a_carrier_that_dies_between_any_two_calls_loses_and_doubles_nothing).
- between carry.lua and done: it comes again, to whoever leads then, maybe after it has run. Its
  tombstone says that it was carried
  (test_a_message_that_is_redelivered_after_it_was_settled_is_not_admitted_again).
- carry.lua's reply is lost: the repeat has the same token and gets the same answer.
- a superseded leader: carry.lua compares the term and changes nothing
  (test_two_leaders_at_once_carry_each_message_once).
- give_back, between set_aside.lua and done: as between carry.lua and done.
- give_back, between publish and the next give.lua: who goes on publishes that batch again, with the
  same identities; their tombstones drop it once the queue is resumed
  (test_an_evacuation_that_dies_between_any_two_calls_gives_each_message_back_once). Plain Celery
  has no tombstones: there a message of that batch, of BATCH at most, runs twice.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4, uuid5

from redis.exceptions import OutOfMemoryError, RedisError

from celery_affinity.broker import Source, Taken
from celery_affinity.connection import Reachability
from celery_affinity.scripts import Scripts

__all__ = ("Carrier", "give_back")

logger = logging.getLogger(__name__)

#: Messages that one script carries at most.
BATCH = 200
#: Messages in the inbox above which the carrier waits for intake.
ENOUGH = 2000
#: Seconds that a tombstone is kept, and how many at most: far more than are handed out at once.
TOMBSTONE_SECONDS, TOMBSTONES = 3600.0, 10_000
#: Seconds that one wait for a message takes at most; a stop is noticed in between.
WAIT_SECONDS = 0.5
#: Seconds before a broker or a Redis that failed is tried again.
RETRY_SECONDS = 0.5
#: Seconds between two looks for worker queues whose node is gone.
SWEEP_SECONDS = 5.0


class Carrier:
    """Carries one affinity queue's messages while its process leads; a thread for each term.

    Arguments:
        connect: Opens the broker's side.

    Does not: read messages; that is intake's.
    """

    def __init__(
        self, scripts: Scripts, state: str, name: str, connect: Callable[[], Source]
    ) -> None:
        self._scripts = scripts
        self._state = state
        self._connect = connect
        self._over = threading.Event()
        self._reachability = Reachability(logger, f"tasks of {name!r}", "The broker")
        self._full = False

    def begin(self, fence: str) -> None:
        """A term has begun: carry until `end`."""
        self.end()
        self._over = threading.Event()
        threading.Thread(
            target=self.run,
            args=(fence, self._over),
            name=f"affinity-carrier-{self._state}",
            daemon=True,
        ).start()

    def end(self) -> None:
        """The term is over. Does not wait: what is still under way is refused by carry.lua."""
        self._over.set()

    def run(self, fence: str, over: threading.Event) -> None:
        """Carry until the term is over."""
        source: Source | None = None
        swept = 0.0
        while not over.is_set():
            try:
                if self._scripts.is_evacuated(self._state):
                    source = _closed(source)
                    over.wait(1.0)
                    continue
                source = source or self._connect()
                if time.monotonic() - swept >= SWEEP_SECONDS:
                    sweep(self._scripts, self._state, source)
                    swept = time.monotonic()
                taken = source.take(BATCH, WAIT_SECONDS)
                self._reachability.answered()
                if taken:
                    self._carry(fence, source, taken, over)
            except _Stopped:
                source = _closed(source)
            except Exception as error:
                source = _closed(source)
                self._note(error)
                over.wait(RETRY_SECONDS)
        _closed(source)

    def _carry(self, fence: str, source: Source, taken: list[Taken], over: threading.Event) -> None:
        carried, waiting = self._scripts.carry(
            self._state, uuid4().hex, fence, taken, int(TOMBSTONE_SECONDS * 1000), TOMBSTONES
        )
        if carried == -1:
            over.set()
        if carried < 0:
            raise _Stopped
        source.done(taken)
        if carried < len(taken):
            logger.info(
                "%d messages of %r had been carried before: dropped (not an error).",
                len(taken) - carried,
                self._state,
                extra={"action": "redelivered", "queue": self._state},
            )
        self._full = False
        while waiting > ENOUGH and not over.wait(0.05):
            waiting = self._scripts.inbox_length(self._state)

    def _note(self, error: Exception) -> None:
        if isinstance(error, OutOfMemoryError):
            if not self._full:
                logger.warning(
                    "The ledger's memory is full: tasks of %r wait on the broker.",
                    self._state,
                    extra={"action": "memory_full", "queue": self._state},
                )
            self._full = True
        elif isinstance(error, (OSError, RedisError)) or _is_of_a_client(error):
            self._reachability.unanswered(error)
        else:
            logger.exception(
                "Carrying %r failed; it goes on with a new connection.",
                self._state,
                extra={"action": "carry_failed", "queue": self._state},
            )


class _Stopped(Exception):
    """The term is over, or the queue is evacuated."""


def _is_of_a_client(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in ("amqp", "kombu")


def _closed(source: Source | None) -> Source | None:
    if source is not None:
        source.close()
    return None


def sweep(scripts: Scripts, state: str, source: Source) -> None:
    """Delete worker queues on the broker whose node is not in the ledger (any more).

    A node registers before it notes and declares its queues, so one that starts is not struck. One
    that was given up and comes back may be; its relay sees to a new declaration (relay.py).
    """
    gone = scripts.queues_abroad_of_the_lost(state)
    if gone:
        source.delete(gone)
        scripts.forget_abroad(state, gone)


def give_back(scripts: Scripts, state: str, source: Source) -> int:
    """Publish on the broker what an evacuation has put into a list; returns how many.

    What has arrived since, in the inbox and on the broker, is younger: it goes behind them. (Not
    again once a part is published: what is on the broker then is that part, too.)
    """
    if not scripts.is_being_given(state):
        _gather(scripts, state, source)
    moved, done = 0, ""
    while True:
        name, raws = scripts.give(state, done, uuid4().hex, BATCH)
        if not name:
            return moved
        source.give_back(raws, [uuid5(UUID(name), str(at)).hex for at in range(len(raws))])
        moved += len(raws)
        done = name


def _gather(scripts: Scripts, state: str, source: Source) -> None:
    """Put what is younger behind what is given back."""

    def set_aside(taken: list[Taken]) -> bool:
        return scripts.set_aside(state, taken, int(TOMBSTONE_SECONDS * 1000), TOMBSTONES)

    client: Any = scripts.client
    if not set_aside([]) or not client.exists(scripts.keys.back(state)):
        return
    for _ in range(100_000 // BATCH):
        younger = source.take(BATCH, WAIT_SECONDS)
        if not younger or not set_aside(younger):
            return
        source.done(younger)
