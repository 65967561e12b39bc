"""Laws of a broker that is not the ledger's Redis: the carrier and the relay on the real scripts.

The broker is a list in this process that hands out, takes acks and hands out again.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from celery_affinity.broker import Taken, UnusableMessage
from celery_affinity.carrying import TOMBSTONE_SECONDS, Carrier, give_back
from celery_affinity.held import Held
from celery_affinity.intake import Intake, no_tag
from celery_affinity.message import Stamp, envelope, stamp_of
from celery_affinity.relay import Relay
from harness import wait_until
from lua.conftest import Bench, Copy, Node
from lua.test_leader_crashes import Told, leader, pass_until_idle


class Died(BaseException):
    """The process is gone: nothing catches this."""


class Hub:
    """A broker with one pending queue, and worker queues by name."""

    def __init__(self) -> None:
        self.waiting: list[list[Any]] = []  # [raw, may have been handed out before, identity]
        self.queues: dict[str, list[bytes]] = {}
        self.deleted: list[str] = []
        self.calls = 0
        self.dies_at: int | None = None
        self.is_away = False

    def publish(self, *names: str) -> None:
        for name in names:
            raw = message(name)
            self.waiting.append([raw, False, str(hash(raw))])

    def step(self) -> None:
        """Die here if it is the time to."""
        self.calls += 1
        if self.calls == self.dies_at:
            raise Died
        if self.is_away:
            raise OSError("away")

    def source(self) -> HubSource:
        self.step()
        return HubSource(self)

    def outlet(self) -> HubOutlet:
        self.step()
        return HubOutlet(self)


class HubSource:
    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.out: list[list[Any]] = []
        self.idle = threading.Event()

    def take(self, most: int, seconds: float) -> list[Taken]:
        self.hub.step()
        found, self.hub.waiting = self.hub.waiting[:2], self.hub.waiting[2:]
        self.out += found
        if not found:
            self.idle.set()
            raise Idle
        taken = [
            Taken(raw, identity, again, one) for one in found for raw, again, identity in [one]
        ]
        for one in found:
            one[1] = True
        self.hub.step()
        return taken

    def done(self, taken: Sequence[Taken]) -> None:
        self.hub.step()
        self.out = [one for one in self.out if not any(one is t.handle for t in taken)]
        self.hub.step()

    def give_back(self, raws: Sequence[bytes], identities: Sequence[str]) -> None:
        self.hub.step()
        for raw, identity in zip(raws, identities, strict=True):
            self.hub.waiting.append([raw, True, identity])
            self.hub.step()

    def delete(self, worker_queues: Sequence[str]) -> None:
        self.hub.deleted += worker_queues

    def close(self) -> None:
        self.hub.waiting = self.out + self.hub.waiting
        self.out = []


class HubOutlet:
    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def publish(self, messages: Sequence[tuple[str, bytes]]) -> list[bool]:
        self.hub.step()
        for at, (_, raw) in enumerate(messages):
            if b"unsendable" in raw:
                raise UnusableMessage(at, ValueError("unsendable"))
        for queue, raw in messages:
            if queue in self.hub.queues:
                self.hub.queues[queue].append(raw)
        return [queue in self.hub.queues for queue, _ in messages]

    def delete(self, worker_queues: Sequence[str]) -> None:
        self.hub.deleted += worker_queues

    def close(self) -> None:
        pass


class Idle(BaseException):
    """Nothing is left to carry."""


def message(name: str) -> bytes:
    tag = name.partition("-")[0]
    headers = {"id": name, "task": "t", "identify_tag": tag}
    return envelope(
        [[], {}, {}], headers, {}, serializer="json", compression=None, routing_key="q"
    ).encode()


def carry(bench: Bench, hub: Hub, fence: str | None = None) -> None:
    """Carry until nothing is left, the term is over, or it dies. A dead one's connection breaks."""
    sources: list[HubSource] = []

    def connect() -> HubSource:
        sources.append(hub.source())
        return sources[-1]

    carrier = Carrier(bench.scripts, "q", "q", connect)
    try:
        carrier.run(fence or bench.fence, threading.Event())
    except Idle:
        pass
    finally:
        for source in sources:
            source.close()


def admit_all(bench: Bench) -> None:
    intake = Intake(bench.scripts, "q", [bench.scripts.keys.inbox("q")], no_tag)
    while intake.run(bench.fence)[1]:
        pass


def admitted(bench: Bench) -> list[str]:
    """Ids of what is in the ledger, in the order of admission."""
    found = bench.client.hgetall(bench.queue_key("m"))
    return [json.loads(found[entry])["headers"]["id"] for entry in sorted(found, key=int)]


NAMES = [f"{tag}-{n}" for n in range(3) for tag in "ab"]


def test_a_message_that_is_redelivered_after_it_was_settled_is_not_admitted_again(bench: Bench) -> None:
    bench.lead()
    node = bench.node("n")
    hub = Hub()
    hub.publish("a-1", "a-2")
    hub.dies_at = 4  # connect, take, taken, then: carried, and not yet acked
    with pytest.raises(Died):
        carry(bench, hub)
    admit_all(bench)
    assert node.drain_all() == ["a-1", "a-2"], "they have run before the broker has an ack"

    hub.publish("a-3")
    carry(bench, hub)
    admit_all(bench)
    assert node.drain_all() == ["a-3"], "those that came again were dropped"
    assert hub.waiting == []


@pytest.mark.parametrize("step", range(1, 15))
def test_a_carrier_that_dies_between_any_two_calls_loses_and_doubles_nothing(
    bench: Bench, step: int
) -> None:
    bench.lead()
    hub = Hub()
    hub.publish(*NAMES)
    hub.dies_at = step
    with pytest.raises(Died):
        carry(bench, hub)

    bench.scripts.resign("q", bench.fence)
    bench.lead(candidate="leader/2")
    hub.dies_at = None
    carry(bench, hub)
    admit_all(bench)
    assert admitted(bench) == NAMES
    assert hub.waiting == []


def test_two_leaders_at_once_carry_each_message_once(bench: Bench) -> None:
    bench.lead()
    superseded = bench.fence
    hub = Hub()
    hub.publish(*NAMES)
    frozen = hub.source()
    taken = frozen.take(200, 0)
    bench.scripts.resign("q", superseded)
    bench.lead(candidate="leader/2")
    carry(bench, hub)  # what the frozen one has is not to be had yet

    answer = bench.scripts.carry("q", "late", superseded, taken, 60_000, 100)
    assert answer[0] == -1, "the frozen one wakes, and may carry nothing"
    frozen.close()
    carry(bench, hub)
    admit_all(bench)
    assert sorted(admitted(bench)) == sorted(NAMES)
    assert hub.waiting == []


def test_a_superseded_carrier_ends_by_itself(bench: Bench) -> None:
    bench.lead()
    superseded = bench.fence
    bench.scripts.resign("q", superseded)
    bench.lead(candidate="leader/2")
    hub = Hub()
    hub.publish(*NAMES)
    carry(bench, hub, superseded)
    assert len(hub.waiting) == len(NAMES), "all went back"
    assert bench.scripts.inbox_length("q") == 0


def test_a_term_that_follows_at_once_carries_after_the_one_before_has_given_back(bench: Bench) -> None:
    bench.lead()
    superseded = bench.fence
    hub, has_taken, go_on = Hub(), threading.Event(), threading.Event()
    hub.publish(*NAMES)

    class Slow(HubSource):
        def take(self, most: int, seconds: float) -> list[Taken]:
            if not self.hub.waiting:
                self.idle.wait(0.01)
                return []
            taken = super().take(most, seconds)
            has_taken.set()
            assert go_on.wait(20)
            return taken

    carrier = Carrier(bench.scripts, "q", "q", lambda: Slow(hub))
    carrier.begin(superseded)
    assert has_taken.wait(20)
    bench.scripts.resign("q", superseded)
    bench.lead(candidate="leader/2")
    carrier.begin(bench.fence)
    go_on.set()
    wait_until(lambda: bench.scripts.inbox_length("q") == len(NAMES), what="all in the inbox")
    carrier.end()
    admit_all(bench)
    assert admitted(bench) == NAMES


def test_a_carry_whose_reply_was_lost_gets_its_first_answer(bench: Bench) -> None:
    bench.lead()
    taken = [Taken(message("a-1"), "one", False, None)]
    first = bench.scripts.carry("q", "token", bench.fence, taken, 60_000, 100)
    assert first == (1, 1)
    assert bench.scripts.carry("q", "token", bench.fence, taken, 60_000, 100) == first
    assert bench.scripts.inbox_length("q") == 1


def test_the_same_task_sent_twice_by_its_producer_is_two_tasks(bench: Bench) -> None:
    """RabbitMQ says which message it may have handed out before; only that one can be a copy."""
    bench.lead()
    again = message("a-1")
    for token in ("first", "second"):
        bench.scripts.carry("q", token, bench.fence, [Taken(again, "same", False, None)], 60_000, 9)
    assert bench.scripts.inbox_length("q") == 2


def test_tombstones_are_bounded_by_number_and_by_time(bench: Bench) -> None:
    bench.lead()
    taken = [Taken(message(f"a-{n}"), f"i{n}", True, None) for n in range(15)]
    bench.scripts.carry("q", "t1", bench.fence, taken[:10], 60_000, 10)
    carried, before = bench.queue_key("carried"), bench.now_ms()
    wait_until(lambda: bench.now_ms() > before, what="the next millisecond")
    bench.scripts.carry("q", "t2", bench.fence, taken[10:], 60_000, 10)
    assert bench.client.zcard(carried) == 10
    assert all(bench.client.zscore(carried, f"i{n}") for n in range(10, 15)), "the newest stay"
    assert 0 < bench.client.pttl(carried) <= TOMBSTONE_SECONDS * 1000

    bench.client.zadd(carried, {"i14": bench.now_ms() - 1})
    answer = bench.scripts.carry("q", "t3", bench.fence, taken[-2:], 60_000, 10)
    assert answer[0] == 1, "i13 is known, i14 no more"


def test_while_a_queue_is_evacuated_its_messages_stay_on_the_broker(bench: Bench) -> None:
    bench.lead()
    bench.client.hset(bench.queue_key("conf"), "evac", "1")
    answer = bench.scripts.carry(
        "q", "t", bench.fence, [Taken(message("a-1"), "i", False, None)], 60_000, 10
    )
    assert answer[0] == -2 and bench.scripts.inbox_length("q") == 0


def test_what_was_carried_is_not_left_behind_when_the_broker_is_the_ledgers_redis_now(bench: Bench) -> None:
    """Settings change; or a leader could not ask whether two URLs name one server."""
    inbox = bench.scripts.keys.inbox("q")
    bench.client.lpush(inbox, message("a-1"), message("a-2"))
    bench.client.lpush(bench.pending, message("a-3"))

    pass_until_idle(leader(bench.client, bench, "leader/1", Told()))

    assert admitted(bench) == ["a-1", "a-2", "a-3"]
    assert not bench.client.exists(inbox)


def test_an_inbox_is_brought_home_in_parts_and_in_order_by_the_leader_only(bench: Bench) -> None:
    inbox = bench.scripts.keys.inbox("q")
    bench.client.lpush(inbox, "1", "2", "3")
    bench.client.lpush(bench.pending, "4")
    bench.lead(candidate="earlier/1")
    superseded = bench.fence
    bench.scripts.resign("q", superseded)
    bench.lead()
    assert bench.scripts.bring_home("q", superseded, bench.pending) == -1
    assert bench.client.llen(inbox) == 3

    assert bench.scripts._call("bring_home", "q", bench.fence, 2, lists=[bench.pending]) == 2
    assert bench.client.lrange(bench.pending, 0, -1) == [b"4", b"3", b"2"]
    assert bench.scripts.bring_home("q", bench.fence, bench.pending) == 1
    assert bench.client.lrange(bench.pending, 0, -1) == [b"4", b"3", b"2", b"1"]


class Patient(HubSource):
    """Says that nothing is left, as a broker does."""

    def take(self, most: int, seconds: float) -> list[Taken]:
        try:
            return super().take(most, seconds)
        except Idle:
            return []


def evacuated(bench: Bench, hub: Hub) -> list[str]:
    """Five messages on their way back to the hub; their ids in order."""
    back, inbox = bench.scripts.keys.back("q"), bench.scripts.keys.inbox("q")
    bench.client.hset(bench.queue_key("conf"), "evac", "1")
    bench.client.lpush(back, message("a-1"), message("a-2"))
    bench.client.lpush(inbox, message("a-3"))
    hub.publish("a-4", "a-5")
    return [f"a-{n}" for n in range(1, 6)]


def left_of_it(bench: Bench) -> list[bytes]:
    names = ("back", "inbox", "batch", "giving")
    return [name for name in map(bench.queue_key, names) if bench.client.exists(name)]


def waiting_ids(hub: Hub) -> list[str]:
    return [json.loads(raw)["headers"]["id"] for raw, _, _ in hub.waiting]


def test_what_is_evacuated_goes_back_to_the_broker_in_order(bench: Bench) -> None:
    bench.lead()
    hub = Hub()
    ids = evacuated(bench, hub)
    before = {identity for _, _, identity in hub.waiting}
    assert give_back(bench.scripts, "q", Patient(hub)) == 5
    assert waiting_ids(hub) == ids
    identities = {identity for _, _, identity in hub.waiting}
    assert len(identities) == 5 and not identities & before, "messages of their own"
    assert not left_of_it(bench)


@pytest.mark.parametrize("step", range(1, 14))
def test_an_evacuation_that_dies_between_any_two_calls_gives_each_message_back_once(
    bench: Bench, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the ledger: of copies of one identity it takes the first."""
    monkeypatch.setattr("celery_affinity.carrying.BATCH", 2)
    bench.lead()
    hub = Hub()
    ids = evacuated(bench, hub)
    hub.dies_at = step
    dying = Patient(hub)
    with pytest.raises(Died):
        give_back(bench.scripts, "q", dying)
    dying.close()
    hub.dies_at = None

    give_back(bench.scripts, "q", Patient(hub))
    assert not left_of_it(bench)
    found = waiting_ids(hub)
    assert list(dict.fromkeys(found)) == ids and len(found) <= 5 + 2, "a batch twice at the most"

    bench.client.hdel(bench.queue_key("conf"), "evac")
    carry(bench, hub)
    admit_all(bench)
    assert admitted(bench) == ids
    assert hub.waiting == []


def test_two_who_give_back_at_once_lose_nothing(bench: Bench, hub: Hub) -> None:
    bench.lead()
    ids = evacuated(bench, hub)

    class Overtaken(Patient):
        def give_back(self, raws: Sequence[bytes], identities: Sequence[str]) -> None:
            give_back(bench.scripts, "q", Patient(hub))
            super().give_back(raws, identities)

    give_back(bench.scripts, "q", Overtaken(hub))
    bench.client.hdel(bench.queue_key("conf"), "evac")
    carry(bench, hub)
    admit_all(bench)
    assert admitted(bench) == ids


def test_who_gives_back_leaves_on_the_broker_what_the_ledger_has_already(bench: Bench, hub: Hub) -> None:
    """A leader died between carrying a message and its ack, then the queue was evacuated."""
    bench.lead()
    hub.publish("a-4")
    hub.dies_at = 4
    with pytest.raises(Died):
        carry(bench, hub)
    hub.dies_at = None
    bench.client.hset(bench.queue_key("conf"), "evac", "1")
    assert bench.scripts.inbox_length("q") == 1
    give_back(bench.scripts, "q", Patient(hub))
    assert waiting_ids(hub) == ["a-4"]


def test_what_was_taken_off_the_broker_stays_there_if_the_queue_is_resumed_meanwhile(
    bench: Bench, hub: Hub
) -> None:
    taken = [Taken(message("a-1"), "i", False, None)]
    assert not bench.scripts.set_aside("q", taken, 60_000, 10)
    assert not left_of_it(bench)


def test_what_is_set_aside_stands_behind_the_inbox_each_once_also_after_a_lost_reply(bench: Bench) -> None:
    back, inbox = bench.scripts.keys.back("q"), bench.scripts.keys.inbox("q")
    bench.client.hset(bench.queue_key("conf"), "evac", "1")
    bench.client.lpush(inbox, *"abcde")
    request = ("set_aside", "q", "token", 60_000, 10, 2, "i", "", "f")
    answers = [bench.scripts._call(*request) for _ in range(4)]
    assert answers == [2, 2, 1, 1]
    assert bench.client.lrange(back, 0, -1)[::-1] == [name.encode() for name in "abcdef"]
    assert bench.scripts.set_aside("q", [Taken(b"f", "i", True, None)], 60_000, 10)
    assert bench.client.llen(back) == 6


def test_a_batch_that_is_given_back_ends_by_its_own_name_only(bench: Bench) -> None:
    bench.client.lpush(bench.scripts.keys.back("q"), "1", "2", "3")
    first = bench.scripts.give("q", "", "one", 2)
    assert first == ("one", [b"1", b"2"])
    assert bench.scripts.give("q", "", "another", 2) == first, "who else asks is given the same"
    second = bench.scripts.give("q", "one", "two", 2)
    assert second == ("two", [b"3"])
    assert bench.scripts.give("q", "one", "two", 2) == second, "a repeat"
    assert bench.scripts.give("q", "one", "late", 2) == second, "who else has published the first"
    for _ in range(2):
        assert bench.scripts.give("q", "two", "three", 2) == ("", [])
    assert not left_of_it(bench)


# The relay


@pytest.fixture
def hub() -> Hub:
    return Hub()


class Relayed:
    """A node "n" whose outbox a relay empties into the hub's queue "wq"."""

    def __init__(self, bench: Bench, hub: Hub, *ids: str) -> None:
        self.bench, self.hub = bench, hub
        self.node: Node = bench.opening(*ids)
        self.held = Held()
        self.buried: list[tuple[Stamp, str]] = []
        self.missing: list[set[str]] = []
        hub.queues["wq"] = []
        self.relay = Relay(
            bench.client, self.node.list, hub.outlet, lambda state: "wq" if state == "q" else None,
            self.held, lambda stamp, reason: self.buried.append((stamp, reason)),
            lambda queues: self.missing.append(set(queues)),
        )

    def once(self) -> bool:
        return self.relay.relay(self.hub.outlet(), self.relay.waiting())

    def arrivals(self) -> list[Copy]:
        raws, self.hub.queues["wq"] = self.hub.queues["wq"], []
        copies = []
        for raw in raws:
            stamp = stamp_of(raw)
            assert stamp is not None
            self.held.arrived(stamp, None)
            headers = json.loads(raw)["headers"]
            copies.append(Copy(self.node, stamp, headers["id"], headers["identify_tag"]))
        return copies

    def beat(self, number: int) -> int:
        """A heartbeat without grace; how many messages it has sent again."""
        return self.bench.scripts.heartbeat("n", str(number), 0, self.held.names())[1]


@pytest.fixture
def relayed(bench: Bench, hub: Hub) -> Relayed:
    return Relayed(bench, hub, "1", "2")


def test_a_relay_that_dies_between_publish_and_removal_doubles_no_run(relayed: Relayed) -> None:
    remove, relayed.relay._remove = relayed.relay._remove, _dies  # type: ignore[method-assign]
    with pytest.raises(Died):
        relayed.once()
    relayed.relay._remove = remove  # type: ignore[method-assign]
    assert relayed.once()

    first, second = relayed.arrivals()
    assert first.stamp == second.stamp
    assert first.start() == 1
    assert second.start() < 0, "the other copy of it runs"
    assert first.settle()
    assert relayed.once()
    assert [copy.id for copy in relayed.arrivals()] == ["a-2"]


def test_that_a_worker_queue_is_not_there_is_said_once_and_also_that_it_is_back(
    relayed: Relayed, caplog: pytest.LogCaptureFixture
) -> None:
    queue = relayed.hub.queues.pop("wq")
    relayed.relay.start()
    try:
        wait_until(lambda: "queue is not there" in caplog.text, what="a word")
        wait_until(lambda: relayed.hub.calls >= 4, what="two more tries")
        relayed.hub.queues["wq"] = queue
        wait_until(lambda: "go on" in caplog.text, what="that it is back")
    finally:
        relayed.relay.stop()
    assert caplog.text.count("queue is not there") == 1
    assert len(queue) == 1


def _dies(raws: Sequence[bytes]) -> None:
    raise Died


def test_while_the_broker_is_away_no_message_is_sent_again_and_again(relayed: Relayed) -> None:
    relayed.hub.is_away = True
    for number in range(3):
        with pytest.raises(OSError):
            relayed.once()
        assert relayed.beat(number) == 0, "it waits in the outbox"
    relayed.hub.is_away = False
    assert relayed.once()
    for number in range(3, 6):
        assert relayed.beat(number) == 0, "it is on its way from the broker"

    relayed.hub.queues["wq"] = []  # the broker has lost it, and so the connection
    relayed.held.flushed()
    assert [relayed.beat(number) for number in range(6, 9)] == [1, 0, 0]
    assert relayed.once()
    (copy,) = relayed.arrivals()
    assert copy.run()


def test_what_was_published_and_does_not_arrive_is_sent_again_after_a_while(
    relayed: Relayed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("celery_affinity.held.UNDER_WAY_SECONDS", -1.0)
    assert relayed.once()
    assert relayed.beat(1) == 1


def test_a_message_for_a_queue_that_is_not_declared_stays_in_the_outbox(relayed: Relayed) -> None:
    del relayed.hub.queues["wq"]
    assert not relayed.once()
    assert relayed.held.names() == []
    assert relayed.beat(1) == 0
    relayed.hub.queues["wq"] = []
    assert relayed.once()
    assert len(relayed.arrivals()) == 1


def test_a_queue_that_stays_away_is_told_of_from_time_to_time(
    relayed: Relayed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("celery_affinity.relay.MISSING_SECONDS", 0.2)
    queue = relayed.hub.queues.pop("wq")
    assert not relayed.once() and not relayed.missing, "it may be about to be declared"
    told = time.monotonic()
    wait_until(lambda: relayed.once() or len(relayed.missing) == 2, what="two words")
    assert relayed.missing == [{"wq"}, {"wq"}] and time.monotonic() - told >= 0.4
    relayed.hub.queues["wq"] = queue
    assert relayed.once()
    assert len(relayed.missing) == 2


def test_a_message_that_the_client_cannot_send_is_buried_and_holds_up_no_other(bench: Bench, hub: Hub) -> None:
    relayed = Relayed(bench, hub, "unsendable", "2")
    assert not relayed.once() or relayed.buried
    ((stamp, reason),) = relayed.buried
    assert reason == "ValueError: unsendable"
    assert bench.client.llen(relayed.node.list) == 0
    assert bench.scripts.discard("n", stamp.slot, stamp.entry, stamp.epoch, stamp.send, "bury", reason, True)
    assert relayed.once()
    assert [copy.id for copy in relayed.arrivals()] == ["a-2"]
