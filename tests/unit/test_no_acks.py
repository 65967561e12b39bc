"""What comes of acks and rejects of a message that kombu consumes with and without acks."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from kombu import Connection, Consumer, Queue

from celery_affinity.no_acks import settle_nothing

WAYS: dict[str, dict[str, Any]] = {"ack": {}, "reject": {}, "requeue": {}, "reject_log_error": {"requeue": True}}


@pytest.fixture(params=["memory", "redis"])
def connection(request: pytest.FixtureRequest) -> Iterator[Connection]:
    url = "memory://" if request.param == "memory" else request.getfixturevalue("server").url()
    with Connection(url) as made:
        yield made


@pytest.mark.parametrize("way", WAYS)
def test_only_what_is_consumed_with_acks_is_settled(connection: Connection, way: str) -> None:
    channel = connection.channel()
    queues = [Queue(f"{way}-acks"), Queue(f"{way}-none", no_ack=True)]
    got: list[Any] = []

    def receive(message: Any) -> None:
        settle_nothing(message)
        got.append(message)

    def drain(count: int) -> None:
        while len(got) < count:
            connection.drain_events(timeout=10)

    with Consumer(channel, queues, on_message=receive):
        for queue in queues:
            connection.Producer().publish({}, routing_key=queue.name, declare=[queue])
        drain(2)
        for message in list(got):
            log = () if way != "reject_log_error" else (None, (ConnectionError,))
            for _ in range(2 if message.delivery_info["routing_key"].endswith("none") else 1):
                getattr(message, way)(*log, **WAYS[way])
        assert len(channel.qos._dirty) == 1, "the other's tag is not kept"
        if WAYS[way] or way == "requeue":
            drain(3)
            assert got[2].delivery_info["routing_key"] == f"{way}-acks"
            got[2].ack()
        with pytest.raises(socket.timeout):
            connection.drain_events(timeout=0.3)
