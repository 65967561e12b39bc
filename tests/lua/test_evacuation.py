"""Laws of going back: what waits returns to the pending queue, once, whole and in order."""

from __future__ import annotations

import json
import random

import pytest

from celery_affinity.evacuation import Part, evacuate, resume
from celery_affinity.message import envelope
from celery_affinity.types import EvacuationRecord

from .conftest import Bench


def waiting(bench: Bench) -> list[int]:
    return [int(entry) for entry in bench.client.hkeys(bench.queue_key("m"))]


def part(bench: Bench) -> Part:
    return Part(bench.scripts, "q", bench.pending, lambda: waiting(bench))


def run(bench: Bench, timeout: float = 0.0) -> EvacuationRecord:
    return evacuate([part(bench)], timeout)


def written_back(bench: Bench) -> list[str]:
    """Ids in the pending queue, as a consumer would get them."""
    found = bench.client.lrange(bench.pending, 0, -1)
    return [json.loads(raw)["headers"]["id"] for raw in reversed(found)]


def test_what_waits_is_written_back_as_it_came_in_the_order_of_admission(bench: Bench) -> None:
    bench.lead()
    bench.send("a", 1, 2)
    bench.send("b", 1)
    bench.send("later", 1, eta="2100-01-01T00:00:00+00:00")
    bench.send("a", 3)
    sent = bench.client.lrange(bench.pending, 0, -1)
    bench.admit_all()
    assert bench.client.llen(bench.pending) == 0

    assert run(bench) == EvacuationRecord(moved=5, running=0, waiting=0, done=True)

    assert bench.client.lrange(bench.pending, 0, -1) == sent
    for name in ("m", "att", "eta", "ring", "stage", "held"):
        assert not bench.client.exists(bench.queue_key(name)), name
    assert bench.backlog("a") == []


def test_what_producers_have_sent_since_stays_behind_it(bench: Bench) -> None:
    bench.lead()
    bench.send("a", 1, 2)
    bench.admit_all()
    bench.send("a", 3)

    assert run(bench).done

    assert written_back(bench) == ["a-1", "a-2", "a-3"]


def test_an_evacuated_queue_takes_nothing_in_and_dispatches_nothing_before_it_resumes(
    bench: Bench,
) -> None:
    bench.lead()
    node = bench.node("n", depth=2)
    bench.send("a", 1, 2)
    bench.send("b", 1)
    bench.send("due", 1, eta="2000-01-01T00:00:00+00:00")
    assert run(bench).done
    assert bench.admit() == (-2, False)
    assert bench.scripts.promote("q", bench.fence, 10) == (0, -1, 0)
    bench.lead(candidate="leader/1")
    assert node.receive() is None

    resume([part(bench)])
    assert bench.scripts.resume("q"), "a repeat changes nothing"
    bench.admit_all()

    assert sorted(node.drain_all()) == ["a-1", "a-2", "b-1", "due-1"]


def test_what_runs_is_waited_for_and_its_retry_is_written_back_last(bench: Bench) -> None:
    node = bench.opening(1, 2)
    copy = node.take()
    assert copy.start() == 1

    assert run(bench) == EvacuationRecord(moved=0, running=1, waiting=2, done=False)
    headers = {"id": "a-1", "task": "t", "identify_tag": "a", "retries": 1}
    retry = envelope([[], {}, {}], headers, {}, serializer="json", compression=None, routing_key="q")
    assert copy.settle("done", retry, "") == "batch"
    assert node.receive() is None

    assert run(bench).moved == 2
    assert written_back(bench) == ["a-2", "a-1"]
    resume([part(bench)])
    bench.admit_all()
    assert node.drain_all() == ["a-2", "a-1"], "the slot is free again"


def test_what_a_worker_held_that_is_lost_meanwhile_is_written_back_too(bench: Bench) -> None:
    node = bench.opening(1, 2, 3, depth=2)
    assert node.take().start() == 1
    assert run(bench).running == 1

    bench.client.zadd(bench.scripts.keys.workers, {"n": 1})
    assert bench.scripts.rescue("q", bench.fence, 10)[0] == 1

    assert run(bench).moved == 3
    assert written_back(bench) == ["a-1", "a-2", "a-3"]


@pytest.mark.parametrize("seed", range(6))
def test_an_evacuation_cut_off_half_way_is_finished_by_the_next(bench: Bench, seed: int) -> None:
    """Also by two at once, each with its own old view of what waits."""
    rng = random.Random(seed)
    bench.lead()
    for number in range(40):
        bench.send(rng.choice("abc"), number)
    bench.admit_all()
    for number in range(40, 45):
        bench.send("a", number)
    views = [sorted(waiting(bench)) for _ in range(2)]
    for _ in range(rng.randrange(1, 8)):
        view = rng.choice(views)
        bench.scripts.evacuate("q", bench.pending, view[:5])
        del view[:5]
    assert written_back(bench)[:1] == ["a-40"], "consumers see nothing before all is there"

    if seed % 2:
        resume([part(bench)])
    else:
        assert run(bench).done

    ids = written_back(bench)
    assert [int(one.split("-")[1]) for one in ids] == list(range(45))
