"""Ledger -> broker, where they are not one Redis: each node publishes what it is dispatched.

The scripts put a dispatched message into the node's outbox, a list of the ledger. The node's relay
takes it from there and publishes it into the node's own queue on the broker, from which Celery's
consumer gets it as any other. So the next message that a settle has dispatched needs no scheduler.

    outbox --publish, confirmed--> worker queue --Celery's consumer--> node

Nothing is sent again by a clock while the broker is away: what is in the outbox counts as on its
way (heartbeat.lua), and so does what was published and has not arrived yet (held.py), until the
broker's connection is lost or `UNDER_WAY_SECONDS` are over
(test_while_the_broker_is_away_no_message_is_sent_again_and_again).

A worker queue that is deleted under its consumer (by the leader, when it gave up a node that comes
back) is declared again when the consumer connects anew. Celery may not notice; then the relay has
it do so (test_both_workers_given_up_while_they_start_run_again).

Crash windows:

- between publish and removal: it is published twice. Both copies have one send number; the gate
  runs one (test_a_relay_that_dies_between_publish_and_removal_doubles_no_run).
- the broker loses it, or the node dies: as any dispatched message, it is sent again by the
  heartbeat, or goes back to its tag with the rescue.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from redis import Redis

from celery_affinity.broker import Outlet, UnusableMessage
from celery_affinity.connection import Reachability
from celery_affinity.doorbell import Doorbell
from celery_affinity.held import Held
from celery_affinity.message import Stamp, stamp_of

__all__ = ("Relay",)

logger = logging.getLogger(__name__)

#: Messages that are published at once at most.
BATCH = 100
#: Seconds that one wait for a message takes at most; a stop rings.
WAIT_SECONDS = 5.0
#: Seconds before a broker or a Redis that failed is tried again.
RETRY_SECONDS = 0.5
#: Seconds after which a worker queue that is still not there is told of, again and again.
MISSING_SECONDS = 3.0


class Relay:
    """One node's relay, a thread from `start` to `stop`.

    Arguments:
        connect: Opens the broker's side.
        queue_of: The worker queue for an affinity queue's state name, or None if not served.
        held: Told of what is under way.
        unusable: Told of a message that the broker's client cannot send, and why.
        missing: Told of worker queues that have not been there for a while.

    Does not: decide what is sent again; the heartbeat's script does.
    """

    def __init__(
        self,
        client: Redis,
        outbox: str,
        connect: Callable[[], Outlet],
        queue_of: Callable[[str], str | None],
        held: Held,
        unusable: Callable[[Stamp, str], Any],
        missing: Callable[[Collection[str]], Any],
    ) -> None:
        self._client: Any = client
        self._outbox = outbox
        self._connect = connect
        self._queue_of = queue_of
        self._held = held
        self._unusable = unusable
        self._missing = missing
        self._missing_since: float | None = None
        self._stopping = threading.Event()
        self._doorbell = Doorbell(client, [outbox])
        self._thread: threading.Thread | None = None
        self._reachability = Reachability(logger, "dispatched tasks", "The broker or the ledger")

    def start(self) -> None:
        """Relay from now on."""
        self._thread = threading.Thread(target=self.run, name="affinity-relay", daemon=True)
        self._thread.start()

    def stop(self, seconds: float = 5.0) -> None:
        """Relay no more."""
        self._stopping.set()
        self._doorbell.ring()
        if self._thread is not None:
            self._thread.join(seconds)

    def delete(self, worker_queues: Sequence[str]) -> None:
        """Delete the node's queues on the broker, after `stop`."""
        outlet = self._connect()
        try:
            outlet.delete(worker_queues)
        finally:
            outlet.close()

    def run(self) -> None:
        """Relay until `stop`."""
        outlet: Outlet | None = None
        while not self._stopping.is_set():
            try:
                raws = self.waiting()
                if not raws:
                    self._doorbell.wait(WAIT_SECONDS)
                    continue
                outlet = outlet or self._connect()
                if self.relay(outlet, raws):
                    self._reachability.answered()
                else:
                    self._stopping.wait(RETRY_SECONDS)
            except Exception as error:
                if outlet is not None:
                    outlet.close()
                outlet = None
                self._reachability.unanswered(error)
                self._stopping.wait(RETRY_SECONDS)
        if outlet is not None:
            outlet.close()
        self._doorbell.close()

    def waiting(self) -> list[bytes]:
        """The oldest messages of the outbox, in their order."""
        found: list[bytes] = self._client.lrange(self._outbox, -BATCH, -1)
        return found[::-1]

    def relay(self, outlet: Outlet, raws: Sequence[bytes]) -> bool:
        """Publish these and take off the outbox what the broker has; whether that is all."""
        messages, done = self._addressed(raws)
        stamps = [stamp for stamp, _, _ in messages]
        for stamp in stamps:
            self._held.sent(stamp)
        went: list[bool] = []
        try:
            went = outlet.publish([(queue, raw) for _, queue, raw in messages])
        except UnusableMessage as error:
            stamp = stamps[error.at]
            self._unusable(stamp, str(error))
            done.append(messages[error.at][2])
        finally:
            for stamp, is_there in zip(stamps, went or [False] * len(stamps), strict=True):
                if not is_there:
                    self._held.unsent(stamp)
        published = list(zip(messages, went, strict=False))
        self._note_missing({queue for (_, queue, _), is_there in published if not is_there})
        done += [raw for (_, _, raw), is_there in published if is_there]
        if done:
            self._remove(done)
        return len(done) == len(raws)

    def _note_missing(self, queues: Collection[str]) -> None:
        now = time.monotonic()
        if not queues:
            self._missing_since = None
            return
        # Mostly Celery's consumer is about to declare it (again).
        self._reachability.unanswered(OSError("this worker's queue is not there"))
        if self._missing_since is None:
            self._missing_since = now
        elif now - self._missing_since >= MISSING_SECONDS:
            self._missing_since = now
            self._missing(queues)

    def _addressed(
        self, raws: Sequence[bytes]
    ) -> tuple[list[tuple[Stamp, str, bytes]], list[bytes]]:
        """Each with its stamp and queue; and those that have none (any more)."""
        messages, lost = [], []
        for raw in raws:
            stamp = stamp_of(raw)
            queue = self._queue_of(stamp.state) if stamp is not None else None
            if stamp is not None and queue is not None:
                messages.append((stamp, queue, raw))
            else:
                lost.append(raw)
        return messages, lost

    def _remove(self, raws: Sequence[bytes]) -> None:
        # By value: after a rescue the list may be another one by now.
        with self._client.pipeline(transaction=False) as pipe:
            for raw in raws:
                pipe.lrem(self._outbox, -1, raw)
            pipe.execute()
