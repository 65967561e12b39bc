"""What is read of a message means what it means to Celery."""

from __future__ import annotations

import enum
import json
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from uuid import UUID

import pytest
from celery import Celery
from celery.worker.request import Request
from kombu import Message
from kombu.utils import json as kombu_json

from celery_affinity.message import check_readable, due_ms, envelope, tag_text

NAIVE = "2026-11-29T10:00:00.250000"


@pytest.fixture(params=["UTC", "Asia/Tokyo", "America/New_York"])
def zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The machine's time zone."""
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield request.param
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("app_zone", [None, "Europe/Berlin"])
@pytest.mark.parametrize("eta", [NAIVE, NAIVE + "Z", NAIVE + "+02:00", "2026-11-29", "20261129T1000"])
def test_a_due_time_is_read_as_a_worker_of_celery_reads_it(
    zone: str, app_zone: str | None, eta: str
) -> None:
    app = Celery("due", set_as_current=False)
    app.conf.update(enable_utc=app_zone is None, timezone=app_zone)
    headers = {"id": "1", "task": "celery.chord_unlock", "eta": eta}
    app.finalize()
    message = Message(body="[[], {}, {}]", headers=headers, content_type="application/json",
                      content_encoding="utf-8", delivery_info={}, properties={})  # fmt: skip
    celerys = Request(message, app=app, headers=headers, decoded=False).eta.timestamp()
    assert due_ms(eta) == int(celerys * 1000)


def test_a_due_time_without_an_offset_is_utc_wherever_the_machine_is(zone: str) -> None:
    moment = datetime(2026, 11, 29, 10, 0, 0, 250000, timezone.utc)
    assert due_ms(NAIVE) == int(moment.timestamp() * 1000)


@pytest.mark.parametrize("eta", ["", "soon", 5, "2026-13-01T00:00:00"])
def test_what_is_no_due_time_is_an_error(eta: object) -> None:
    with pytest.raises(ValueError):
        due_ms(eta)


class Text(str, enum.Enum):
    ACME = "acme"


class Number(int, enum.Enum):
    SEVEN = 7


class Shouting(str):
    def __str__(self) -> str:
        return self.upper() + "!"


@pytest.mark.parametrize("value", [Text.ACME, Number.SEVEN, Shouting("acme"), "acme", 7])
def test_a_tag_is_the_same_before_and_after_it_was_sent(value: object) -> None:
    assert tag_text(value) == tag_text(json.loads(json.dumps(value)))


def test_a_uuid_is_its_text() -> None:
    assert tag_text(UUID(int=5)) == "00000000-0000-0000-0000-000000000005"


def enveloped(**headers: object) -> str:
    return envelope([[], {}, {}], headers, {}, serializer="json", compression=None, routing_key="q")


def test_an_envelope_keeps_the_types_of_headers_as_kombu_does() -> None:
    mine = {"id": UUID(int=5), "at": datetime(2026, 11, 29, tzinfo=timezone.utc), "bytes": b"\x00\xff"}
    assert kombu_json.loads(enveloped(**mine))["headers"] == mine


@pytest.mark.parametrize("mark", [{"__type__": "nobody", "__value__": 1}, {"__type__": "uuid", "__value__": "zz"}])
def test_what_kombu_could_not_read_is_refused(mark: object) -> None:
    with pytest.raises(ValueError, match="kombu"):
        enveloped(mine=[mark])
    with pytest.raises(ValueError, match="kombu"):
        check_readable(json.dumps({"headers": {"mine": mark}}))
