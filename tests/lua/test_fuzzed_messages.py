"""No input changes the number of messages: whatever is pushed is admitted, buried or a known stray.

Messages are spoiled as bytes, as text and as structures, and mixed with good neighbours. Nothing
raises, neighbours keep their order, and what is dispatched is what was sent, with a stamp that a
worker finds.
"""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from celery_affinity.message import STAMP_HEADER, Stamp

from .conftest import Bench

BASE: dict[str, Any] = {
    "body": "W1tdLCB7fSwge31d",
    "content-encoding": "utf-8",
    "content-type": "application/json",
    "headers": {
        "id": "fuzzed", "task": "t", "identify_tag": "fuzz", "eta": None, "expires": None,
        "retries": 0, "timelimit": [None, None], "compression": None, "affinity_stamp": None,
    },
    "properties": {
        "delivery_tag": "d", "body_encoding": "base64", "priority": 0,
        "delivery_info": {"exchange": "", "routing_key": "q"},
    },
}
PATHS = [(k,) for k in BASE] + [(k, n) for k in ("headers", "properties") for n in BASE[k]]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(
        ["2026-01-01T00:00:00+00:00", "9999-12-31T23:59:59+00:00", "1 1 1 n 0 1 1 q",
         "1 -1 1 n 0 1 1 q", "gzip", "base64", "\ud800", "\x00", "{", '"headers": {"']
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def spoiled(draw: st.DrawFn) -> bytes:
    """A task message with some values replaced or removed, perhaps cut or with bytes changed."""
    message = json.loads(json.dumps(BASE))
    for path in draw(st.lists(st.sampled_from(PATHS), max_size=3, unique=True)):
        place = message
        for step in path[:-1]:
            place = place.get(step) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            continue
        if draw(st.booleans()):
            place.pop(path[-1], None)
        else:
            place[path[-1]] = draw(json_values)
    keys = draw(st.permutations(list(message)))
    separators = draw(st.sampled_from([(", ", ": "), (",", ":")]))
    raw = json.dumps({k: message[k] for k in keys}, separators=separators).encode()
    if draw(st.integers(0, 3)) == 0:
        start, end = sorted(draw(st.tuples(st.integers(0, len(raw)), st.integers(0, len(raw)))))
        raw = raw[:start] + draw(st.binary(max_size=6)) + raw[end:]
    return raw


rubbish = st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode())
TWICE = (
    b'{"headers": {"x": 1}, "body": "W10=", "content-type": "j", "properties": {"delivery_tag": "d"},'
    b' "headers": {"id": "fuzzed", "task": "t", "identify_tag": "fuzz"}}'
)


@settings(
    max_examples=200, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(bad=st.lists(spoiled() | rubbish, min_size=1, max_size=6))
@example(bad=[TWICE])
@example(bad=[b""])
def test_no_input_changes_the_number_of_messages(bench: Bench, bad: list[bytes]) -> None:
    for key in bench.client.scan_iter(match=f"{bench.scripts.keys.prefix}*", count=1000):
        bench.client.delete(key)
    bench.lead()
    node = bench.node("n")
    for number, raw in enumerate(bad):
        bench.send("neighbour", number)
        bench.push(raw)
    bench.send("neighbour", len(bad))
    bench.admit_all()
    assert not bench.client.exists(bench.pending)

    ran = []
    while raw := bench.client.lindex(node.list, -1):
        headers = json.loads(raw)["headers"]
        assert Stamp.parse(headers[STAMP_HEADER]), "a worker finds the stamp"
        ran.append(headers["id"])
        assert node.take().run() in ("held", "empty", "batch")
    neighbours = [one for one in ran if one.startswith("neighbour-")]
    assert neighbours == [f"neighbour-{number}" for number in range(len(bad) + 1)]
    counters = bench.client.hgetall(bench.queue_key("c"))
    scheduled = bench.client.zcard(bench.queue_key("eta"))
    dead = bench.dead()
    assert len(ran) == int(counters[b"admitted"]) - scheduled
    assert len(ran) + scheduled + len(dead) + int(counters.get(b"strays", 0)) == 2 * len(bad) + 1
    assert all(letter["reason"] for letter in dead)
    assert bench.client.hlen(bench.queue_key("deadm")) == len(dead)
    assert bench.client.hlen(bench.queue_key("m")) == scheduled


@settings(
    max_examples=100, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(bad=st.lists(spoiled() | rubbish, min_size=1, max_size=6))
def test_no_requeue_changes_the_number_of_messages(bench: Bench, bad: list[bytes]) -> None:
    """Requeued as it is, each is a task of its tag or stays buried."""
    from .test_dead_letters import entries, letters

    for key in bench.client.scan_iter(match=f"{bench.scripts.keys.prefix}*", count=1000):
        bench.client.delete(key)
    bench.lead()
    node = bench.node("n")
    for number, raw in enumerate(bad, 1):
        bench.push(raw)
        verdict = ("bury", b"by the test", "")
        assert bench.scripts.resolve("q", bench.fence, bench.pending, raw, verdict) == 1
        assert len(entries(bench)) == number
    requeued = letters(bench).requeue(None, None)
    assert requeued + len(entries(bench)) == len(bad)
    scheduled = bench.client.zcard(bench.queue_key("eta"))
    assert len(node.drain_all()) + scheduled == requeued
