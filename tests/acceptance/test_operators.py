"""What operators do to a running worker: add and cancel queues, grow and shrink the pool, purge."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import pytest

from acceptance.domains import APP, Domain, starts
from acceptance.support import QUICK, runs, slots, wait_for_nodes
from celery_affinity.embedded import Server
from harness import Cluster, Node, wait_for_ends, wait_until
from history import History

pytestmark = pytest.mark.acceptance


@pytest.fixture
def shop(cluster: Cluster) -> Domain:
    return Domain(cluster)


def of_queue(history_path: Path, queue: str) -> list[dict[str, Any]]:
    """The starts of a queue's tasks."""
    return [event for event in starts(history_path) if event["queue"] == queue]


def wait_for_starts(history_path: Path, count: int, queue: str = "") -> list[dict[str, Any]]:
    """Wait until so many tasks (of a queue) have started; their starts."""

    def enough() -> list[dict[str, Any]] | None:
        found = of_queue(history_path, queue) if queue else starts(history_path)
        return found if len(found) >= count else None

    return wait_until(enough, 30, f"{count} starts {queue}")  # type: ignore[return-value]


def serves(shop: Domain, *queues: str, node: str = "w1") -> None:
    """Wait until the ledger knows that a node serves just these queues."""

    def found() -> bool:
        return any(
            worker.name == f"{node}@{shop.name}" and set(worker.queues) == set(queues)
            for worker in shop.affinity.workers()
        )

    wait_until(found, 30, f"{node} to serve {queues}")


# add_consumer, cancel_consumer, -X


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_queue_that_is_added_at_run_time_is_served_like_those_of_the_start(
    shop: Domain, history_path: Path, pool: str
) -> None:
    worker = shop.worker(queues=[shop.invoices], pool=pool)
    shop.send(shop.invoices, "a", 3)
    wait_for_ends(history_path, 3)  # its processes are up, and know one served queue
    shop.send(shop.reports, "a", 20)

    assert shop.ask("add_consumer", worker, queue=shop.reports) == {"ok": f"add consumer {shop.reports}"}

    wait_for_ends(history_path, 23)
    serves(shop, shop.invoices, shop.reports)
    assert len(of_queue(history_path, shop.reports)) == 20, "the tasks know their queue's name"
    consumed = shop.consumed(worker)
    assert [name.split(".")[0] for name in consumed] == [shop.invoices, shop.reports]
    assert not {shop.invoices, shop.reports} & set(consumed), "never the pending queues"
    History.load(history_path).assert_lawful()


def test_a_cancelled_queue_gives_back_what_has_not_started_and_its_running_task_ends(
    shop: Domain, history_path: Path, tmp_path: Path
) -> None:
    worker = shop.worker(queues=[shop.invoices, shop.reports], concurrency=2)
    wait_for_nodes(shop.affinity, 1)
    go_on = tmp_path / "go on"
    shop.send(shop.reports, "a", 5, until=go_on)
    wait_for_starts(history_path, 1)
    own_queue = next(name for name in shop.consumed(worker) if name.startswith(shop.reports))

    shop.ask("cancel_consumer", worker, queue=own_queue)  # as Flower's page names it

    serves(shop, shop.invoices)
    (tag,) = shop.affinity.tags(shop.reports)
    assert tag.waiting == 4, "all but the running one are back"
    assert [name.split(".")[0] for name in shop.consumed(worker)] == [shop.invoices]
    shop.worker("w2", queues=[shop.reports])
    serves(shop, shop.reports, node="w2")
    go_on.touch()
    wait_for_ends(history_path, 5)
    assert [run.worker for run in runs(history_path)] == ["w1@shop"] + 4 * ["w2@shop"]
    shop.send(shop.reports, "b", 5)
    shop.send(shop.invoices, "b", 5)
    wait_for_ends(history_path, 15)
    assert {event["worker"] for event in of_queue(history_path, shop.invoices)} == {"w1@shop"}
    assert {event["worker"] for event in of_queue(history_path, shop.reports)[1:]} == {"w2@shop"}
    History.load(history_path).assert_lawful()


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_an_added_queue_and_a_cancelled_one_stay_so_over_a_reconnect(
    shop: Domain, history_path: Path, server: Server, pool: str
) -> None:
    worker = shop.worker(queues=[shop.invoices], pool=pool)
    wait_for_nodes(shop.affinity, 1)
    shop.ask("add_consumer", worker, queue=shop.reports)
    shop.ask("cancel_consumer", worker, queue=shop.invoices)
    serves(shop, shop.reports)

    ours = {connection.laddr.port for connection in psutil.Process().net_connections()}
    for client in server.client().client_list():
        if int(client["addr"].rpartition(":")[2]) not in ours:
            server.client().client_kill_filter(_id=client["id"])
    worker.wait_for_log("Connection to broker lost")
    wait_until(lambda: worker.log_text().count("Serving ") >= 2, what="the reconnect")
    shop.send(shop.invoices, "a", 3)
    shop.send(shop.reports, "a", 5)

    wait_for_ends(history_path, 5)
    serves(shop, shop.reports)
    assert [name.split(".")[0] for name in shop.consumed(worker)] == [shop.reports]
    assert shop.affinity.stats(shop.invoices).entries == 3
    assert not of_queue(history_path, shop.invoices)
    shop.ask("add_consumer", worker, queue=shop.invoices)
    wait_for_ends(history_path, 8)
    History.load(history_path).assert_lawful()


@pytest.mark.proves(
    "17: the ledger has forgotten a change of a node",
    "the next heartbeat tells it again",
)
def test_a_ledger_that_was_restored_from_before_a_change_is_told_again(
    shop: Domain, history_path: Path, server: Server
) -> None:
    worker = shop.worker(queues=[shop.invoices])
    wait_for_nodes(shop.affinity, 1)
    client = server.client()
    (info,) = client.keys("*:w:*:info")
    before = client.hgetall(info)
    shop.ask("add_consumer", worker, queue=shop.reports)
    serves(shop, shop.invoices, shop.reports)

    client.hset(info, mapping=before)

    serves(shop, shop.invoices, shop.reports)
    shop.send(shop.reports, "a", 3)
    wait_for_ends(history_path, 3)


def test_ordinary_tasks_of_a_queue_that_is_added_at_run_time_occupy_a_slot(
    shop: Domain, history_path: Path, tmp_path: Path
) -> None:
    worker = shop.worker(queues=[shop.invoices])
    wait_for_nodes(shop.affinity, 1)
    shop.ask("add_consumer", worker, queue=shop.ordinary)
    shop.send(shop.ordinary, "long", until=tmp_path / "go on")
    wait_for_starts(history_path, 1)

    wait_until(lambda: [slot.status for slot in slots(shop.affinity)].count("running") == 1)
    (tmp_path / "go on").touch()
    wait_until(lambda: [slot.status for slot in slots(shop.affinity)].count("running") == 0)


def test_what_cannot_be_consumed_is_refused_in_the_reply(shop: Domain) -> None:
    ordinary = shop.worker("ordinary", queues=[shop.ordinary])
    scheduler = shop.worker("scheduler", queues=[shop.ordinary], AFFINITY_ROLE="scheduler")
    worker = shop.worker("w1", queues=[shop.invoices])
    for node in (ordinary, scheduler, worker):
        node.wait_ready()

    for node, queue, reason in (
        (ordinary, shop.invoices, f"Start a worker with -Q {shop.invoices} instead"),
        (scheduler, shop.invoices, "role is 'scheduler'"),
        (worker, f"{shop.invoices}.worker.other@test.0123456789ab", "worker queue of another"),
    ):
        before = shop.consumed(node)
        assert reason in shop.ask("add_consumer", node, queue=queue)["error"]
        node.wait_for_log(f"Not consuming {queue!r}")
        assert shop.consumed(node) == before


@pytest.mark.parametrize("how", ["named in -Q", "without -Q", "without -Q, in task_queues"])
def test_an_excluded_queue_is_not_served_before_it_is_added(
    shop: Domain, history_path: Path, how: str
) -> None:
    queues = [shop.invoices, shop.reports] if how == "named in -Q" else None
    worker = shop.worker(
        queues=queues, extra=("-X", f"{shop.invoices},{shop.ordinary}"),
        DECLARED="1" if "task_queues" in how else "",
    )
    shop.send(shop.invoices, "a", 3)
    shop.send(shop.reports, "a", 3)
    wait_for_ends(history_path, 3)
    assert len(of_queue(history_path, shop.reports)) == 3
    serves(shop, shop.reports)
    consumed = shop.consumed(worker)
    assert shop.invoices not in consumed
    assert shop.ordinary not in consumed, "nor does an excluded ordinary one come back"

    shop.ask("add_consumer", worker, queue=shop.invoices)
    wait_for_ends(history_path, 6)


# The size of the pool


def children(worker: Node, count: int) -> list[int]:
    """Wait until the worker has so many pool processes; their ids."""
    wait_until(lambda: len(worker.children()) == count, 30, f"{count} pool processes")
    return worker.children()


def has_slots(shop: Domain, count: int) -> None:
    wait_until(lambda: len(slots(shop.affinity)) == count, 30, f"{count} slots")


@pytest.mark.proves(
    "45: pool_grow and pool_shrink",
    "slots follow; nothing is lost, exclusion and order hold",
)
def test_slots_follow_a_pool_that_grows_and_shrinks(
    shop: Domain, history_path: Path, tmp_path: Path
) -> None:
    worker = shop.worker(queues=[shop.invoices, shop.ordinary], concurrency=1)
    wait_for_nodes(shop.affinity, 1)
    first, second = tmp_path / "first", tmp_path / "second"
    for tag in "abc":
        shop.send(shop.invoices, tag, 4, until=first)
    wait_for_starts(history_path, 1)

    shop.ask("pool_grow", worker, n=2)

    up = wait_for_starts(history_path, 3)
    assert sorted(event["slot"] for event in up) == [0, 1, 2]
    assert all(event["slot"] == event["process_index"] for event in up), "a slot is a process"
    has_slots(shop, 3)

    shop.ask("pool_shrink", worker, n=2)  # while all of them are busy

    has_slots(shop, 1)
    assert len(worker.children()) == 3, "nobody's task is interrupted"
    waiting = sum(tag.waiting for tag in shop.affinity.tags(shop.invoices))
    assert waiting == 8, "of the slots that went all comes back but what runs"
    first.touch()
    wait_for_ends(history_path, 12)
    children(worker, 1)
    wait_until(lambda: not shop.ask("stats", worker)["affinity"]["held"], what="nothing held")
    assert {event["slot"] for event in starts(history_path)[3:]} == {0}
    assert {event["attempt"] for event in starts(history_path)} == {1}

    shop.ask("pool_grow", worker, n=1)
    has_slots(shop, 2)
    for tag in "de":
        shop.send(shop.invoices, tag, until=second)
    again = wait_for_starts(history_path, 14)[12:]
    assert {(event["slot"], event["process_index"]) for event in again} == {(0, 0), (1, 1)}
    second.touch()
    for number in range(4):
        shop.send(shop.ordinary, f"o{number}", until=tmp_path / "third")
    assert len({event["process_index"] for event in wait_for_starts(history_path, 16)[14:]}) == 2
    (tmp_path / "third").touch()
    wait_for_ends(history_path, shop.sent)
    History.load(history_path).assert_lawful()


def test_a_pool_that_shrinks_and_grows_again_keeps_its_slots_without_gaps(
    shop: Domain, history_path: Path, tmp_path: Path
) -> None:
    worker = shop.worker(queues=[shop.invoices], concurrency=4)
    wait_for_nodes(shop.affinity, 1)
    files = [tmp_path / f"go on {number}" for number in range(4)]
    for number, file in enumerate(files):
        shop.send(shop.invoices, f"t{number}", until=file)
    at = {event["slot"]: event["seq"] for event in wait_for_starts(history_path, 4)}
    assert set(at) == {0, 1, 2, 3}
    tag_in = {event["slot"]: event["tag"].rpartition("t")[2] for event in starts(history_path)}

    shop.ask("pool_shrink", worker, n=3)
    files[int(tag_in[1])].touch()  # slot 1 retires before the busy ones above it
    files[int(tag_in[2])].touch()
    children(worker, 2)
    shop.ask("pool_grow", worker, n=2)  # now slot 3 stays, 1 and 2 come back
    children(worker, 4)
    has_slots(shop, 3)
    files[int(tag_in[3])].touch()
    children(worker, 3)

    for tag in "abc":
        shop.send(shop.invoices, tag, until=tmp_path / "end")
    files[int(tag_in[0])].touch()
    last = wait_for_starts(history_path, 7)[4:]
    assert {(event["slot"], event["process_index"]) for event in last} == {(0, 0), (1, 1), (2, 2)}
    (tmp_path / "end").touch()
    wait_for_ends(history_path, 7)


def test_the_last_slot_cannot_be_taken_away(shop: Domain, history_path: Path) -> None:
    worker = shop.worker(queues=[shop.invoices], concurrency=2)
    wait_for_nodes(shop.affinity, 1)
    assert "keeps one" in shop.ask("pool_shrink", worker, n=2)["error"]
    shop.send(shop.invoices, "a")
    shop.send(shop.invoices, "b")
    wait_for_ends(history_path, 2)


@pytest.mark.proves(
    "2, 45: a process is killed while the pool shrinks",
    "its slot comes back if it stays",
)
def test_a_slot_whose_process_is_killed_while_the_pool_shrinks_comes_back_if_it_stays(
    shop: Domain, history_path: Path, tmp_path: Path
) -> None:
    worker = shop.worker(queues=[shop.invoices], concurrency=3)
    wait_for_nodes(shop.affinity, 1)
    for tag in "abc":
        shop.send(shop.invoices, tag, 2, until=tmp_path / "go on")
    pids = {event["slot"]: event["pid"] for event in wait_for_starts(history_path, 3)}
    shop.ask("pool_shrink", worker, n=1)
    has_slots(shop, 2)

    os.kill(pids[0], 9)
    os.kill(pids[2], 9)

    wait_until(lambda: not {pids[0], pids[2]} & set(worker.children()))
    again = wait_for_starts(history_path, 4)[3:]
    assert {event["slot"] for event in again} == {0}
    (tmp_path / "go on").touch()
    wait_for_ends(history_path, 6)
    children(worker, 2)
    History.load(history_path).assert_lawful(allow_rerun=True)


def test_a_gevent_pool_grows_and_shrinks(shop: Domain, history_path: Path, tmp_path: Path) -> None:
    worker = shop.worker(queues=[shop.invoices], concurrency=1, pool="gevent")
    wait_for_nodes(shop.affinity, 1)
    for tag in "abc":
        shop.send(shop.invoices, tag, 2, until=tmp_path / "go on")
    wait_for_starts(history_path, 1)
    shop.ask("pool_grow", worker, n=2)
    wait_for_starts(history_path, 3)
    shop.ask("pool_shrink", worker, n=2)
    has_slots(shop, 1)
    (tmp_path / "go on").touch()
    wait_for_ends(history_path, 6)
    assert {event["slot"] for event in starts(history_path)[3:]} == {0}
    History.load(history_path).assert_lawful()


def test_a_threads_pool_says_that_it_cannot_grow(shop: Domain, history_path: Path) -> None:
    worker = shop.worker(queues=[shop.invoices], pool="threads")
    wait_for_nodes(shop.affinity, 1)
    assert "grow" in shop.ask("pool_grow", worker, n=1)["error"]  # Celery's own answer
    assert len(slots(shop.affinity)) == 2
    shop.send(shop.invoices, "a", 5)
    wait_for_ends(history_path, 5)


@pytest.mark.proves(
    "45: autoscale",
    "a slot gets its process with its first task",
)
def test_with_autoscale_a_slot_gets_its_process_when_it_gets_a_task(
    shop: Domain, history_path: Path, tmp_path: Path
) -> None:
    worker = shop.worker(
        queues=[shop.invoices], extra=("--autoscale", "3,0"), AUTOSCALE_KEEPALIVE="1"
    )
    wait_for_nodes(shop.affinity, 1)
    assert len(slots(shop.affinity)) == 3, "what it may have"
    for tag in "abc":
        shop.send(shop.invoices, tag, until=tmp_path / "go on")
    at = {event["tag"]: event["slot"] for event in wait_for_starts(history_path, 3)}
    assert set(at.values()) == {0, 1, 2}
    (tmp_path / "go on").touch()
    wait_for_ends(history_path, 3)
    children(worker, 0)  # scaled down

    for tag in "cba":  # each goes to the slot that it had, which has no process
        shop.send(shop.invoices, tag)
        wait_for_ends(history_path, shop.sent)
    assert {event["tag"]: event["slot"] for event in starts(history_path)[3:]} == at
    assert all(event["slot"] == event["process_index"] for event in starts(history_path))
    History.load(history_path).assert_lawful()


# Purge


def test_purge_deletes_what_is_pending_and_nothing_that_was_admitted(
    shop: Domain, history_path: Path, cluster: Cluster, tmp_path: Path
) -> None:
    beat = cluster.beat(APP, environ={**QUICK, "DOMAIN": shop.name})
    shop.worker(queues=[shop.invoices], concurrency=1, AFFINITY_ROLE="worker")
    wait_for_nodes(shop.affinity, 1)
    go_on = tmp_path / "go on"
    shop.send(shop.invoices, "a", 6, until=go_on)
    wait_until(lambda: shop.affinity.stats(shop.invoices).entries == 6)
    wait_for_starts(history_path, 1)
    beat.kill9()  # nobody takes in what comes now
    for _ in range(3):
        shop.app.send_task(f"{shop.invoices}.work", ("a", 99), headers={"identify_tag": "a"},
                           queue=shop.invoices)
    assert shop.affinity.stats(shop.invoices).pending == 3

    purge = Node(
        "purge", ["-A", APP, "purge", "-f", "-Q", shop.invoices], ready="",
        environ={**cluster.environ, "DOMAIN": shop.name}, directory=tmp_path,
    )
    assert purge.wait(40) == 0

    assert "3" in purge.log_text()
    stats = shop.affinity.stats(shop.invoices)
    assert (stats.pending, stats.entries) == (0, 6)
    go_on.touch()
    wait_for_ends(history_path, 6)
    History.load(history_path).assert_lawful()
