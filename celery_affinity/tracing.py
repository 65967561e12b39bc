"""Spans of OpenTelemetry for affinity tasks: how long one waited, and that it runs.

The context travels in the message's headers, which the ledger keeps as they are. Without
opentelemetry-api, or without a tracer provider that the app has set up, nothing is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from celery_affinity import context
from celery_affinity.context import AffinityContext

try:
    from opentelemetry import propagate, trace
except ImportError:
    _api = None
else:
    _api = trace

__all__ = ("SENT_HEADER", "sending_headers", "spans_around")

#: Header with the time at which a task was sent, in ms since the epoch, where traces are on.
SENT_HEADER = "affinity_sent"

Tracer = Callable[..., Any]


def _provider() -> Any:
    """The tracer provider that the app has set up, or None."""
    if _api is None:
        return None
    found = _api.get_tracer_provider()
    return None if isinstance(found, (_api.ProxyTracerProvider, _api.NoOpTracerProvider)) else found


def sending_headers(headers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Headers of a task that is sent: those given, with the current trace unless they name one."""
    given = dict(headers or {})
    if _provider() is None:
        return given
    carrier: dict[str, Any] = {}
    propagate.inject(carrier)
    return {**carrier, **given, SENT_HEADER: time.time_ns() // 1_000_000}


def spans_around(tracer: Tracer) -> Tracer:
    """Celery's tracer of a task with spans around it, where the task runs under a lease."""
    if _api is None:
        return tracer

    def traced(uuid: str, args: Any, kwargs: Any, request: Any = None) -> Any:
        here, provider = context.current(), _provider()
        if here is None or provider is None:
            return tracer(uuid, args, kwargs, request)
        own = provider.get_tracer("celery_affinity")
        headers = request or {}
        parent = propagate.extract({k: v for k, v in headers.items() if isinstance(v, str)})
        attributes = _attributes(here, uuid)
        _waited(own, parent, headers.get(SENT_HEADER), attributes)
        with own.start_as_current_span(
            "affinity run", context=parent, kind=trace.SpanKind.CONSUMER, attributes=attributes
        ) as span:
            answer = tracer(uuid, args, kwargs, request)
            info: Any = getattr(answer, "info", None)
            if getattr(info, "state", None) == "FAILURE":
                span.set_status(trace.StatusCode.ERROR, type(info.retval).__name__)
            return answer

    return traced


def _waited(own: Any, parent: Any, sent: Any, attributes: Mapping[str, Any]) -> None:
    if not isinstance(sent, int):
        return  # by a producer without the library, or without traces
    now = time.time_ns()
    span = own.start_span(
        "affinity wait",
        context=parent,
        kind=trace.SpanKind.CONSUMER,
        attributes=attributes,
        start_time=min(now, sent * 1_000_000),  # the producer's clock may be ahead
    )
    span.end(now)


def _attributes(here: AffinityContext, task_id: str) -> dict[str, Any]:
    return {
        "messaging.system": "celery",
        "messaging.message.id": task_id,
        "messaging.destination.name": here.queue,
        "affinity.tag": here.tag,
        "affinity.epoch": here.epoch,
        "affinity.place": here.place,
        "affinity.attempt": here.attempt,
    }
