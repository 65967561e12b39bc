"""Laws of what the ledger counts for those who watch it."""

from __future__ import annotations

import pytest

from .conftest import Bench

#: The first entries that are sampled (is_sampled in include/base.lua).
SAMPLED = [n for n in range(1, 40) if n * 0.6180339887 % 1 < 0.1]


def counted(bench: Bench) -> dict[str, int]:
    return {k.decode(): int(v) for k, v in bench.client.hgetall(bench.queue_key("c")).items()}


def waits(bench: Bench) -> dict[str, int]:
    return {k[5:]: n for k, n in counted(bench).items() if k.startswith("wait:")}


def test_a_lease_counts_as_warm_where_its_tag_was_last_and_as_moved_elsewhere(bench: Bench) -> None:
    node = bench.opening(1)
    assert node.drain_all() == ["a-1"]
    assert "warm" not in counted(bench), "nobody knows where a new tag was"
    bench.send("a", 2)
    bench.admit_all()
    assert node.drain_all() == ["a-2"]
    assert counted(bench)["warm"] == 1
    bench.scripts.drain("n", 10)
    bench.scripts.leave("n", 10)
    other = bench.node("m")
    bench.send("a", 3)
    bench.admit_all()
    assert other.drain_all() == ["a-3"]
    found = counted(bench)
    assert (found["warm"], found["moved"], found["leases"]) == (1, 1, 3)


def test_about_one_entry_in_ten_is_timed_from_its_backlog_to_its_start(bench: Bench) -> None:
    node = bench.opening(*range(39))
    joined = bench.client.hkeys(bench.queue_key("joined"))
    assert sorted(map(int, joined)) == SAMPLED
    node.drain_all()
    found = waits(bench)
    assert sum(n for bound, n in found.items() if bound != "sum") == len(SAMPLED)
    assert found["sum"] >= 0
    assert not bench.client.exists(bench.queue_key("joined"))


@pytest.mark.parametrize("ago, bound", [(0, "5"), (20, "25"), (700, "1000"), (10**9, "inf")])
def test_a_wait_is_counted_under_its_upper_bound(bench: Bench, ago: int, bound: str) -> None:
    node = bench.opening(*range(SAMPLED[0] - 1))
    node.drain_all()
    bench.send("a", "timed")
    bench.admit_all()
    key = bench.queue_key("joined")
    bench.client.hincrby(key, str(SAMPLED[0]), -ago)
    copy = node.take()
    assert copy.start("token") == copy.start("token") == 1
    found = waits(bench)
    assert found.pop("sum") >= ago
    # A slow machine may take it one bound up.
    bounds = ["5", "10", "25", "50", "100", "250", "500", "1000", "2500", "inf"]
    (seen, times), = found.items()
    assert times == 1, "a repeat after a lost reply counts once"
    assert bounds.index(seen) - bounds.index(bound) in (0, 1, 2)


def test_a_sampled_entry_that_never_starts_is_forgotten_with_its_entry(bench: Bench) -> None:
    node = bench.opening(*range(SAMPLED[0] - 1))
    node.drain_all()
    bench.send("a", "discarded")
    bench.admit_all()
    assert bench.client.hlen(bench.queue_key("joined")) == 1
    assert node.take().discard("settle") == 1
    assert not bench.client.exists(bench.queue_key("joined"))
    assert not waits(bench)


def test_what_comes_back_from_a_lost_worker_is_counted_and_not_timed_again(bench: Bench) -> None:
    node = bench.opening(*range(SAMPLED[0]), depth=2)
    while (copy := node.take()).stamp.entry != str(SAMPLED[0]):
        copy.run()
    copy.start()
    assert sum(waits(bench).values()) - waits(bench)["sum"] == 1
    bench.overdue("n")
    bench.scripts.rescue("q", bench.fence, 10)
    assert counted(bench)["rescued"] == 1
    other = bench.node("m")
    other.take().run()
    assert sum(waits(bench).values()) - waits(bench)["sum"] == 1


def test_a_node_that_leaves_by_itself_is_not_rescued(bench: Bench) -> None:
    bench.opening(1)
    bench.scripts.leave("n", 10)
    found = counted(bench)
    assert found["requeued"] == 1 and "rescued" not in found


def test_messages_that_are_sent_again_and_refused_copies_are_counted(bench: Bench) -> None:
    node = bench.opening(1)
    lost = node.take()
    node.beat(1)
    assert counted(bench)["resent"] == 1
    assert lost.start() == -2
    bench.scripts.refused("q")
    assert counted(bench)["refused"] == 1


def test_a_tags_place_in_the_ring_is_the_time_since_which_it_waits(bench: Bench) -> None:
    bench.lead()
    before = bench.now_ms()
    for tag in "abc":
        bench.send(tag, 1)
    bench.admit_all()
    ring = bench.client.zrange(bench.queue_key("ring"), 0, -1, withscores=True)
    assert [tag for tag, _ in ring] == [b"a", b"b", b"c"]
    assert all(before * 1000 <= place <= (bench.now_ms() + 1) * 1000 for _, place in ring)
    assert ring[0][1] < ring[1][1] < ring[2][1]


def test_a_clock_that_was_set_back_does_not_let_a_tag_pass_those_that_wait(bench: Bench) -> None:
    bench.lead()
    bench.send("early", 1)
    bench.admit_all()
    later = (bench.now_ms() + 3_600_000) * 1000
    bench.client.zadd(bench.queue_key("ring"), {"early": later})
    bench.send("late", 1)
    bench.admit_all()
    assert bench.client.zrange(bench.queue_key("ring"), 0, -1) == [b"early", b"late"]


def test_an_entry_whose_start_was_granted_is_timed_as_well(bench: Bench) -> None:
    node = bench.opening(*range(SAMPLED[0]), depth=2)
    while int((copy := node.take()).stamp.entry) < SAMPLED[0] - 1:
        copy.run()
    assert copy.start() == 1
    assert not waits(bench)
    granted = node.take()
    assert copy.settle(grant="granted?") == f"held {SAMPLED[0]}"
    assert sum(waits(bench).values()) - waits(bench)["sum"] == 1
    granted.token = "granted?"
    assert granted.settle() == "empty"
    assert not bench.client.exists(bench.queue_key("joined"))
