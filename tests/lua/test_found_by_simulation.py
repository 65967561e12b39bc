"""Laws of what the simulation (tests/sim) found: lost reports, a jumping clock, a rescue cut short."""

from __future__ import annotations

import subprocess
import time
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from celery_affinity import patience as patience_module
from celery_affinity import processes
from celery_affinity.gate import Gate
from celery_affinity.held import Held
from celery_affinity.leftovers import Leftovers
from celery_affinity.message import Stamp
from celery_affinity.reporter import Reporter
from celery_affinity.rescuer import Rescuer
from celery_affinity.scripts import Scripts
from celery_affinity.watchdog import Lifeline
from harness import wait_until

from .conftest import Bench, Copy, client_ahead


class JumpingClock(Scripts):
    """Scripts of a client whose server's clock can be told to have jumped."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench.client, bench.scripts.keys)
        self.ahead = 0
        self.client = client_ahead(bench.client, lambda: self.ahead)

    def rescue(self, state: str, fence: str, budget: int, *looks: object) -> list[object]:
        """Inside of scripts the clock has not jumped."""
        return super().rescue(state, fence, budget)

    def jump(self, bench: Bench, seconds: int) -> None:
        """The clock and, as seen from it, every deadline."""
        self.ahead += seconds
        for inc in bench.client.zrange(self.keys.workers, 0, -1):
            bench.client.zincrby(self.keys.workers, -1000 * seconds, inc)


def registered(bench: Bench, name: str) -> bool:
    return bench.client.zscore(bench.scripts.keys.workers, name) is not None


@pytest.mark.proves(
    "39: Redis' clock jumps",
    "a leader elected after it gives nobody up",
)
def test_a_candidate_that_is_elected_after_a_jump_of_the_clock_gives_nobody_up(bench: Bench) -> None:
    bench.lead()
    bench.node("n", timeout_ms=5000)
    scripts = JumpingClock(bench)
    rescuer = Rescuer(scripts, "q", 5.0)
    rescuer.look()  # while somebody else leads
    scripts.jump(bench, 30)
    assert rescuer.run(bench.fence) > 0
    assert registered(bench, "n")


def test_a_leader_that_knows_nothing_of_the_time_before_gives_nobody_up_at_once(bench: Bench) -> None:
    bench.lead()
    bench.node("n", timeout_ms=5000)
    scripts = JumpingClock(bench)
    scripts.jump(bench, 30)
    assert Rescuer(scripts, "q", 5.0).run(bench.fence) > 0
    assert registered(bench, "n")


def test_a_leader_whose_clock_did_not_jump_gives_a_lost_worker_up(bench: Bench) -> None:
    bench.lead()
    bench.node("n", timeout_ms=0)
    rescuer = Rescuer(bench.scripts, "q", 0.4)
    rescuer.run(bench.fence)  # the first look: all heartbeats count as new
    bench.client.zadd(bench.scripts.keys.workers, {"n": 1})

    def is_given_up() -> bool:
        rescuer.run(bench.fence)
        return not registered(bench, "n")

    began = time.monotonic()
    wait_until(is_given_up, 5.0, what="the rescue")
    assert time.monotonic() - began > 0.3, "it has been silent for three quarters of a timeout"


def test_a_rescue_that_was_cut_off_half_way_ends_although_the_node_beats_again(bench: Bench) -> None:
    bench.lead()
    node = bench.node("n", slots=2, timeout_ms=0)
    bench.send("a", 1)
    bench.send("b", 1)
    bench.admit()
    assert bench.scripts.rescue("q", bench.fence, 1)[4] == 1, "there is more to do"
    assert node.beat(1) == (False, 0, 0), "it is given up"
    bench.scripts.register(
        "n", name="n", depth=1, slots=2, queues=[("q", 2, node.list)], junk=[], role="worker",
        timeout_ms=60_000,
    )  # fmt: skip
    while bench.scripts.rescue("q", bench.fence, 1)[0] == 1:
        pass
    assert not registered(bench, "n")
    again = bench.node("n", slots=2)
    assert sorted(again.drain_all()) == ["a-1", "b-1"]


def _beat(bench: Bench, copy: Copy, held: Held, number: int) -> tuple[bool, int, int]:
    return bench.scripts.heartbeat(copy.node.name, str(number), 0, held.names())[:3]


def test_what_a_process_had_just_taken_at_a_reconnect_is_not_taken_back_while_it_runs(
    bench: Bench,
) -> None:
    node = bench.opening(1)
    copy, held = node.take(), Held()
    held.arrived(copy.stamp, None)
    assert copy.start() == 1
    held.flushed()
    assert [_beat(bench, copy, held, n) for n in range(3)] == [(True, 0, 0)] * 3
    assert copy.settle() == "empty"


def test_what_no_process_had_taken_at_a_reconnect_is_sent_again(bench: Bench) -> None:
    node = bench.opening(1)
    copy, held = node.take(), Held()
    held.arrived(copy.stamp, None)
    held.flushed()
    assert _beat(bench, copy, held, 1) == (True, 1, 0)
    assert copy.start() == -2
    assert node.take().run() == "empty"


def test_a_refused_second_copy_does_not_end_the_report_of_the_first(bench: Bench) -> None:
    node = bench.opening(1)
    copy, held, ends = node.take(), Held(), []
    held.on_end = ends.append
    held.arrived(copy.stamp, "first")
    held.arrived(copy.stamp, "second")
    assert copy.start() == 1
    held.ended(copy.stamp, "second")  # which was refused
    assert [_beat(bench, copy, held, n) for n in range(3)] == [(True, 0, 0)] * 3
    assert (copy.settle(), ends) == ("empty", [])
    held.ended(copy.stamp, "first")
    assert (held.names(), ends) == ([], [copy.stamp])


def test_copies_that_end_after_a_reconnect_do_not_end_the_report_of_the_one_that_runs(
    bench: Bench,
) -> None:
    node = bench.opening(1)
    copy, held = node.take(), Held()
    held.arrived(copy.stamp, "first")
    held.arrived(copy.stamp, "second")
    held.accepted(copy.stamp, "first")
    assert copy.start() == 1
    held.flushed()
    held.ended(copy.stamp, "second")
    assert [_beat(bench, copy, held, n) for n in range(3)] == [(True, 0, 0)] * 3
    assert copy.settle() == "empty"
    held.ended(copy.stamp, "first")
    assert held.names() == []


def test_a_copy_behind_one_that_has_ended_is_not_taken_for_running_when_it_is_flushed() -> None:
    """It was: its slot was held back for ever when its node was given up and registered anew (60033170)."""
    stamp, held, ends = Stamp("1", "7", "1", "n", 0, 1, 1, "q"), Held(), []
    held.on_end = ends.append
    held.arrived(stamp, "runs")
    held.arrived(stamp, "waits")
    held.accepted(stamp, "runs")
    held.ended(stamp, "runs")
    held.ended(stamp, "runs")  # a time limit, then the end of its process
    assert (held.names(), held.running_slots()) == ([stamp.held], set())
    assert ends == [stamp], "its slot is free again (70021728)"
    held.flushed()
    assert (held.names(), held.running_slots()) == ([f"{stamp.held}:?"], set())


def test_a_copy_that_comes_again_after_a_reconnect_is_held_until_its_own_end(bench: Bench) -> None:
    node = bench.opening(1)
    copy, held, ends = node.take(), Held(), []
    held.on_end = ends.append
    held.arrived(copy.stamp, "thrown away by the pool")
    held.flushed()
    held.arrived(copy.stamp, "again")
    held.accepted(copy.stamp, "again")
    held.ended(copy.stamp, "again")
    assert (ends, held.running_slots()) == ([copy.stamp], set())
    assert held.names() == [f"{copy.stamp.held}:?"]


def test_two_beats_that_follow_each_other_at_once_are_no_reason_to_take_back(bench: Bench) -> None:
    node = bench.opening(1)
    copy = node.take()
    assert copy.start() == 1
    assert [node.beat(n) for n in range(5)] == [(True, 0, 0)] * 5
    assert copy.settle() == "empty"


class Away(Scripts):
    """A ledger that does not answer the first call of a script."""

    def __init__(self, bench: Bench, name: str) -> None:
        super().__init__(bench.client, bench.scripts.keys)
        self._away = {name}

    def _call(self, name: str, *args: object, lists: Any = ()) -> Any:
        if name in self._away:
            self._away.discard(name)
            raise RedisConnectionError("away")
        return super()._call(name, *args, lists=lists)


def test_a_node_whose_first_registration_failed_tells_what_has_changed_since(bench: Bench) -> None:
    bench.lead()
    everything = {
        "name": "n", "depth": 1, "slots": 1, "queues": [("q", 1, bench.pending + "-n")], "junk": [],
        "role": "worker", "timeout_ms": 60_000,
    }  # fmt: skip
    announcement = dict(everything)
    scripts = Away(bench, "register")
    reporter = Reporter(lambda: scripts, "n", lambda: announcement, 2.0, Lifeline())
    with pytest.raises(RedisConnectionError):
        reporter.register()
    announcement = {**everything, "queues": []}
    reporter.register()
    announcement = everything
    reporter._tell_changes(scripts)
    assert bench.client.zcard(bench.queue_key("idle")) == 1


def _gate(scripts: Scripts) -> Gate:
    return Gate(
        connect=lambda: scripts, refusal=str, queue_names={"q": "q"}, node="n", incarnations=["n"],
        slot=0, in_process=False, trust_seconds=5.0,
    )  # fmt: skip


@pytest.mark.parametrize("unheard", ["vacate", "occupy"])
def test_a_slot_takes_leases_again_after_an_ordinary_task_that_ended_while_redis_was_away(
    bench: Bench, unheard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience_module.time, "sleep", lambda seconds: None)
    bench.lead()
    node = bench.node("n")
    traced = _gate(Away(bench, unheard)).around(lambda *args: "ran")
    assert traced("id", (), {}, {"id": "id"}) == "ran"
    bench.send("a", 1)
    bench.admit()
    assert node.take().run() == "empty"


def test_a_process_that_could_not_announce_itself_does_so_before_its_first_task(bench: Bench) -> None:
    bench.lead()
    node = bench.node("n")
    bench.scripts.occupy("n", 0, "of the process before")
    gate = _gate(Away(bench, "process_up"))
    gate.process_up()
    gate.around(lambda *args: "ran")("id", (), {}, {"id": "id"})
    bench.send("a", 1)
    bench.admit()
    assert node.take().run() == "empty"


def test_a_slot_whose_process_died_in_an_ordinary_task_is_vacated_though_redis_was_away(bench: Bench) -> None:
    """Its successor could not say that it was new, and no task came to it (seed 130001157)."""
    bench.lead()
    node = bench.node("n")
    with subprocess.Popen(["sleep", "60"]) as process:
        stay = f"{processes.identity(process.pid)}:1a2b3c4d:5"
        bench.scripts.occupy("n", 0, stay)
        bench.send("a", 1)
        bench.admit()
        look = Leftovers("n").look
        look(bench.scripts)
        assert node.receive() is None, "its process lives"
        process.kill()
    look(bench.scripts)
    assert node.take().run() == "empty"


def test_a_process_is_known_by_when_it_started_too() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        known = processes.identity(process.pid)
        assert not processes.is_gone(known)
        assert processes.is_gone(f"{known}9"), "the number is another one's now"
        process.kill()
    assert processes.is_gone(known)
