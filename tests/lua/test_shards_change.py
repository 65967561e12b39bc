"""Laws of a queue whose number of shards changes, and of what an earlier time has left in one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from celery_affinity import AffinityQueue
from celery_affinity.broker import Taken
from celery_affinity.carrying import Carrier, Spread
from celery_affinity.exceptions import ShardsError
from celery_affinity.intake import Intake, no_tag, shard_in
from celery_affinity.leadership import Elector
from celery_affinity.operations import Operations
from celery_affinity.rescuer import Rescuer
from celery_affinity.resharding import begin_with_shards
from celery_affinity.scheduler import Scheduler
from tests.harness import wait_until

from .test_carrying import Hub, HubSource, Idle, admit_all, admitted
from .test_leader_crashes import Doorbell, OneThread, Told
from .test_shards import NAMES, SHARDS, Shards, carry, sharded, shards
from .test_whole_queues import TAGS, System, system, three

__all__ = ("shards", "system", "three")


def check_first(three: System, shards: int) -> None:
    """What the first shard's leader does when its term begins with that number."""
    begin_with_shards(
        three.queue.model_copy(update={"shards": shards}), lambda shard: three.parts[shard].scripts
    )


def test_the_number_does_not_change_before_an_evacuation_has_given_everything_back(
    three: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever resumes with a smaller one would never look at what a further shard still has."""
    three.send(TAGS[3], 1)
    with monkeypatch.context() as patch:
        patch.setattr(Operations, "_give_back", lambda *_: None)  # it died before
        three.affinity.evacuate("q")
    third = three.parts[2]
    assert third.client.llen(third.queue_key("back")) == 1
    with pytest.raises(ShardsError):
        check_first(three, 2)
    limits = {**three.queue.parts[2].limits, "shards": 4}
    assert third.scripts.configure(third.state, third.fence, limits, {}) == -2
    three.affinity.evacuate("q")
    check_first(three, 2)
    assert third.scripts.configure(third.state, third.fence, limits, {}) == 1


def test_what_an_evacuation_of_more_shards_has_left_stopped_stops_nothing_now(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 2: evacuated. With 1: resumed. With 2 again: the second one still has its mark."""
    shards.lead()
    second = shards.benches[1]
    second.client.hset(second.queue_key("conf"), "evac", "1")
    hub = Hub()
    hub.publish(*NAMES)
    take, left = HubSource.take, iter(range(50))

    def patient(self: HubSource, *args: Any) -> Any:
        if next(left, None) is None:
            raise Idle
        return take(self, *args)

    monkeypatch.setattr(HubSource, "take", patient)
    carry(shards, hub)
    for bench in shards.benches:
        admit_all(bench)
    assert [admitted(bench) for bench in shards.benches] == sharded(NAMES)


class PatientSource(HubSource):
    """Waits for messages as a broker does."""

    def take(self, most: int, seconds: float) -> list[Taken]:
        try:
            return super().take(most, seconds)
        except Idle:
            threading.Event().wait(0.05)
            return []

    def delete(self, worker_queues: Sequence[str]) -> None:
        """None are there."""


def test_a_carrier_whose_term_a_shard_does_not_take_for_the_latest_ends_it(shards: Shards) -> None:
    """The first shard's ledger is of an older copy, and its server's clock is behind: a term has a
    smaller number than the one before. The next is above it as soon as that clock is.
    """
    first, second = shards.benches
    second.lead(shards=SHARDS)
    heard = (second.now_ms() + 2000) * 1000
    second.client.hset(second.queue_key("c"), "carrier", str(heard))
    hub = Hub()
    hub.publish(*NAMES)
    spread = Spread([(second.scripts, "q")], lambda raw: shard_in(raw, no_tag, False, SHARDS))
    scripts, rescuer = first.scripts, Rescuer(first.scripts, "q", 5.0)
    inbox = [scripts.keys.inbox("q")]
    scheduler = Scheduler(
        scripts, AffinityQueue("q", shards=SHARDS, scheduler_interval=0.1),
        Elector(scripts, "q", "leader/1", 60.0), Intake(scripts, "q", inbox, no_tag), rescuer,
        OneThread(scripts, "q", Told()), lambda lists: Doorbell(first.client, lists), inbox,
        Carrier(scripts, "q", "q", lambda: PatientSource(hub), spread),
    )  # fmt: skip
    thread = threading.Thread(target=scheduler.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: admitted(second) == sharded(NAMES)[1] or admit_all(second), 20)
    finally:
        scheduler.stop()
        thread.join(10)
