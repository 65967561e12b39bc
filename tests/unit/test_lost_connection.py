"""What a worker does with a lost connection that cannot be closed: Celery's own code, a broken connection."""

from __future__ import annotations

import logging
import socket
import sys
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from celery import Celery
from celery.worker.consumer import Consumer
from kombu import Message

from celery_affinity import bootstep, internals
from celery_affinity.unreadable import survive_unreadable


class Broken:
    """As kombu's after a `collect` that stopped half way: closing it meets a channel without transport."""

    connection_errors = channel_errors = (ConnectionError,)

    def collect(self, socket_timeout: float | None = None) -> None:
        raise ConnectionError("refused")

    def close(self) -> None:
        raise AttributeError("'NoneType' object has no attribute 'hostname'")


def consumer() -> Any:
    app = Celery(set_as_current=False)
    app.conf.worker_enable_prefetch_count_reduction = False
    made = SimpleNamespace(app=app, connection=Broken())
    made.on_connection_error_after_connected = lambda error: (
        Consumer.on_connection_error_after_connected(made, error)
    )
    return made


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_a_lost_connection_that_cannot_be_closed_does_not_end_the_worker(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = consumer()
    bootstep.ConsumerStep(broken)
    connection = broken.connection
    with caplog.at_level(logging.WARNING):
        broken.on_connection_error_after_connected(ConnectionError("closed by server"))
        if broken.connection is not None:  # Celery before 5.7 leaves it to its next start
            connection.close()
    assert "could not be closed" in caplog.text and "hostname" in caplog.text


def test_a_worker_reads_messages_after_any_number_of_reconnects() -> None:
    """Each start of its consumer puts the library's handler before Celery's, not before the last one."""

    class Reading:
        connection_errors = (ConnectionError,)
        task_consumer = SimpleNamespace(channel=None, on_decode_error=None)
        got: ClassVar[list[Any]] = []

        def create_task_handler(self) -> Any:
            return self.got.append

    made: Any = Reading()
    for _ in range(2 * sys.getrecursionlimit()):
        survive_unreadable(made, SimpleNamespace())  # type: ignore[arg-type]
    message = Message(channel=SimpleNamespace())
    made.create_task_handler()(message)
    assert made.got == [message]


def test_a_consumer_without_a_connection_reconnects_as_ever() -> None:
    seen: list[Exception] = []
    made = SimpleNamespace(connection=None, on_connection_error_after_connected=seen.append)
    bootstep.ConsumerStep(made)
    error = ConnectionError("closed by server")
    made.on_connection_error_after_connected(error)
    assert seen == [error]


@pytest.mark.parametrize("queue, is_cut", [("jobs.worker.w1", True), ("another", False)])
def test_a_worker_connects_anew_for_a_queue_that_it_takes_itself_for_a_consumer_of(
    queue: str, is_cut: bool
) -> None:
    ours, brokers = socket.socketpair()
    connection = SimpleNamespace(connected=True, connection=SimpleNamespace(sock=ours))
    tasks = SimpleNamespace(consuming_from=lambda name: name == "jobs.worker.w1")
    worker = SimpleNamespace(consumer=SimpleNamespace(task_consumer=tasks, connection=connection))
    ours.setblocking(False)
    with ours, brokers:
        internals.connect_anew(worker, [queue])
        if is_cut:
            assert ours.recv(1) == b"", "its event loop reads the end of the connection"
        else:
            with pytest.raises(BlockingIOError):
                ours.recv(1)


def test_a_worker_that_is_connecting_is_left_to_it() -> None:
    consumer = SimpleNamespace(task_consumer=None, connection=None)
    for worker in (SimpleNamespace(), SimpleNamespace(consumer=consumer)):
        internals.connect_anew(worker, ["jobs.worker.w1"])
