"""Seeded random walks over the real scripts: nodes that crash, freeze, drain, get copies twice.

After each walk everything is let run to its end, and the history must be lawful: nothing lost,
nothing settled twice, at most `concurrency` of a tag running, starts in order, no key left.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from dataclasses import dataclass, field

import pytest

from celery_affinity.operator_scripts import OperatorScripts
from pools import long

from .conftest import Bench, Copy, Node

TAGS = "abcdef"


@dataclass
class World:
    bench: Bench
    rng: random.Random
    concurrency: int
    #: How often a started task takes what waits behind it.
    batches: float = 0.0
    mates: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    arrived: dict[str, list[Copy]] = field(default_factory=lambda: defaultdict(list))
    running: dict[str, list[Copy]] = field(default_factory=lambda: defaultdict(list))
    sent: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    settled: list[str] = field(default_factory=list)
    starts: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    gone: set[str] = field(default_factory=set)
    beats: int = 0
    changes: int = 1
    born: int = 0
    #: What operators have asked for; None is the queue.
    paused: set[str | None] = field(default_factory=set)
    limits: dict[str, int] = field(default_factory=dict)
    #: The highest concurrency that was ever declared: a lower one holds for what is dispatched then.
    most: int = 0

    @property
    def operator(self) -> OperatorScripts:
        return OperatorScripts(self.bench.client, self.bench.scripts.keys)

    def node_up(self) -> None:
        if len(self.nodes) >= 4:
            return
        self.born += 1
        name = f"n{self.born}"
        depth, slots = self.rng.choice([(1, 1), (2, 1), (2, 2), (1, 3), (2, 3)])
        self.nodes[name] = self.bench.node(name, slots=slots, depth=depth)

    def send(self) -> None:
        tag = self.rng.choice(TAGS)
        for _ in range(self.rng.randint(1, 4)):
            self.bench.send(tag, self.sent[tag])
            self.sent[tag] += 1

    def admit(self) -> None:
        self.bench.admit()

    def receive(self) -> None:
        for name, node in self.nodes.items():
            copy = node.receive()
            if copy is None:
                continue
            fate = self.rng.random()
            if fate < 0.05:
                continue  # lost on the way
            self.arrived[name].append(copy)
            if fate > 0.95:
                self.arrived[name].append(Copy(node, copy.stamp, copy.id, copy.tag))  # twice

    def start(self) -> None:
        for name in list(self.arrived):
            if not self.arrived[name]:
                continue
            at = 0 if self.rng.random() < 0.8 else self.rng.randrange(len(self.arrived[name]))
            copy = self.arrived[name].pop(at)
            if copy.start() != 1:
                continue
            if self.rng.random() < 0.1:
                assert copy.start(copy.token) == 1, "a repeat gets the same answer"
            assert name not in self.gone, "a worker that was given up starts nothing"
            self.running[name].append(copy)
            alive = [c for n, cs in self.running.items() if n not in self.gone for c in cs]
            same = [c for c in alive if c.tag == copy.tag]
            limit = self.limits.get(copy.tag, max(self.most, self.concurrency))
            assert len(same) <= limit, f"{copy.tag} runs {len(same)} times"
            assert not self.paused & {copy.tag, None}, f"{copy.tag} starts while it is paused"
            self.starts[copy.tag].append(int(copy.id.split("-")[1]))
            if self.rng.random() < self.batches:
                self.take(copy)

    def take(self, copy: Copy) -> None:
        """Have what waits behind a started entry join it."""
        s = copy.stamp
        args = (s.incarnation, s.slot, s.entry, s.epoch, copy.token, 0, "t", 10**6)
        code, found = self.bench.scripts.take(*args)
        assert code == 1
        assert not (found and self.paused & {copy.tag, None}), f"{copy.tag} is paused"
        if self.rng.random() < 0.2 and found:
            assert self.bench.scripts.take(*args) == (1, found), "a repeat gets the same answer"
        self.mates[copy.token] = [(entry, json.loads(raw)["headers"]["id"]) for entry, raw in found]
        self.starts[copy.tag] += [int(one.split("-")[1]) for _, one in self.mates[copy.token]]

    def end(self, copy: Copy) -> str:
        """Settle a task, or all of its call."""
        mates = self.mates.get(copy.token)
        s = copy.stamp
        if not mates:
            answer = copy.settle()
            assert copy.settle() == answer, "a repeat gets the same answer"
        else:
            ends = [(entry, "done", ()) for entry in (s.entry, *(entry for entry, _ in mates))]
            args = (s.incarnation, s.slot, s.entry, s.epoch, copy.token, ends)
            answer = self.bench.scripts.settle_batch(*args)
            assert self.bench.scripts.settle_batch(*args) == answer, "a repeat gets the same answer"
        if answer != "stale":
            self.settled += [copy.id, *(one for _, one in mates or ())]
        return answer

    def settle(self) -> None:
        for name in list(self.running):
            if not self.running[name]:
                continue
            copy = self.running[name].pop(self.rng.randrange(len(self.running[name])))
            answer = self.end(copy)
            assert (answer == "stale") == (name in self.gone), (answer, name)

    def beat(self) -> None:
        for name, node in self.nodes.items():
            self.beats += 1
            held = self.arrived[name] + self.running[name]
            assert node.beat(self.beats, held)[0]

    def lose_node(self) -> None:
        """A heartbeat is overdue; its processes may run on for a while."""
        if len(self.nodes) < 2:
            return
        name = self.rng.choice(list(self.nodes))
        self.bench.client.zadd(self.bench.scripts.keys.workers, {name: 1})
        while self.bench.scripts.rescue("q", self.bench.fence, 2)[0] == 1:
            pass
        self._remove(name)

    def leave(self) -> None:
        if len(self.nodes) < 2:
            return
        name = self.rng.choice(list(self.nodes))
        self.bench.scripts.drain(name, 1)
        for copy in self.running.pop(name, []):
            assert self.end(copy) == "drained"
        self.bench.scripts.leave(name)
        self._remove(name)

    def lose_process(self) -> None:
        for name in self.nodes:
            if self.running[name] and self.rng.random() < 0.5:
                copy = self.running[name].pop()
                s = copy.stamp
                args = (s.incarnation, s.slot, s.entry, s.epoch, "q")
                assert self.bench.scripts.lost(*args) == "requeued"
                return

    def occupy(self) -> None:
        name = self.rng.choice(list(self.nodes))
        token = f"t{self.rng.randrange(3)}"
        if self.rng.random() < 0.5:
            self.bench.scripts.occupy(name, None, token)
        else:
            self.bench.scripts.vacate(name, token)

    def serve(self) -> None:
        """The node's pool grows or shrinks, or it stops or starts serving the queue."""
        name, node = self.rng.choice(list(self.nodes.items()))
        slots = self.rng.randint(1, 4)
        queues = [("q", slots, node.list)] if self.rng.random() < 0.7 else []
        self._serve(name, slots, queues)

    def _serve(self, name: str, slots: int, queues: list[tuple[str, int, str]]) -> None:
        self.changes += 1
        for change in (self.changes, self.changes, self.changes - 1):  # repeats, and one that is late
            self.bench.scripts.serve(
                name, change, slots=slots, queues=queues, junk=[self.nodes[name].list], budget=1
            )

    # What operators do

    def pause(self) -> None:
        tag = self.rng.choice([*TAGS, None])
        if tag is None:
            self.operator.pause("q")
        else:
            self.operator.pause_tag("q", tag)
        self.paused.add(tag)

    def resume(self) -> None:
        for tag in list(self.paused)[: self.rng.randint(1, 2)]:
            self._resume(tag)

    def _resume(self, tag: str | None) -> None:
        if tag is None:
            assert self.bench.scripts.resume("q")
        else:
            assert self.operator.resume_tag("q", tag)
        self.paused.discard(tag)

    def limit(self) -> None:
        tag = self.rng.choice(TAGS)
        limit = self.rng.choice([1, 1, 2, 4, self.concurrency])
        assert self.operator.limit("q", tag, limit, "default" if limit == self.concurrency else "set")[0]
        self.limits[tag] = limit
        if limit == self.concurrency:
            del self.limits[tag]

    def configure(self) -> None:
        """The next leader was started with another `tag_concurrency`."""
        self.most = max(self.most, self.concurrency)
        self.concurrency = self.rng.choice([1, 2, 3])
        self.new_term()

    def move(self) -> None:
        tag, name = self.rng.choice(TAGS), self.rng.choice(list(self.nodes))
        assert self.operator.move("q", tag, name, 60) in (-1, 0, 1)

    def new_term(self) -> None:
        self.bench.scripts.resign("q", self.bench.fence)
        self.bench.lead(
            batch=3,
            concurrency=self.concurrency,
            deliveries=10**6,
            candidate=f"leader/{self.rng.random()}",
        )

    def _remove(self, name: str) -> None:
        self.nodes.pop(name)
        self.gone.add(name)

    def run_to_the_end(self) -> None:
        for tag in list(self.paused):
            self._resume(tag)
        for name, node in self.nodes.items():
            self._serve(name, 2, [("q", 2, node.list)])
            for k in range(3):
                self.bench.scripts.vacate(name, f"t{k}")
        for _ in range(3000):
            self.admit()
            self.receive()
            self.start()
            self.settle()
            self.beat()
            if self._idle():
                return
        raise AssertionError(f"does not end: {len(self.settled)} of {sum(self.sent.values())}")

    def _idle(self) -> bool:
        return not self.bench.client.exists(self.bench.queue_key("m"), self.bench.pending)

    def check(self) -> None:
        wanted = sorted(f"{tag}-{n}" for tag, total in self.sent.items() for n in range(total))
        assert sorted(self.settled) == wanted, "each settles exactly once"
        for tag, numbers in self.starts.items():
            first = list(dict.fromkeys(numbers))
            assert first == sorted(first), f"first starts of {tag}: {first}"
        for name in ("att", "held", "eta", "ring", "unst", "hold", "halted", "later", "big"):
            assert not self.bench.client.exists(self.bench.queue_key(name)), name
        slots = sum(
            int(self.bench.client.hget(self.bench.scripts.keys.worker(name, "info"), "slots"))
            for name in self.nodes
        )
        assert self.bench.client.zcard(self.bench.queue_key("idle")) == slots
        left = {
            k.decode()
            for k in self.bench.client.scan_iter(match=f"{self.bench.scripts.keys.prefix}*")
        }
        assert not [k for k in left for name in self.gone if f":{name}:" in k]


WALKS = (
    ["send"] * 3
    + ["admit"] * 4
    + ["receive"] * 8
    + ["start"] * 8
    + ["settle"] * 6
    + ["beat"] * 3
    + ["node_up"] * 2
    + ["lose_node", "leave", "lose_process", "occupy", "occupy", "serve", "new_term"]
)


#: Eight of them in `make test`.
SEEDS = [pytest.param(seed, marks=[long] * (seed >= 8)) for seed in range(24)]

OPERATED = WALKS + ["pause", "resume", "resume", "limit", "limit", "move", "move", "configure"]


@pytest.mark.proves(
    "7: crashes at random between the steps of workers and leaders",
    "lawful histories",
)
@pytest.mark.parametrize("batches", [0.0, 0.7])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_walk_with_crashes_is_lawful(bench: Bench, seed: int, batches: float) -> None:
    walk(bench, seed, WALKS, batches)


@pytest.mark.parametrize("batches", [0.0, 0.7])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_walk_with_crashes_and_operators_is_lawful(
    bench: Bench, seed: int, batches: float
) -> None:
    walk(bench, seed, OPERATED, batches)


def walk(bench: Bench, seed: int, steps: list[str], batches: float) -> None:
    rng = random.Random(seed)
    world = World(bench, rng, rng.choice([1, 1, 1, 3]), batches)
    bench.lead(batch=3, concurrency=world.concurrency, deliveries=10**6)
    world.node_up()
    for _ in range(250):
        getattr(world, rng.choice(steps))()
    world.run_to_the_end()
    world.check()
