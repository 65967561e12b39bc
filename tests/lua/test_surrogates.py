"""A message that Python reads and Redis' cjson does not, such as one with a Latin-1 file's name.

Intake admits it, so nothing later may fail over it.
"""

from __future__ import annotations

import pytest

from celery_affinity.message import envelope

from .conftest import Bench

#: As os.listdir gives "résumé.pdf" in Latin-1: with a lone surrogate.
NAME = b"r\xe9sum\xe9.pdf".decode("utf-8", "surrogateescape")


def push(bench: Bench, tag: str | int, one: int, **headers: object) -> None:
    named = {"id": f"{tag}-{one}", "task": "t", "identify_tag": tag, "eta": None, **headers}
    bench.push(envelope([[], {}, {}], named, {}, serializer="json", compression=None, routing_key="q"))


def test_it_is_dispatched_while_another_task_is_revoked(bench: Bench) -> None:
    bench.lead()
    node = bench.node("n")
    bench.scripts.revoke(["q"], ["another"])
    push(bench, "a", 1, file=NAME)
    push(bench, "b", 1)
    bench.admit_all()
    assert sorted(node.drain_all()) == ["a-1", "b-1"]


def test_it_follows_in_its_lease_while_another_task_is_revoked(bench: Bench) -> None:
    bench.lead()
    node = bench.node("n")
    push(bench, "a", 1)
    push(bench, "a", 2, file=NAME)
    push(bench, "a", 3)
    bench.admit_all()
    first = node.take()
    assert first.start() == 1
    bench.scripts.revoke(["q"], ["another"])
    assert first.settle() == "held"
    assert node.drain_all() == ["a-2", "a-3"]


def test_it_can_be_revoked(bench: Bench) -> None:
    bench.lead()
    node = bench.node("n")
    push(bench, "a", 1, file=NAME)
    bench.scripts.revoke(["q"], ["a-1"])
    bench.admit_all()
    (sent,) = bench.client.lrange(node.list, 0, -1)
    assert b'"affinity_revoked": true' in sent


@pytest.mark.parametrize("tag", ["a", 7, 'a"b', "a\\"])
def test_it_is_evacuated(bench: Bench, tag: str | int) -> None:
    bench.lead()
    push(bench, tag, 1, file=NAME)
    bench.admit_all()
    assert bench.scripts.evacuate("q", bench.pending, [1]) == (0, 0, 1, True)
    assert not bench.backlog(str(tag))
