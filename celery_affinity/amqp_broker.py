"""RabbitMQ as the broker, through kombu's py-amqp transport.

Taken with manual acks, published with confirms and as mandatory: what no queue takes comes back.
Neither connection is shared with Celery's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from amqp.exceptions import NotFound
from kombu import Queue

from celery_affinity.amqp_messages import enveloped, unwrapped
from celery_affinity.broker import OutOfSight, Taken, UnusableMessage
from celery_affinity.forks import close_in_children
from celery_affinity.topology import WorkerQueue

__all__ = ("AmqpBroker", "AmqpOutlet", "AmqpSight", "AmqpSource")

#: Messages that RabbitMQ hands out before it is told what is done.
PREFETCH = 200
#: Seconds for an answer of RabbitMQ, confirms too (while its memory alarm is on there are none).
ANSWER_SECONDS = 10.0
#: Seconds for an answer to somebody who only looks.
LOOK_SECONDS = 2.0
#: What the ids of messages begin with that an evacuation gave back: two of one id are copies.
GIVEN_BACK = "celery-affinity-"

#: Opens a kombu connection with these keyword arguments.
Connect = Callable[..., Any]


class AmqpBroker:
    """Makes the connections.

    Arguments:
        connect: Opens a kombu connection to read from; keyword arguments as `kombu.Connection`.
        pending_queue: Celery's declaration of a queue by name.
        heartbeat_seconds: After twice that RabbitMQ gives up a scheduler that it does not hear.
        expires_seconds: Seconds after which RabbitMQ deletes a worker queue without consumer.
    """

    def __init__(
        self,
        connect: Connect,
        pending_queue: Callable[[str], Queue],
        heartbeat_seconds: float,
        expires_seconds: float,
    ) -> None:
        self._connect = connect
        self._pending_queue = pending_queue
        self._heartbeat = max(2, round(heartbeat_seconds))
        self._expires = expires_seconds

    def source(self, pending: str) -> AmqpSource:
        """Connect to take from a pending queue."""
        connection = _open(self._connect, self._heartbeat)
        return AmqpSource(connection, self._pending_queue(pending), 4.0 * self._heartbeat)

    def outlet(self) -> AmqpOutlet:
        """Connect to publish into worker queues."""
        return AmqpOutlet(_open(self._connect, 0))

    def sight(self) -> AmqpSight:
        """Connect to look at pending queues."""
        return AmqpSight(_open(self._connect, 0, LOOK_SECONDS, LOOK_SECONDS))

    def worker_queue(self, name: str, before_declare: Callable[[], None] | None) -> Queue:
        """A queue that expires. Durable, as RabbitMQ 4 advises against queues that are not."""
        queue = WorkerQueue(
            name, routing_key=name, durable=True, no_ack=True, expires=self._expires
        )
        queue.before_declare = before_declare
        return queue


def _open(
    connect: Connect,
    heartbeat: int,
    seconds: float = ANSWER_SECONDS,
    connect_seconds: float | None = None,
) -> Any:
    """Connect; `connect_seconds` of None is what the app's settings say."""
    connection = connect(
        heartbeat=heartbeat,
        connect_timeout=connect_seconds,
        transport_options={
            # Ours are counted for many messages at once.
            "confirm_publish": False,
            "read_timeout": seconds,
            "write_timeout": seconds,
        },
    )
    connection.ensure_connection(
        max_retries=2, interval_start=0, interval_step=0.2, timeout=connect_seconds
    )
    close_in_children(connection.connection.sock)
    return connection


def _hang_up(connection: Any) -> None:
    try:
        connection.release()
    except Exception:
        connection.collect()


class AmqpSource:
    """Consumes one pending queue, alone.

    A leader that is frozen in another process holds what RabbitMQ has handed to it, until RabbitMQ
    gives it up. Whoever follows waits for that: the messages behind those would overtake them
    (test_messages_that_a_frozen_leader_holds_are_not_overtaken).

    Arguments:
        patience_seconds: For how long. Somebody who is no leader may consume the queue, too, such
            as a worker of plain Celery: that one is not waited for any longer.
    """

    def __init__(self, connection: Any, queue: Queue, patience_seconds: float) -> None:
        self._connection = connection
        self._queue = queue
        self._patience_seconds = patience_seconds
        self._consuming = False
        self._received: list[Taken] = []
        try:
            self._channel = connection.channel()
            self._channel.auto_decode = False
            self._channel.basic_qos(0, PREFETCH, False)
            self._bound = queue(self._channel)
            self._bound.declare()
            self._publishing: Any = None
        except Exception:
            _hang_up(connection)
            raise

    def _receive(self, message: Any) -> None:
        raw, identity = enveloped(message)
        info = message.delivery_info
        again = info.get("redelivered") or _is_given_back(message)
        self._received.append(Taken(raw, identity, bool(again), info["delivery_tag"]))

    def _consume(self) -> None:
        deadline = time.monotonic() + self._patience_seconds
        while time.monotonic() < deadline and self._others():
            self._connection.heartbeat_check()
            time.sleep(0.1)
        self._bound.consume(callback=self._receive, no_ack=False)  # type: ignore[arg-type]
        self._consuming = True

    def _others(self) -> int:
        return int(self._channel.queue_declare(self._queue.name, passive=True).consumer_count)

    def take(self, most: int, seconds: float) -> list[Taken]:
        """Wait for a message, and take what has arrived with it. The first time, wait for the end
        of others before that.
        """
        if not self._consuming:
            self._consume()
        self._connection.heartbeat_check()
        patience: float = 0.0 if self._received else seconds
        while len(self._received) < most:
            try:
                self._connection.drain_events(timeout=patience or 0.001)
            except TimeoutError:
                break
            patience = 0.0
        taken, self._received = self._received[:most], self._received[most:]
        return taken

    def done(self, taken: Sequence[Taken]) -> None:
        """Ack all these, in one go."""
        self._channel.basic_ack(taken[-1].handle, multiple=True)

    def give_back(self, raws: Sequence[bytes], identities: Sequence[str]) -> None:
        """Publish copies that are messages of their own: with another identity, due anew."""
        if self._publishing is None:
            self._publishing = _Confirmed(self._connection)
        name = self._queue.name
        messages = [
            (name, unwrapped(raw, durable=True, message_id=GIVEN_BACK + identity))
            for raw, identity in zip(raws, identities, strict=True)
        ]
        if not all(self._publishing.publish(messages)):
            raise OSError(f"queue {name!r} is not there")

    def delete(self, worker_queues: Sequence[str]) -> None:
        """Delete queues, whether they are there or not."""
        for name in worker_queues:
            self._channel.queue_delete(name)

    def close(self) -> None:
        """Hang up; what is not acked goes back to its place."""
        _hang_up(self._connection)


class AmqpOutlet:
    """Publishes into worker queues."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._publishing = _Confirmed(connection)

    def publish(self, messages: Sequence[tuple[str, bytes]]) -> list[bool]:
        """Publish all, then wait for their confirms."""
        prepared = []
        for at, (queue, raw) in enumerate(messages):
            try:
                message = unwrapped(raw, durable=False)
                message._serialize_properties()
            except Exception as error:
                raise UnusableMessage(at, error) from error
            prepared.append((queue, message))
        return self._publishing.publish(prepared)

    def delete(self, worker_queues: Sequence[str]) -> None:
        """Delete queues, whether they are there or not."""
        for name in worker_queues:
            self._publishing.channel.queue_delete(name)

    def close(self) -> None:
        """Hang up."""
        _hang_up(self._connection)


class AmqpSight:
    """Counts what waits in queues."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def waiting(self, pending: str) -> int:
        """Ask by a declaration that declares nothing."""
        channel = None
        try:
            channel = self._connection.channel()
            return int(channel.queue_declare(pending, passive=True).message_count)
        except NotFound:
            return 0  # which has closed the channel
        except Exception:
            # Hang up without a word: the broker may not answer one.
            self._connection.connection.collect()
            raise
        finally:
            if channel is not None and channel.is_open:
                channel.close()

    def find(self, pending: str, task_id: str) -> int | None:
        """RabbitMQ has no way to read a message without taking it."""
        raise OutOfSight("RabbitMQ shows nobody what waits in a queue")

    def close(self) -> None:
        """Hang up."""
        _hang_up(self._connection)


class _Confirmed:
    """A channel on which many messages are published and then confirmed together."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.channel = connection.channel()
        self.channel.confirm_select()
        self.channel.events["basic_ack"].add(self._on_ack)
        self.channel.events["basic_nack"].add(self._on_nack)
        self.channel.events["basic_return"].add(self._on_return)
        self._sent = self._acked = 0
        self._early: set[int] = set()
        self._returned: set[str] = set()
        self._refused = False

    def publish(self, messages: Sequence[tuple[str, Any]]) -> list[bool]:
        """For each (queue, message) whether a queue has it."""
        self._returned.clear()
        self._refused = False
        for queue, message in messages:
            self.channel.basic_publish(message, exchange="", routing_key=queue, mandatory=True)
            self._sent += 1
        deadline = time.monotonic() + ANSWER_SECONDS
        while self._acked < self._sent:
            self._connection.drain_events(timeout=max(0.01, deadline - time.monotonic()))
        if self._refused:
            raise OSError("RabbitMQ refused a message (nack)")
        return [queue not in self._returned for queue, _ in messages]

    def _on_ack(self, tag: int, multiple: bool) -> None:
        if multiple:
            self._acked = max(self._acked, tag)
        else:
            self._early.add(tag)
        while self._acked + 1 in self._early:
            self._acked += 1
            self._early.discard(self._acked)
        if multiple:
            self._early = {other for other in self._early if other > self._acked}

    def _on_nack(self, tag: int, multiple: bool) -> None:
        self._refused = True
        self._on_ack(tag, multiple)

    def _on_return(self, error: Exception, exchange: str, routing_key: str, message: Any) -> None:
        self._returned.add(routing_key)


def _is_given_back(message: Any) -> bool:
    return str(message.properties.get("message_id") or "").startswith(GIVEN_BACK)
