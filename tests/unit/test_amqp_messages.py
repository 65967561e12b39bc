"""A message of RabbitMQ becomes the ledger's and one of RabbitMQ again."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

import pytest
from amqp import Message

from celery_affinity.amqp_messages import enveloped, unwrapped
from celery_affinity.message import decoded_body

HEADERS = {"id": "one", "task": "t", "identify_tag": "a", "eta": None, "retries": 0}
BODY = b'[["a", 1], {}, {}]'


def delivered(headers: dict[str, Any] | None = None, body: Any = BODY, **properties: Any) -> Message:
    message = Message(
        body, application_headers={**HEADERS, **(headers or {})}, content_type="application/json",
        content_encoding="utf-8", correlation_id="one", reply_to="r", delivery_mode=2, **properties,
    )
    message.delivery_info = {"exchange": "ex", "routing_key": "jobs", "delivery_tag": 1}
    return message


def test_the_ledger_keeps_what_the_producer_sent() -> None:
    raw, identity = enveloped(delivered(priority=3))
    message = json.loads(raw)
    assert message["headers"] == HEADERS
    assert raw.startswith(b'{"headers": {"'), "the shape that can be stamped"
    assert decoded_body(message, ["json"])[0] == ["a", 1]
    assert message["properties"]["delivery_tag"] == identity
    assert message["properties"]["priority"] == 3
    assert message["properties"]["delivery_info"] == {"exchange": "ex", "routing_key": "jobs"}


def test_what_is_relayed_is_what_was_sent_with_the_way_it_came_by() -> None:
    message = unwrapped(enveloped(delivered(expiration="60000"))[0], durable=False)
    assert message.body == BODY
    headers = dict(message.properties["application_headers"])
    assert headers.pop("affinity_route") == ["ex", "jobs"]
    assert headers == HEADERS
    assert message.properties["delivery_mode"] == 1
    assert message.properties["reply_to"] == "r"
    assert "expiration" not in message.properties, "it would expire on its way to the worker"
    assert message._serialize_properties()


def test_deliveries_of_one_message_have_one_identity_and_other_messages_another() -> None:
    _, first = enveloped(delivered())
    assert enveloped(delivered({"x-delivery-count": 1}))[1] == first
    assert enveloped(delivered({"retries": 1}))[1] != first
    assert enveloped(delivered(body=b'[["a", 2], {}, {}]'))[1] != first
    assert enveloped(delivered(message_id="m"))[1] != first


def test_what_is_given_back_is_a_message_of_its_own() -> None:
    raw, first = enveloped(delivered())
    back = unwrapped(raw, durable=True, message_id="new")
    back.delivery_info = {"exchange": "", "routing_key": "jobs", "delivery_tag": 1}
    again, second = enveloped(back)
    assert second != first
    assert json.loads(again)["headers"] == HEADERS
    assert back.properties["delivery_mode"] == 2


@pytest.mark.parametrize("odd", [b"\xff\xfe", datetime(2026, 1, 1, tzinfo=timezone.utc), {"a": b"b"}])
def test_headers_that_json_does_not_know_do_not_stop_the_carrier(odd: Any) -> None:
    raw, _ = enveloped(delivered({"odd": odd}))
    assert "odd" in json.loads(raw)["headers"]


def test_a_body_of_any_bytes_comes_through() -> None:
    body = bytes(range(256))
    assert unwrapped(enveloped(delivered(body=body))[0], durable=False).body == body
