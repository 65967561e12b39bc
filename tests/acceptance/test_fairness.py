"""Fairness: how long a tag waits for its turn."""

from __future__ import annotations

from pathlib import Path

import pytest

from acceptance.support import APP, LEAN, Producer, starts_are
from harness import Cluster, wait_for_ends, wait_until
from history import History

pytestmark = pytest.mark.acceptance

HOT = 2000
CEILING_SECONDS = 2.0


def test_twenty_cold_tags_start_within_two_seconds_behind_a_hot_backlog_of_4000(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    # Two hot tags, so that both slots of the worker have one.
    for _ in range(HOT // 100):
        producer.send_each(("hot-1", "hot-2"), 100, ms=1)
    cold = [f"cold-{number}" for number in range(20)]
    producer.send_each(cold, 3, ms=1)
    cluster.worker(APP, queues="jobs", concurrency=2, extra=LEAN)
    wait_until(starts_are(history_path, 1), 40, "the first start")

    def cold_runs() -> dict[str, list[float]]:
        history = History.load(history_path)
        first = history.runs[0].start
        return {
            tag: [(run.start - first) / 1e9 for run in history.by_tag().get(tag, [])]
            for tag in cold
        }

    wait_until(lambda: all(len(starts) == 3 for starts in cold_runs().values()), what="cold tags")
    waits = sorted(starts[0] for starts in cold_runs().values())
    left = 2 * HOT - sum(run.tag.startswith("hot") for run in History.load(history_path).runs)
    print(f"cold tags started {waits[0]:.2f}-{waits[-1]:.2f} s after the first task; {left} hot left")
    assert waits[-1] <= CEILING_SECONDS
    assert left > HOT, "the backlog was still there"
    found = History.load(history_path).violations({tag: range(3) for tag in cold})
    assert not found, found[:5]


def test_a_lease_passes_on_after_its_batch(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    for _ in range(5):
        producer.send_each("abcd", 5)
    cluster.worker(APP, queues="jobs", concurrency=1, extra=LEAN, environ={"BATCH": "5"})

    wait_for_ends(history_path, producer.sent)
    history = History.load(history_path)
    history.assert_lawful(batch_limit=5)
    leases = list(history.lease_lengths().items())
    # The last tag has nobody behind it, and keeps the slot; before it every turn is a full batch.
    assert [length for _, length in leases] == [5] * 20
    assert [tag for (tag, _), _ in leases] == [*"abcd"] * 5


def test_a_lease_goes_on_while_nobody_else_waits(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    producer.send("alone", 40)
    cluster.worker(APP, queues="jobs", concurrency=2, extra=LEAN, environ={"BATCH": "5"})

    wait_for_ends(history_path, producer.sent)
    history = History.load(history_path)
    history.assert_lawful()
    assert list(history.lease_lengths().values()) == [40]
