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
- terms that follow at once, when the ledger has another server: the second term's carrier waits for
  the end of the first one's, which holds messages until it is refused. On RabbitMQ those behind
  them would come first
  (test_a_term_that_follows_at_once_carries_after_the_one_before_has_given_back).
- a superseded leader: carry.lua compares the term and changes nothing
  (test_two_leaders_at_once_carry_each_message_once). Of a queue with several shards it is the first
  one's leader that carries, into all of them; the others hear of its term before it takes anything
  (test_a_superseded_carrier_puts_nothing_into_any_shard).
- between two shards' inboxes: nothing is done yet, so all comes again, and each shard knows its own
  (test_a_carrier_that_dies_between_two_shards_loses_and_doubles_nothing).
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
from collections.abc import Callable, Sequence
from typing import NamedTuple
from uuid import UUID, uuid4, uuid5

from redis.exceptions import OutOfMemoryError, RedisError

from celery_affinity.broker import Source, Taken
from celery_affinity.connection import Reachability
from celery_affinity.exceptions import ConfigurationError, ShardsError
from celery_affinity.scripts import Scripts

__all__ = ("Carrier", "Spread", "give_back")

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


class Spread(NamedTuple):
    """How a queue is spread over several shards."""

    #: Ledger and state name of each but the first.
    others: Sequence[tuple[Scripts, str]]
    #: Says into which shard a message belongs; 0 is the first one.
    route: Callable[[bytes], int]


class Carrier:
    """Carries one affinity queue's messages while its process leads; a thread for each term.

    Arguments:
        connect: Opens the broker's side.
        spread: The queue's further shards, if it has some.

    Does not: read messages, but for their tag where there are shards; that is intake's.
    """

    def __init__(
        self,
        scripts: Scripts,
        state: str,
        name: str,
        connect: Callable[[], Source],
        spread: Spread | None = None,
    ) -> None:
        self._scripts = scripts
        self._state = state
        self._name = name
        self._shards = [(scripts, state), *(spread.others if spread else ())]
        self._spread = spread
        self._connect = connect
        self._over = threading.Event()
        self._refused: threading.Event | None = None
        self._thread: threading.Thread | None = None
        self._reachability = Reachability(logger, f"tasks of {name!r}", "The broker or the ledger")
        self._full = False

    def begin(self, fence: str) -> None:
        """A term has begun: carry until `end`."""
        self.end()
        self._over = threading.Event()
        self._thread = threading.Thread(
            target=self._run_after,
            args=(self._thread, fence, self._over),
            name=f"affinity-carrier-{self._state}",
            daemon=True,
        )
        self._thread.start()

    def end(self) -> None:
        """The term is over. Does not wait: what is still under way is refused by carry.lua."""
        self._over.set()

    @property
    def was_refused(self) -> bool:
        """Whether a ledger said that this term is over: that of the first shard, or one of another,
        which has heard of a later one (the first one's is of an older copy).
        """
        return self._refused is self._over

    def _run_after(
        self, before: threading.Thread | None, fence: str, over: threading.Event
    ) -> None:
        if before is not None:
            before.join()
        self.run(fence, over)

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
                if source is None:
                    self._announce(fence)
                    source = self._connect()
                if time.monotonic() - swept >= SWEEP_SECONDS:
                    sweep(self._scripts, self._state, source)
                    swept = time.monotonic()
                taken = source.take(BATCH, WAIT_SECONDS)
                self._reachability.answered()
                if taken:
                    self._carry(fence, source, taken, over)
            except _Stopped:
                source = _closed(source)
                over.wait(RETRY_SECONDS)
            except _Over:
                self._refused = over
                over.set()
            except Exception as error:
                source = _closed(source)
                self._note(error)
                over.wait(RETRY_SECONDS)
        _closed(source)

    def _announce(self, fence: str) -> None:
        """Have all shards know that what an earlier term's carrier still sends is late."""
        for shard in range(1, len(self._shards)):
            if self._put(shard, fence, [])[0] == -1:
                raise _Over

    def _carry(self, fence: str, source: Source, taken: list[Taken], over: threading.Event) -> None:
        carried = waiting = 0
        for shard, part in routed(taken, self._spread).items():
            done, length = self._put(shard, fence, part)
            if done == -1:
                raise _Over
            if done == -2:
                raise _Stopped
            carried, waiting = carried + done, max(waiting, length)
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
            waiting = max(scripts.inbox_length(state) for scripts, state in self._shards)

    def _put(self, shard: int, fence: str, taken: list[Taken]) -> tuple[int, int]:
        """Into one shard's inbox. Returns (carried, its length) as carry.lua does."""
        scripts, state = self._shards[shard]
        term = fence.rpartition(" ")[2]
        answer = scripts.carry(
            state,
            uuid4().hex,
            term if shard else fence,
            taken,
            int(TOMBSTONE_SECONDS * 1000),
            TOMBSTONES,
            len(self._shards),
        )
        if answer[0] == -3:
            raise ShardsError(self._name, answer[1], len(self._shards))
        return answer

    def _note(self, error: Exception) -> None:
        if isinstance(error, OutOfMemoryError):
            if not self._full:
                logger.warning(
                    "The ledger's memory is full: tasks of %r wait on the broker.",
                    self._state,
                    extra={"action": "memory_full", "queue": self._state},
                )
            self._full = True
        elif isinstance(error, (OSError, RedisError, ConfigurationError)) or _is_of_a_client(error):
            self._reachability.unanswered(error)
        else:
            logger.exception(
                "Carrying %r failed; it goes on with a new connection.",
                self._state,
                extra={"action": "carry_failed", "queue": self._state},
            )


class _Stopped(Exception):
    """The queue is evacuated."""


class _Over(Exception):
    """The term is over."""


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


def give_back(scripts: Scripts, state: str, source: Source, spread: Spread | None = None) -> int:
    """Publish on the broker what an evacuation has put into lists; returns how many.

    What has arrived since, in the inboxes and on the broker, is younger: it goes behind them. (Not
    again once a part is published: what is on the broker then is that part, too.)
    """
    shards = [(scripts, state), *(spread.others if spread else ())]
    if not any(scripts.is_being_given(state) for scripts, state in shards):
        _gather(shards, source, spread)
    return sum(_publish(scripts, state, source) for scripts, state in shards)


def _publish(scripts: Scripts, state: str, source: Source) -> int:
    moved, done = 0, ""
    while True:
        name, raws = scripts.give(state, done, uuid4().hex, BATCH)
        if not name:
            return moved
        source.give_back(raws, [uuid5(UUID(name), str(at)).hex for at in range(len(raws))])
        moved += len(raws)
        done = name


def _gather(
    shards: Sequence[tuple[Scripts, str]], source: Source, spread: Spread | None
) -> None:
    """Put what is younger behind what is given back."""

    def set_aside(parts: dict[int, list[Taken]]) -> bool:
        """Whether the queue is still evacuated, in all of these shards."""
        for shard, taken in parts.items():
            scripts, state = shards[shard]
            if not scripts.set_aside(state, taken, int(TOMBSTONE_SECONDS * 1000), TOMBSTONES):
                return False
        return True

    if not set_aside({shard: [] for shard in range(len(shards))}):
        return
    if all(scripts.has_nothing_to_give(state) for scripts, state in shards):
        return
    for _ in range(100_000 // BATCH):
        younger = source.take(BATCH, WAIT_SECONDS)
        if not younger or not set_aside(routed(younger, spread)):
            return
        source.done(younger)


def routed(taken: list[Taken], spread: Spread | None) -> dict[int, list[Taken]]:
    """Messages by the shard that they belong to, in their order."""
    if spread is None:
        return {0: taken}
    found: dict[int, list[Taken]] = {}
    for one in taken:
        found.setdefault(spread.route(one.raw), []).append(one)
    return found
