"""Laws of the claims of periodic runs, and of messages that are admitted once."""

from __future__ import annotations

import json
from itertools import product

import pytest

from celery_affinity.keys import Keys
from celery_affinity.leadership import Elector
from celery_affinity.message import ONCE_HEADER, envelope
from celery_affinity.runs import KEPT_MICROS, Deposed, Run, Runs, run_id
from celery_affinity.scripts import Scripts

from .conftest import Bench

STATE = Keys.beat_state("shop")


def elected(bench: Bench, candidate: str) -> Elector:
    elector = Elector(bench.scripts, STATE, candidate, 60.0)
    elector.claim()
    assert elector.term, f"{candidate} was not elected"
    return elector


def runs_of(bench: Bench, elector: Elector) -> Runs:
    runs = Runs(bench.scripts, STATE, elector)
    runs.load()
    return runs


def test_a_beat_of_a_superseded_term_claims_nothing(bench: Bench) -> None:
    frozen = elected(bench, "beat/1")
    late = runs_of(bench, frozen)
    late.begin("tick", Run(1_000, "m"))
    bench.client.delete(bench.scripts.keys.queue(STATE, "leader"))
    present = runs_of(bench, elected(bench, "beat/2"))

    for what in (late.claim, late.begin):
        with pytest.raises(Deposed):
            what("tick", Run(2_000, "m"))
    with pytest.raises(Deposed):
        late.forget_all_but((), KEPT_MICROS + 2_000)
    present.load()
    assert (present.last("tick"), present.unsent("tick")) == (Run(1_000, "m"), None)


def test_a_claim_succeeds_once_and_only_from_the_last_run(bench: Bench) -> None:
    runs = runs_of(bench, elector := elected(bench, "beat/1"))
    other = runs_of(bench, elector)
    runs.begin("tick", Run(1_000, "m"))

    other.claim("tick", Run(2_000, "m"))
    assert other.unsent("tick") is None, "it did not know of the beginning"
    assert other.last("tick") == Run(1_000, "m"), "and has read it anew"
    runs.claim("tick", Run(2_000, "m"))
    assert runs.unsent("tick") == 2_000
    runs.confirm("tick", 2_000)
    other.claim("tick", Run(2_000, "m"))
    assert other.unsent("tick") is None, "that one was sent"
    assert other.last("tick") == Run(2_000, "m")
    for earlier in (1_500, 2_000):
        other.claim("tick", Run(earlier, "other"))
        assert (other.unsent("tick"), other.last("tick")) == (None, Run(2_000, "m"))


def test_a_repeated_claim_gets_the_same_answer(bench: Bench) -> None:
    fence = elected(bench, "beat/1").fence
    claim = lambda *rest: bench.scripts.claim_run(STATE, fence, "tick", *rest)  # noqa: E731
    assert [claim("", "1000 m", "begin") for _ in range(2)] == [1, 1]
    assert [claim("1000 m", "2000 m", "send") for _ in range(2)] == [1, 1]
    assert claim("2000 m", "3000 m", "send") == 0, "not while a run is unsent"
    assert bench.scripts.confirm_run(STATE, "tick", 1000) is False
    assert [bench.scripts.confirm_run(STATE, "tick", 2000) for _ in range(2)] == [True, False]
    assert claim("1000 m", "2000 m", "send") == 0, "it was sent"
    assert claim("2000 m", "3000 m", "send") == 1


def test_an_unsent_run_is_known_to_the_next_beat(bench: Bench) -> None:
    first = runs_of(bench, elector := elected(bench, "beat/1"))
    first.begin("tick", Run(1_000, "m"))
    first.claim("tick", Run(2_000, "m"))
    elector.resign()
    second = runs_of(bench, elected(bench, "beat/2"))
    assert second.unsent("tick") == 2_000
    first.confirm("tick", 2_000)
    second.load()
    assert second.unsent("tick") is None, "that it was published stays true when the term is over"


def test_records_of_entries_that_are_gone_are_dropped_after_a_while(bench: Bench) -> None:
    runs = runs_of(bench, elected(bench, "beat/1"))
    for name in ("kept", "gone"):
        runs.begin(name, Run(1_000, "m"))
        runs.claim(name, Run(2_000, "m"))
    runs.forget_all_but({"kept"}, KEPT_MICROS + 2_000)
    assert runs.names == {"kept", "gone"}
    runs.forget_all_but({"kept"}, KEPT_MICROS + 2_001)
    runs.load()
    assert runs.names == {"kept"}
    assert (runs.unsent("gone"), runs.unsent("kept")) == (None, 2_000)


def test_apps_and_namespaces_do_not_share_their_beats(bench: Bench) -> None:
    runs_of(bench, elected(bench, "beat/1")).begin("tick", Run(1_000, "m"))
    for namespace, app in ((bench.scripts.keys.namespace, "other"), ("test-periodic", "shop")):
        scripts = Scripts(bench.client, Keys(namespace))
        state = Keys.beat_state(app)
        elector = Elector(scripts, state, "beat/2", 60.0)
        elector.claim()
        assert elector.term, "its beat is elected beside"
        runs = Runs(scripts, state, elector)
        runs.load()
        assert runs.last("tick") is None
        runs.begin("tick", Run(2_000, "m"))
        for key in bench.client.scan_iter(match="{affinity:test-periodic}*"):
            bench.client.delete(key)
    assert run_id("n", "shop", "tick", 1) == run_id("n", "shop", "tick", 1)
    ids = {run_id(*one) for one in product("nN", "aA", ("tick", "tock"), (1, 2))}
    assert len(ids) == 16


def publish(bench: Bench, task_id: str, once: object, tag: str = "a") -> None:
    headers = {"id": task_id, "task": "t", "identify_tag": tag, ONCE_HEADER: once}
    bench.push(
        envelope([[], {}, {}], headers, {}, serializer="json", compression=None, routing_key="q")
    )


def test_the_same_due_entry_is_admitted_once(bench: Bench) -> None:
    bench.lead()
    node = bench.node("n")
    for once in ("run-1", "run-1", "run-2"):
        publish(bench, once, once)
    bench.send("a", "plain", "plain")
    bench.admit_all()
    assert node.drain_all() == ["run-1", "run-2", "a-plain", "a-plain"]
    publish(bench, "run-1", "run-1")
    bench.admit_all()
    assert node.drain_all() == [], "also after it has run"
    assert bench.dead() == []


def test_what_is_admitted_once_is_not_remembered_for_ever(bench: Bench) -> None:
    bench.lead()
    publish(bench, "run-1", "run-1")
    bench.admit_all()
    once = bench.queue_key("once")
    assert 0 < bench.client.ttl(once) <= 3600
    seconds, _ = bench.client.time()
    assert 3590 < bench.client.zscore(once, "run-1") / 1000 - seconds < 3610
    bench.client.zadd(once, {"old": 1, "run-1": 1})
    publish(bench, "run-2", "run-2")
    bench.admit_all()
    assert bench.client.zrange(once, 0, -1) == [b"run-2"]


def test_what_the_ledger_keeps_is_no_longer_a_message_that_is_admitted_once(bench: Bench) -> None:
    """An evacuated message comes back to the pending queue, and must not be taken for a repeat."""
    bench.lead()
    publish(bench, "run-1", "run-1")
    bench.admit_all()
    (kept,) = bench.client.hvals(bench.queue_key("m"))
    assert ONCE_HEADER not in json.loads(kept)["headers"]
    bench.push(kept)
    bench.admit_all()
    assert len(bench.backlog("a")) == 2


@pytest.mark.parametrize("odd", [None, 7, ["x"], {"a": 1}, "", "x" * 1000])
def test_an_odd_key_of_once_harms_nobody(bench: Bench, odd: object) -> None:
    bench.lead()
    node = bench.node("n")
    publish(bench, "odd", odd)
    bench.admit_all()
    assert node.drain_all() == ["odd"]
    assert bench.dead() == []
