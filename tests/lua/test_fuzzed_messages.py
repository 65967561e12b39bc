"""No input changes the number of messages: whatever is pushed is admitted, buried or a known stray.

Messages are spoiled as bytes, as text and as structures, and mixed with good neighbours. Nothing
raises, neighbours keep their order, and what is dispatched is what was sent, with a stamp that a
worker finds.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from celery_affinity.message import STAMP_HEADER, Stamp
from fuzzing import BASE, anything

from .conftest import Bench

TWICE = (
    b'{"headers": {"x": 1}, "body": "W10=", "content-type": "j", "properties": {"delivery_tag": "d"},'
    b' "headers": {"id": "fuzzed", "task": "t", "identify_tag": "fuzz"}}'
)


@settings(
    max_examples=200, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(bad=st.lists(anything, min_size=1, max_size=6))
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
@given(bad=st.lists(anything, min_size=1, max_size=6))
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


@pytest.mark.parametrize(
    "stamp", ["x", "1 -1 1 n 0 1 1 q", f"{2**63} 1 1 n 0 1 1 q", "1 1 1 n 0 1 1 other", 7]
)
def test_a_stamp_that_the_ledger_did_not_give_loses_no_message(bench: Bench, stamp: object) -> None:
    bench.lead()
    bench.send("a", 1, 2)
    forged = json.loads(json.dumps(BASE))
    forged["headers"].update(affinity_stamp=stamp, identify_tag="a")
    bench.push(json.dumps(forged))
    bench.admit_all()
    assert bench.node("n").drain_all() == ["a-1", "a-2", "fuzzed"]
