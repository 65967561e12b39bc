"""Traces cost nothing where nobody asked for them."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

from celery_affinity import tracing
from celery_affinity.tracing import SENT_HEADER, sending_headers, spans_around


def tracer(uuid: str, args: Any, kwargs: Any, request: Any = None) -> str:
    return "ran"


def test_without_the_api_the_tracer_is_celerys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_api", None)
    assert spans_around(tracer) is tracer
    assert sending_headers({"a": 1}) == {"a": 1}


def test_without_a_provider_no_header_is_added_and_a_task_just_runs() -> None:
    assert sending_headers(None) == {}
    assert spans_around(tracer)("id", (), {}, {}) == "ran"


def test_a_context_that_the_caller_gives_goes_before_the_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    provider = TracerProvider()
    monkeypatch.setattr(tracing, "_provider", lambda: provider)
    with provider.get_tracer("test").start_as_current_span("request"):
        assert set(sending_headers(None)) == {"traceparent", SENT_HEADER}
        assert sending_headers({"traceparent": "mine"})["traceparent"] == "mine"
