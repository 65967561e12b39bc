"""Several affinity queues in one app, several apps on one Redis: nothing is shared but slots."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from acceptance.domains import Domain, starts
from acceptance.support import keys_with, runs, wait_for_nodes
from celery_affinity.embedded import Server
from harness import Cluster, wait_for_ends, wait_until
from history import History

pytestmark = pytest.mark.acceptance

#: Celery's own: remote control and events of all apps on one broker share them.
OF_CELERY = ("_kombu.binding.celery", "_kombu.binding.reply.celery", "_kombu.binding.unacked")


def started(history_path: Path, count: int) -> None:
    """Wait until so many tasks have started."""
    wait_until(lambda: len(runs(history_path)) >= count, 40, f"{count} starts")


def test_two_apps_with_two_queues_each_share_no_key_limit_or_task(
    cluster: Cluster, history_path: Path, server: Server, tmp_path: Path
) -> None:
    shop, bank = Domain(cluster, "shop"), Domain(cluster, "bank")
    shop.worker(concurrency=4)
    bank.worker(concurrency=4, AFFINITY_TEST_QUEUE=json.dumps({"tag_concurrency": 2}))
    for domain in (shop, bank):
        wait_for_nodes(domain.affinity, 1)
    go_on = tmp_path / "go on"
    for domain in (shop, bank):
        for queue in (domain.invoices, domain.reports):
            domain.send(queue, "same", 3, until=go_on)

    started(history_path, 6)  # 1 each in the shop's, 2 each in the bank's, and all at once
    wait_until(lambda: shop.affinity.stats(shop.invoices).entries == 3)
    of_queue = Counter(event["queue"] for event in starts(history_path))
    assert of_queue == {
        shop.invoices: 1, shop.reports: 1, bank.invoices: 2, bank.reports: 2,
    }, "the same tag runs in each queue, as often as that queue allows"
    for domain, other in ((shop, bank), (bank, shop)):
        assert [worker.name for worker in domain.affinity.workers()] == [f"w1@{domain.name}"]
        assert domain.affinity.stats(domain.invoices).entries == 3
        ledger = "{affinity:" + domain.name + "}:"
        mine = keys_with(server.client(), domain.name)
        of_both = set(mine) & set(keys_with(server.client(), other.name))
        assert [key for key in of_both if not key.startswith(OF_CELERY)] == []
        assert [key for key in mine if key.startswith(ledger)]

    go_on.touch()
    for domain in (shop, bank):
        for queue in (domain.invoices, domain.reports):
            for tag in "abc":
                domain.send(queue, tag, 10, ms=2)
    wait_for_ends(history_path, shop.sent + bank.sent)
    history = History.load(history_path)
    for run in history.runs:
        assert run.worker == f"w1@{run.tag.split('-')[0]}", "no task ran in the other app"
    found = history.violations(
        concurrency={run.tag: 2 if run.tag.startswith("bank") else 1 for run in history.runs}
    )
    # Of two that were let start in order one after the other, either process may record first.
    assert [str(v) for v in found if v.kind != "order" or v.tag.startswith("shop")] == []


def test_what_is_done_to_one_queue_is_not_done_to_another(
    cluster: Cluster, history_path: Path, tmp_path: Path
) -> None:
    shop, bank = Domain(cluster, "shop"), Domain(cluster, "bank")
    for domain in (shop, bank):
        domain.worker(concurrency=2)
        wait_for_nodes(domain.affinity, 1)
    go_on = tmp_path / "go on"
    for domain in (shop, bank):
        for queue in (domain.invoices, domain.reports):
            domain.send(queue, "same", 5, until=go_on)
    started(history_path, 4)
    assert not shop.affinity.evacuate(shop.invoices, timeout=0.1).done
    go_on.touch()
    assert shop.affinity.evacuate(shop.invoices, timeout=20).done

    wait_for_ends(history_path, 17)  # all, but of the evacuated one the two that were out
    shop.send(shop.invoices, "same")
    for domain in (shop, bank):
        for queue in (domain.invoices, domain.reports):
            if queue != shop.invoices:
                domain.send(queue, "same", 3)
    wait_for_ends(history_path, 26)
    assert shop.affinity.stats(shop.invoices).evacuated
    assert shop.affinity.stats(shop.invoices).pending == 4
    counts = Counter(event["queue"] for event in starts(history_path))
    assert counts[shop.invoices] == 2
    shop.affinity.resume(shop.invoices)
    wait_for_ends(history_path, shop.sent + bank.sent)
    History.load(history_path).assert_lawful()


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("tags", [1, 4])
def test_a_nodes_queues_share_its_slots_fairly(
    cluster: Cluster, history_path: Path, slots: int, tags: int
) -> None:
    shop = Domain(cluster)
    for number in range(tags):
        shop.send(shop.invoices, f"hot-{number}", 200 // tags, ms=2)
    for number in range(tags):
        shop.send(shop.reports, f"hot-{number}", 200 // tags, ms=2)
    shop.worker(concurrency=slots)

    wait_for_ends(history_path, 400)
    History.load(history_path).assert_lawful()
    # From where both have a backlog: whichever is let in first has a start.
    first = {event["queue"]: number for number, event in reversed(list(enumerate(starts(history_path))))}
    both = starts(history_path)[max(first.values()):][:200]
    share = Counter(event["queue"] for event in both)
    print(f"{slots} slots, {tags} tags: {dict(share)}")
    assert len(both) == 200
    assert 0.35 <= share[shop.invoices] / 200 <= 0.65


def test_a_long_ordinary_task_holds_its_slot_and_no_tag(
    cluster: Cluster, history_path: Path, tmp_path: Path
) -> None:
    shop = Domain(cluster)
    shop.worker(concurrency=2)
    wait_for_nodes(shop.affinity, 1)
    go_on = tmp_path / "go on"
    for number in range(2):
        shop.send(shop.invoices, f"busy-{number}", 60, ms=20)  # no slot is free
    started(history_path, 6)
    shop.send(shop.ordinary, "long", until=go_on)
    wait_until(
        lambda: [run for run in runs(history_path) if run.tag == f"{shop.ordinary}:long"],
        what="the ordinary task",
    )
    # What its slot had been given before goes to the other one, and so do tags that come now.
    shop.send(shop.reports, "new", 5)

    wait_for_ends(history_path, 125, timeout=40)
    go_on.touch()
    wait_for_ends(history_path, 126)
    shop.send(shop.reports, "later-1", until=tmp_path / "end")
    shop.send(shop.reports, "later-2", until=tmp_path / "end")
    started(history_path, 128)
    (tmp_path / "end").touch()
    wait_for_ends(history_path, 128)
    History.load(history_path).assert_lawful()
