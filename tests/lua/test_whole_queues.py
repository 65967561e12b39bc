"""Laws of queues with several shards: what operators see and do is what they see and do of one.

The shards' ledgers are three prefixes of one server here. (Commands go to each by its own connection,
so that several servers are the same to them: test_redis_cluster.py.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from hypothesis import given
from hypothesis import strategies as st

from celery_affinity import Affinity, AffinityQueue
from celery_affinity.embedded import Server
from celery_affinity.exceptions import OperationError, ShardsError
from celery_affinity.keys import Keys
from celery_affinity.measures import Measures
from celery_affinity.operator_scripts import OperatorScripts
from celery_affinity.resharding import begin_with_shards
from celery_affinity.scripts import Scripts
from celery_affinity.service import SchedulerService
from celery_affinity.settings import ENTRIES_A_SHARD
from celery_affinity.sharding import incarnation_in, node_of, shard_of
from celery_affinity.tag_lists import _across, _row
from celery_affinity.types import TagRecord
from celery_affinity.whole import _one_slot

from .conftest import Bench, Copy, Node

BROKER = 5
SLOTS = 6


def tags_of(shard: int) -> Iterator[str]:
    return (tag for n in range(10_000) if shard_of(tag := f"t{n}", 3) == shard)


#: Two of the first shard, one of each other.
FIRST, SECOND, THIRD = tags_of(0), tags_of(1), tags_of(2)
TAGS = [next(FIRST), next(FIRST), next(SECOND), next(THIRD)]


class Died(BaseException):
    """The operator's process is gone."""


class System:
    """A queue over so many shards, with a leader and nodes made by hand, and an app that looks."""

    def __init__(self, server: Server, namespace: str, shards: int) -> None:
        self.pending = f"{namespace}-pending"
        self.queue = AffinityQueue("q", shards=shards, pending_queue_name=self.pending)
        self.broker = server.client(BROKER)
        client = server.client()
        self.parts = [
            Bench(client, Scripts(client, Keys(namespace, part.shard)), state=part.state)
            for part in self.queue.parts
        ]
        app = Celery("shards", broker=server.url(BROKER), set_as_current=False)
        self.affinity = Affinity(
            app, queues=[self.queue], namespace=namespace, redis_url=server.url()
        )
        self.nodes: list[Node] = []
        for part, bench in zip(self.queue.parts, self.parts, strict=True):
            limits = {name: part.limits[name] for name in ("shards", "first_entry")}
            bench.lead(**limits)  # type: ignore[arg-type]

    def node(self, name: str = "n") -> None:
        """A node whose slots are dealt out to the shards."""
        for shard, bench in enumerate(self.parts):
            incarnation = incarnation_in(name, shard)
            self.nodes.append(bench.node(incarnation, SLOTS, title=name))
            for slot in range(SLOTS):
                if slot % len(self.parts) != shard:
                    bench.scripts.occupy(incarnation, slot, f"away:{slot}")

    def part_of(self, tag: str) -> Bench:
        return self.parts[shard_of(tag, len(self.parts))]

    def send(self, tag: str, *ids: object, eta: str | None = None) -> None:
        bench = self.part_of(tag)
        bench.send(tag, *ids, eta=eta)
        bench.admit_all()

    def take(self) -> dict[str, Copy]:
        """What has been dispatched, by tag."""
        return {copy.tag: copy for node in self.nodes for copy in iter(node.receive, None)}

    def drain_all(self) -> list[str]:
        return sorted(one for node in self.nodes for one in node.drain_all())

    def bury(self, *tags: str) -> None:
        for copy in self.take().values():
            assert copy.tag in tags and copy.discard("bury", "not readable") == 1

    def on_the_broker(self) -> dict[str, list[str]]:
        """Ids in the pending queue by tag, as a consumer would get them."""
        found: dict[str, list[str]] = {}
        for raw in reversed(self.broker.lrange(self.pending, 0, -1)):
            headers = json.loads(raw)["headers"]
            found.setdefault(headers["identify_tag"], []).append(headers["id"])
        return found


@pytest.fixture
def system(shared_server: Server, namespace: str) -> Iterator[Callable[[int], System]]:
    made: list[System] = []

    def make(shards: int) -> System:
        made.append(System(shared_server, f"{namespace}-{shards}", shards))
        return made[-1]

    yield make
    for one in made:
        one.broker.delete(one.pending)
        for key in one.parts[0].client.scan_iter(match="{affinity:" + namespace + "*", count=1000):
            one.parts[0].client.delete(key)


@pytest.fixture
def three(system: Callable[[int], System]) -> System:
    return system(3)


# What is read, and what is done: a story that is told of one shard and of three

Story = Callable[[System], list[Any]]


def told(system: System) -> list[Any]:
    """All that is shown, but for what is each shard's own: slots, epochs, places, numbers."""
    affinity = system.affinity
    stats = asdict(affinity.stats("q"))
    for rate in ("settled_per_second", "leases_per_second"):
        del stats[rate]
    workers = []
    for record in affinity.workers():
        slots = sorted((s.status, s.queue, s.current_identify_tag or "", s.current_batch_size) for s in record.slots)
        workers.append((record.worker_id, record.name, record.status, record.draining, record.queues, slots))
        assert 0 < record.heartbeat_left_seconds <= 60
    records = affinity.tags("q")
    assert all(slot.startswith("n:") for record in records for slot in record.slots)
    letters = [
        (letter.tag, letter.reason, letter.attempts, json.loads(letter.message)["headers"]["id"])
        for letter in affinity.dead_letters("q")
    ]
    status = affinity.status()
    return [
        stats,
        workers,
        sorted(map(plain, records)),
        sorted(map(plain, affinity.top_tags("q", 3))) if len(records) <= 3 else None,
        sorted(letters),
        [(c.who, c.what, c.queue, c.target, c.detail.replace("-1", "")) for c in affinity.changes()],
        status.warnings,
        (status.queues[0].workers, status.queues[0].busy_slots),
        [explained(affinity, tag) for tag in TAGS],
    ]


def plain(record: TagRecord) -> tuple[object, ...]:
    return record.tag, record.waiting, len(record.slots), [why.partition(":")[0] for why in record.halted]


def explained(affinity: Affinity, tag: str) -> list[Any]:
    found = affinity.explain(tag)
    holds = [
        (h.worker, h.current_batch_size, h.max_batch_size, h.task, h.task_id, h.running_seconds is None)
        for h in found.holds
    ]
    obstacles = [text.partition("dead letter")[0] for text in found.obstacles]
    return [found.queue, found.tag, holds, found.concurrency, found.waiting, bool(found.last_slot), obstacles, found.pending]


def looking(system: System) -> list[Any]:
    system.node()
    for tag in TAGS:
        system.send(tag, 1, 2, 3)
    system.send(TAGS[3], "later", eta="2100-01-01T00:00:00+00:00")
    found = [told(system)]
    copies = system.take()
    for tag in TAGS[1:]:
        assert copies[tag].start() == 1
    copies[TAGS[2]].settle()
    system.broker.lpush(system.pending, message("on-the-broker"))
    ids = [*(f"{tag}-{n}" for tag in TAGS for n in (1, 2, 3)), f"{TAGS[3]}-later", "on-the-broker", "nowhere"]
    found += [told(system), [(one, system.affinity.explain_task(one).state) for one in ids]]
    return found


def pausing(system: System) -> list[Any]:
    affinity, found = system.affinity, []
    system.node()
    for tag in TAGS:
        affinity.pause("q", tag, by="me")
        system.send(tag, 1, 2)
    found.append(told(system))
    found += [affinity.resume("q", tag, by="me") for tag in (*TAGS, "unknown")]
    found.append(told(system))
    affinity.pause("q", by="me")
    found.append(told(system))
    system.take()
    affinity.resume("q", by="me")
    return [*found, told(system), system.drain_all(), told(system)]


def steering(system: System) -> list[Any]:
    affinity, found = system.affinity, []
    for tag in TAGS:
        system.send(tag, 1, 2, 3, 4)
        system.send(tag, "later", eta="2100-01-01T00:00:00+00:00")
    system.node()
    system.node("other")
    affinity.limit("q", TAGS[2], 3, by="me")
    affinity.limit("q", TAGS[3], None, by="me")
    found += [affinity.purge("q", TAGS[0], by="me"), affinity.revoke_tag("q", TAGS[3], by="me")]
    found += [affinity.revoke_tag("q", "unknown", by="me"), affinity.purge("q", "unknown", by="me")]
    for tag in TAGS:
        affinity.move("q", tag, "other", by="me")
    system.take()
    found.append(affinity.drain("n", by="me"))
    found += [[record.draining for record in affinity.workers()]]
    try:
        affinity.move("q", TAGS[3], "n@test", by="me")
    except OperationError as error:
        found.append(str(error))
    found += [[(c.what, c.target, c.detail) for c in affinity.changes()]]
    return [*found, [explained(affinity, tag)[3] for tag in TAGS], asdict(affinity.stats("q"))["purged"]]


def dead_letters(system: System) -> list[Any]:
    affinity = system.affinity
    system.node()
    for tag in TAGS:
        system.send(tag, 1)
    system.bury(*TAGS)
    found = [told(system)]
    letters = affinity.dead_letters("q")
    assert [letter.entry for letter in letters] == sorted(letter.entry for letter in letters)
    pages = [affinity.dead_letters("q", 1)]
    while pages[-1]:
        pages.append(affinity.dead_letters("q", 1, after=pages[-1][0].entry))
    assert [page[0] for page in pages[:-1]] == letters
    by_tag = {letter.tag: letter.entry for letter in letters}
    found += [[one.tag for one in affinity.dead_letters("q", tag=tag)] for tag in TAGS]
    found += [affinity.requeue_dead("q", [by_tag[TAGS[3]], 77 * ENTRIES_A_SHARD], by="me"), told(system)]
    found += [affinity.requeue_dead("q", tag=TAGS[2], by="me"), system.drain_all()]
    for part in system.parts:  # their callers were told
        for entry, _, _ in part.scripts.untold(part.state, 10):
            part.scripts.told(part.state, part.fence, [entry], None)
    found += [affinity.purge_dead("q", [by_tag[TAGS[1]]], by="me"), told(system)]
    return [*found, affinity.purge_dead("q", by="me"), told(system)]


def evacuating(system: System) -> list[Any]:
    affinity = system.affinity
    system.node()
    for tag in TAGS:
        system.send(tag, 1, 2, 3)
    copies = system.take()
    for copy in copies.values():
        assert copy.start() == 1
    for tag in TAGS[:3]:
        copies[tag].settle()
    system.broker.lpush(system.pending, message(f"{TAGS[0]}-4"), message(f"{TAGS[3]}-4"))
    found = [asdict(affinity.evacuate("q", 0.0, by="me")), told(system), system.on_the_broker()]
    copies[TAGS[3]].settle()
    found.append(system.drain_all())
    found += [asdict(affinity.evacuate("q", 5.0, by="me")), told(system), system.on_the_broker()]
    affinity.resume("q", by="me")
    return [*found, told(system), system.on_the_broker()]


def message(name: str) -> str:
    """One on the broker, as a producer sent it."""
    bench = Bench(None, None)  # type: ignore[arg-type]
    found: list[str] = []
    bench.push = found.append  # type: ignore[method-assign, assignment]
    tag, _, one = name.rpartition("-")
    bench.send(tag, one)
    return found[0]


@pytest.mark.parametrize("story", [looking, pausing, steering, dead_letters, evacuating])
def test_what_is_seen_and_done_of_three_shards_is_what_it_is_of_one(
    system: Callable[[int], System], story: Story
) -> None:
    one, three = story(system(1)), story(system(3))
    assert len(one) == len(three)
    for step, (expected, found) in enumerate(zip(one, three, strict=True)):
        assert found == expected, f"step {step}"


# Lists of tags


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 24))
def test_a_page_of_the_rings_begins_where_the_one_before_ended(sizes: list[int], skip: int) -> None:
    rings = [[f"{at}:{place}".encode() for place in range(size)] for at, size in enumerate(sizes)]
    whole = list(_across(rings))
    first, left = _row(sizes, skip)
    assert list(_across([ring[first:] for ring in rings]))[left:] == whole[skip:]


def test_pages_of_tags_of_all_shards_follow_each_other_without_gap_or_repeat(three: System) -> None:
    tags = [f"t{n}" for n in range(20)]
    three.node()
    for tag in tags:
        three.send(tag, 1)
    running = set(three.take())
    halted = [tag for tag in tags if tag not in running][-4:]
    for tag in halted:
        three.affinity.pause("q", tag)
    pages = [three.affinity.tags("q", 3, skip=skip) for skip in range(0, 21, 3)]
    found = [record.tag for page in pages for record in page]
    assert sorted(found) == sorted(tags) and [len(page) for page in pages] == [3] * 6 + [2]
    assert set(found[: len(running)]) == running and set(found[-4:]) == set(halted)
    assert found == [record.tag for record in three.affinity.tags("q", 20)]


def test_the_longest_backlogs_are_those_of_all_shards(three: System) -> None:
    for tag, count in zip(TAGS, (40, 2, 50, 60), strict=True):
        three.send(tag, *range(count))
    found = [(record.tag, record.waiting) for record in three.affinity.top_tags("q", 4)]
    assert found == [(TAGS[3], 60), (TAGS[2], 50), (TAGS[0], 40), (TAGS[1], 2)]
    assert [record.tag for record in three.affinity.top_tags("q", 2)] == [TAGS[3], TAGS[2]]


# Nodes, letters, figures


def test_a_node_is_one_record_and_each_slot_is_told_by_the_shard_it_works_for(three: System) -> None:
    three.node()
    for tag in TAGS:
        three.send(tag, 1)
    three.parts[2].overdue("n-2", -5_000)
    (record,) = three.affinity.workers()
    assert (record.worker_id, record.name, record.queues) == ("n", "n@test", ("q",))
    assert sorted(slot.current_identify_tag or "" for slot in record.slots) == ["", "", *sorted(TAGS)]
    assert [slot.index for slot in record.slots] == list(range(SLOTS))
    assert record.heartbeat_left_seconds < -4, "the least of all shards"
    three.parts[1].scripts.occupy("n-1", 4, "an ordinary task")
    (record,) = three.affinity.workers()
    assert sum(slot.status == "running" for slot in record.slots) == 5


def test_a_slot_that_is_seen_in_two_shards_has_its_later_lease(three: System) -> None:
    """It went to another one between two looks."""
    three.node()
    three.send(TAGS[0], 1)
    three.send(TAGS[2], 1)
    (first, *_), (second, *_) = (
        [slot for slot in three.affinity._shards.ledger(shard).workers([three.queue.parts[shard]])[0].slots if slot.epoch]
        for shard in (0, 1)
    )
    assert _one_slot([first, replace(second, index=first.index)]).current_identify_tag == TAGS[2]


def test_names_of_a_node_in_its_shards_lead_back_to_it() -> None:
    assert [incarnation_in("ab-1", shard) for shard in (0, 1, 12)] == ["ab-1", "ab-1-1", "ab-1-12"]
    assert all(node_of(incarnation_in("ab-1", shard), shard) == "ab-1" for shard in range(13))


def test_a_revoke_is_noted_in_each_shard(three: System) -> None:
    ids = [f"{tag}-1" for tag in TAGS]
    three.affinity._note_revoked(ids)
    for part in three.parts:
        noted = part.client.zrange(part.scripts.keys.prefix + "revoked", 0, -1)
        assert sorted(one.decode() for one in noted) == sorted(ids)
        assert part.client.hget(part.queue_key("conf"), "revoked") == b"1"


def test_the_figures_of_a_queue_are_those_of_its_shards_together(system: Callable[[int], System]) -> None:
    found = []
    tags = [*TAGS, *(next(SECOND) for _ in range(3))]
    for one in (system(1), system(3)):
        one.node()
        for tag in tags:
            one.send(tag, *range(10))
        for copy in one.take().values():
            copy.run()
        (figures,) = Measures(one.affinity._shards).read([one.queue], top=3)
        assert [record.waiting for record in figures.top] == sorted(
            (record.waiting for record in figures.top), reverse=True
        )
        found.append(figures)
        part = one.parts[-1]
        part.client.hincrby(part.queue_key("c"), "wait:5", 7)
        part.client.hincrby(part.queue_key("c"), "wait:sum", 2000)
        (again,) = Measures(one.affinity._shards).read([one.queue])
        assert again.waits[-1][1] - figures.waits[-1][1] == 7 and again.waited - figures.waited == 2.0
    one, three = found
    for name in ("workers", "slots_a_worker", "slots_wanted", "workers_needed", "stopped"):
        assert getattr(one, name) == getattr(three, name), name
    assert one.totals["admitted"] == three.totals["admitted"] == 70
    # Four of one shard's tags have two slots here, where those of the others idle.
    assert (one.leases, one.startable) == (6, 1) and (three.leases, three.startable) == (5, 2)
    assert (one.stats.idle_slots, three.stats.idle_slots) == (0, 1)


def test_without_a_leader_of_one_shard_nobody_schedules_the_queue(three: System) -> None:
    (figures,) = Measures(three.affinity._shards).read([three.queue])
    assert figures.term is not None
    bench = three.parts[1]
    bench.client.delete(bench.queue_key("leader"))
    (figures,) = Measures(three.affinity._shards).read([three.queue])
    assert figures.term is None
    found = [finding.found for finding in three.affinity.doctor() if finding.about == "queue 'q'"]
    assert "nobody schedules shard 1 of it" in found
    assert three.affinity.leader("q") is not None, "the first one's"


def test_doctor_tells_of_a_server_once_and_of_a_shard_set_otherwise(three: System) -> None:
    bench = three.parts[2]
    bench.client.hset(bench.queue_key("conf"), "max_batch_size", 3)
    findings = three.affinity.doctor()
    assert [finding.about for finding in findings].count("Redis version") == 1
    (ledger,) = [finding for finding in findings if finding.about == "ledger"]
    assert ledger.found.endswith("3 shards") and ledger.verdict == "ok"
    told = [(one.about, one.found) for one in findings if "max_batch_size 3" in one.found]
    assert told == [("queue 'q' (shard 2)", "its leader goes by max_batch_size 3, this app declares 10")]


# Another number of shards


def test_the_number_of_shards_does_not_change_while_there_are_dead_letters(three: System) -> None:
    """A requeued one would join another shard than the rest of its tag."""
    three.node()
    three.send(TAGS[3], 1)
    three.bury(TAGS[3])
    part = three.parts[2]
    assert not part.scripts.is_empty(part.state)
    limits = {**three.queue.parts[2].limits, "shards": 4}
    assert part.scripts.configure(part.state, part.fence, limits, {}) == -2
    three.affinity.requeue_dead("q")
    three.drain_all()
    assert part.scripts.is_empty(part.state)
    assert part.scripts.configure(part.state, part.fence, limits, {}) == 1


def of_number(system: System, shards: int) -> AffinityQueue:
    return AffinityQueue("q", shards=shards, pending_queue_name=system.pending)


def another_app(system: System, shards: int) -> Affinity:
    """One that is set to another number of shards."""
    app = Celery("others", broker=system.affinity.app.conf.broker_url, set_as_current=False)
    return Affinity(
        app, queues=[of_number(system, shards)], namespace=system.affinity.settings.namespace,
        redis_url=system.affinity.settings.redis_url,
    )  # fmt: skip


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_an_app_of_another_number_of_shards_changes_and_explains_nothing(three: System, shards: int) -> None:
    """Half of an evacuation, and a pause in the wrong ledger, would pass for done."""
    three.node()
    for tag in TAGS:
        three.send(tag, 1, 2)
    other = another_app(three, shards)
    before = [bench.client.hgetall(bench.queue_key("conf")) for bench in three.parts]
    for command in (
        lambda: other.pause("q"),
        lambda: other.resume("q"),
        lambda: other.evacuate("q", 0.0),
        lambda: other.pause("q", TAGS[3]),
        lambda: other.purge("q", TAGS[3]),
        lambda: other.revoke_tag("q", TAGS[3]),
        lambda: other.limit("q", TAGS[3], 2),
        lambda: other.requeue_dead("q"),
        lambda: other.explain(TAGS[3]),
        lambda: other.explain_task("some"),
    ):
        with pytest.raises(ShardsError, match=f"set to shards={shards}, but the ledger has it over 3"):
            command()
    assert [bench.client.hgetall(bench.queue_key("conf")) for bench in three.parts] == before
    told = [finding for finding in other.doctor() if finding.verdict == "error" and "'q'" in finding.about]
    assert "Set shards=3 again" in told[0].fix


def test_what_was_set_of_tags_and_of_shards_that_are_no_more_goes_with_a_change_of_shards(three: System) -> None:
    for tag in TAGS:
        three.affinity.pause("q", tag)
        three.affinity.limit("q", tag, 3)
    three.affinity.evacuate("q", 0.0)
    scripts = {shard: bench.scripts for shard, bench in enumerate(three.parts)}
    begin_with_shards(of_number(three, 2), scripts.__getitem__)
    left = {
        (shard, name)
        for shard, bench in enumerate(three.parts)
        for name in ("halted", "hold", "set", "limits", "conf")
        if bench.client.exists(bench.queue_key(name))
    }
    assert left == {(0, "conf"), (1, "conf")}
    flags = [bench.client.hget(bench.queue_key("conf"), "evac") for bench in three.parts]
    assert [bool(flag) for flag in flags] == [True, True, False], "`resume` is the operator's"
    numbers = [bench.client.hget(bench.queue_key("c"), "term") for bench in three.parts]
    assert all(numbers), "terms only grow"


@pytest.mark.parametrize("step", [1, 2])
def test_a_change_of_shards_that_dies_half_way_is_done_by_the_next_leader(three: System, step: int) -> None:
    for tag in TAGS:
        three.affinity.pause("q", tag)
    asked: list[int] = []

    def dying(shard: int) -> OperatorScripts:
        scripts = three.parts[shard].scripts
        asked.append(shard)
        if len(asked) == 4 + step:  # the number, three looks, then one step for each
            raise Died
        return scripts  # type: ignore[return-value]

    with pytest.raises(Died):
        begin_with_shards(of_number(three, 2), dying)
    begin_with_shards(of_number(three, 2), lambda shard: three.parts[shard].scripts)
    assert not any(bench.client.exists(bench.queue_key("halted")) for bench in three.parts)


def test_a_shard_that_is_not_empty_is_not_begun_with_anew(three: System) -> None:
    three.node()
    three.affinity.pause("q", TAGS[3])
    three.send(TAGS[3], 1)
    part = three.parts[2]
    assert not part.scripts.reshape(part.state, goes=True)
    assert part.client.exists(part.queue_key("halted"))
    with pytest.raises(ShardsError):
        begin_with_shards(of_number(three, 2), lambda shard: three.parts[shard].scripts)


# Crashes


def test_nothing_of_any_shard_is_moved_while_something_runs_in_one(three: System) -> None:
    for tag in TAGS:
        three.send(tag, 1, 2)
    three.node()
    three.take()[TAGS[3]].start()
    for node in three.nodes[:2]:
        node.drain_all()
    three.send(TAGS[0], 9)
    for part in three.parts[:2]:
        part.scripts.drain(three.nodes[part is three.parts[1]].name)
    record = three.affinity.evacuate("q", 0.0)
    assert (record.moved, record.done) == (0, False) and record.running > 0
    assert all(part.scripts.is_evacuated(part.state) for part in three.parts)
    assert three.on_the_broker() == {}


@pytest.mark.parametrize("command", ["pause", "resume", "evacuate", "drain", "requeue_dead"])
def test_a_command_that_dies_between_two_shards_is_finished_by_a_repeat(
    three: System, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    affinity = three.affinity
    three.node()
    for tag in TAGS:
        three.send(tag, 1)
    three.bury(*TAGS)
    if command in ("pause", "evacuate"):
        for tag in TAGS:
            three.send(tag, 2)
        three.drain_all()
        affinity.drain("n")
        for tag in TAGS:
            three.send(tag, 3)
    if command == "resume":
        affinity.pause("q")
        affinity.evacuate("q")
    arguments = ("n",) if command == "drain" else ("q",)
    done, steps = False, 0
    while not done:
        steps += 1
        done = dies_at(steps, monkeypatch, lambda: getattr(affinity, command)(*arguments))
        stopped = [part.scripts.is_evacuated(part.state) for part in three.parts]
        assert stopped[0] or not any(stopped), "the carrier works, and a shard takes nothing in"
    assert steps > 3
    stats, (worker,) = affinity.stats("q"), affinity.workers()
    assert stats.paused == (command == "pause") and stats.evacuated == (command == "evacuate")
    assert worker.draining == (command in ("drain", "pause", "evacuate"))
    if command == "requeue_dead":
        assert (stats.dead, stats.entries) == (0, 4)
        assert three.drain_all() == sorted(f"{tag}-1" for tag in TAGS)
    if command == "evacuate":
        # A batch that was published and not struck off comes again; the ledgers take it once.
        assert {t: set(ids) for t, ids in three.on_the_broker().items()} == {
            tag: {f"{tag}-3"} for tag in TAGS
        }


def dies_at(step: int, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> bool:
    """Whether it was done before it came to that call of a script."""
    calls, stock = iter(range(1, 10_000)), OperatorScripts._call

    def call(self: OperatorScripts, name: str, *args: Any, **options: Any) -> Any:
        if next(calls) == step:
            raise Died
        return stock(self, name, *args, **options)

    with monkeypatch.context() as dying:
        dying.setattr(OperatorScripts, "_call", call)
        try:
            act()
        except Died:
            return False
    return True


def test_what_a_shard_has_already_is_not_given_back_again(three: System) -> None:
    """A carrier died between two shards' inboxes; then the queue was evacuated: each message is on the
    broker once more at the most, and the ledgers take each once."""
    for tag in TAGS:
        three.send(tag, 1)
    source = three.affinity.delivery.broker.source(three.pending)  # type: ignore[union-attr]
    three.broker.lpush(three.pending, message(f"{TAGS[0]}-2"), message(f"{TAGS[3]}-2"))
    taken = source.take(10, 1.0)
    assert len(taken) == 2
    first = three.parts[0]
    first.scripts.carry("q", "token", first.fence, taken[:1], 60_000, 100, 3)
    source.close()
    assert three.affinity.evacuate("q").done
    found = three.on_the_broker()
    assert found == {TAGS[0]: [f"{TAGS[0]}-1", f"{TAGS[0]}-2"], TAGS[1]: [f"{TAGS[1]}-1"],
                     TAGS[2]: [f"{TAGS[2]}-1"], TAGS[3]: [f"{TAGS[3]}-1", f"{TAGS[3]}-2"]}  # fmt: skip


def test_a_scheduler_shows_the_figures_of_the_queues_whose_first_shard_it_leads(three: System) -> None:
    """All of a queue by one of them, so that sums over schedulers count nothing twice."""
    settings = three.affinity.settings
    service = SchedulerService(settings, "", three.affinity.delivery, "n", lambda _: "", lambda *_: None)
    for leads, shown in (((True, True, False), ["q"]), ((False, True, True), [])):
        service._running = [(SimpleNamespace(leading=one), None) for one in leads]  # type: ignore[misc]
        assert service.led_queues == shown and service.leading
