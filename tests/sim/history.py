"""One seeded history: who takes part, what goes wrong, and how it comes to rest."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any

from redis.exceptions import RedisError

from celery_affinity.evacuation import Part, evacuate, resume
from celery_affinity.message import STAMP_HEADER, Stamp
from celery_affinity.settings import AffinityQueue

from .account import Limits, Message, Violation
from .bugs import NONE, Bug
from .candidate import LEADER_TTL, TIMEOUT, Candidate
from .judge import Judge
from .node import HEARTBEAT, Node
from .recount import at_rest, nobody_left
from .server import KEYS, PENDING, STATE, Ledger
from .virtual import installed
from .world import Group, SimScripts, World

__all__ = ("History", "run_history")

TAGS = ["a", "b", "c d", "\u00fc:1", "7", "e"]
#: A history at rest has had this much virtual time, or it does not end.
REST_US = 300_000_000
REST_STEPS = 30_000


class History:
    """A world with a queue, its producers, candidates and nodes."""

    def __init__(self, ledger: Ledger, seed: int, bug: Bug = NONE) -> None:
        self.bugs = bug
        self.queue = AffinityQueue("q")
        self.judge = Judge(ledger, Limits(1, 1, {}, 1, 0))
        world = self.world = World(ledger, seed, self.judge)
        rng = world.rng
        concurrency: int | dict[str, int] = rng.choice([1, 1, 1, 1, 2, {"default": 1, "a": 3}])
        self.queue = AffinityQueue(
            "q", max_batch_size=rng.choice([1, 2, 3, 10]), tag_concurrency=concurrency,
            max_deliveries=rng.choice([2, 3, 100]), warm_tags=rng.choice([0, 2, 100]),
        )  # fmt: skip
        self.judge.limits = Limits(
            self.queue.max_batch_size, self.queue.default_concurrency, self.queue.own_concurrencies,
            self.queue.max_deliveries, int(TIMEOUT * 1e6),
        )  # fmt: skip
        self.nodes: list[Node] = []
        self.candidates: list[Candidate] = []
        self.bad = self._numbers = self._born = 0
        self.tags = TAGS[: rng.choice([1, 3, 6])]
        self.total = rng.choice([5, 15, 30])
        world.on_sent = self._sent
        self.producing: list[Any] = []

    def run(self) -> None:
        """All of it. Raises Violation."""
        world = self.world
        with installed(world):
            world.ledger.reset()
            try:
                self._act()
                self._rest()
            finally:
                for actor in list(world.actors):
                    world.kill(actor)

    def _act(self) -> None:
        world, rng = self.world, self.world.rng
        for _ in range(2):
            self._candidate()
        for _ in range(rng.choice([1, 2, 3])):
            self._node()
        for number in range(2):
            group = Group(f"producer{number}")
            actor = world.spawn(group.name, group, self._produce)
            self.producing.append(actor)
        for _ in range(rng.choice([100, 250, 500])):
            world.step()
            if world.rng.random() < 0.05:
                self._trouble()

    def _candidate(self) -> None:
        self._born += 1
        self.candidates.append(Candidate(self, self._born))

    def _node(self) -> None:
        self._born += 1
        self.nodes.append(Node(self, self._born))

    def _sent(self, inc: str) -> None:
        for node in self.nodes:
            if node.inc == inc:
                node.listed += 1

    # Producers

    def _produce(self) -> None:
        world, rng = self.world, self.world.rng
        while self._numbers < self.total:
            for _ in range(rng.choice([1, 1, 4])):
                self._publish()
            world.sleep(rng.choice([0.0, 0.05, 0.5, 3.0]))

    def _publish(self) -> None:
        world, rng = self.world, self.world.rng
        tag: Any = rng.choice(self.tags)
        self._numbers += 1
        nonce = f"m{self._numbers}"
        headers: dict[str, Any] = {"id": nonce, "task": "t", "nonce": nonce, "identify_tag": tag, "eta": None}
        message = Message(nonce, tag, plain=True)
        kind = rng.random()
        if kind < 0.05 and self._numbers > 1:
            headers["id"] = f"m{rng.randrange(1, self._numbers)}"  # an id that was used before
        elif kind < 0.15:
            due = (world.redis_us + rng.randrange(-1_000_000, 6_000_000)) / 1e6
            zone = rng.choice(["+00:00", "Z"])  # Python has to read the second
            moment = datetime.fromtimestamp(due, timezone.utc).isoformat()
            headers["eta"] = moment.replace("+00:00", zone)
            message.plain = False
        elif kind < 0.19:
            message.usable = message.plain = False
            headers["identify_tag"] = rng.choice([None, True, [tag], 1.5])
        elif kind < 0.21:
            headers["identify_tag"] = int(tag) if tag == "7" else tag
        self.judge.messages[nonce] = message
        raw = self._message(headers)
        if kind > 0.98:
            self.bad += 1
            raw, message.usable = b"{not JSON", False
        copies = 1
        if world.chance(0.03):
            world.note(f"the publish of {nonce} is repeated")
            copies = 2
        elif world.chance(0.01):
            world.note(f"the publish of {nonce} fails")
            copies = 0
            self.bad -= raw == b"{not JSON"
        elif raw == b"{not JSON":
            copies = 1
        if raw == b"{not JSON" and copies == 2:
            self.bad += 1
        for _ in range(copies):
            world.note(f"{nonce} of {tag!r} is published")
            world.ledger.command("LPUSH", PENDING, raw)
            if raw != b"{not JSON":
                self.judge.pushed(nonce)
            world.arrivals = True

    @staticmethod
    def _message(headers: Mapping[str, Any]) -> bytes:
        message = {
            "headers": headers, "body": "W10=", "content-type": "application/json",
            "content-encoding": "utf-8", "properties": {"delivery_tag": "d"},
        }  # fmt: skip
        return json.dumps(message).encode()

    def stray(self, raw: bytes) -> None:
        """kombu puts what it has read where its producer had sent it."""
        self.world.ledger.command("LPUSH", PENDING, raw)
        self.world.arrivals = True

    def may_retry(self, request: Mapping[str, Any]) -> bool:
        """Whether the task may ask for another run."""
        return self.judge.messages[request["nonce"]].copies < 3 and request.get("retries", 0) < 3

    def retry_of(self, request: Mapping[str, Any]) -> tuple[str, int | None]:
        """The message of a task's retry, and when it is due."""
        self._numbers += 1
        old = self.judge.messages[request["nonce"]]
        nonce = f"r{self._numbers}"
        self.judge.messages[nonce] = Message(nonce, old.tag, plain=False)
        headers = {k: v for k, v in request.items() if k != STAMP_HEADER}
        headers |= {"nonce": nonce, "retries": request.get("retries", 0) + 1, "identify_tag": old.tag}
        late = self.world.rng.choice([None, 0, 2000])
        due = None if late is None else self.world.redis_us // 1000 + late
        return self._message(headers).decode(), due

    def tell(self, message: Mapping[str, Any], reason: str) -> None:
        """The result backend learns of a burial, or does not answer."""
        self.world.pause()
        if self.world.chance(0.1):
            raise OSError("simulated")

    # An operator

    def _operate(self) -> None:
        """Evacuate the queue, and some time later let it work again."""
        world = self.world
        self._insist(lambda: evacuate(self._parts(), world.rng.choice([0.0, 3.0])))
        world.sleep(world.rng.choice([0.0, 2.0]))
        self._resume()

    def _resume(self) -> None:
        self._insist(lambda: resume(self._parts()))

    def _parts(self) -> list[Part]:
        return [Part(SimScripts(self.world), STATE, PENDING, self._entries)]

    def _revoke(self) -> None:
        number = self.world.rng.randrange(1, self._numbers + 3)
        self._insist(lambda: SimScripts(self.world).revoke([STATE], [f"m{number}"]))

    def _insist(self, call: Callable[[], Any]) -> None:
        while True:
            try:
                call()
            except RedisError:
                self.world.sleep(0.5)
            else:
                return

    def _entries(self) -> list[int]:
        self.world.pause()
        return [int(e) for e in self.world.ledger.command("HKEYS", KEYS.queue(STATE, "m"))]

    def _operator(self, run: Callable[[], None]) -> None:
        actor = self.world.spawn("operator", group := Group("operator"), run)
        actor.crash = lambda: self.world.kill_group(group)

    def judge_lost(self, stamp: Stamp) -> None:
        """A parent is about to report that the process of this message is gone."""
        for run in self.judge.runs.values():
            if run.entry == int(stamp.entry) and run.epoch == int(stamp.epoch):
                run.given_up = True

    # Trouble

    def _trouble(self) -> None:
        rng = self.world.rng
        alive = [n for n in self.nodes if n.alive and not n.stopping]
        kind = rng.choice(
            ["freeze node"] * 2 + ["freeze actor"] * 2 + ["freeze candidate"] + ["kill node"]
            + ["lose process"] * 3 + ["limit"] * 3 + ["stop node"] + ["ordinary"] * 8 + ["node up"] * 2
            + ["serve", "serve", "evacuate", "revoke", "stop candidate", "kill candidate", "candidate up", "candidate up", "reconnect", "reconnect", "jump"]
        )  # fmt: skip
        node = rng.choice(alive) if alive else None
        candidate = rng.choice(self.candidates)
        if kind == "node up" or node is None:
            if len(alive) < 4:
                self._node()
        elif kind == "freeze node":
            self.world.freeze(node, rng.choice([1.0, 4.0, 12.0, 25.0]))
        elif kind == "freeze actor":
            mortal = [a for a in self.world.actors if not a.name.endswith("killer")]  # SIGKILL is not late
            self.world.freeze(rng.choice(mortal), rng.choice([0.5, 3.0, 7.0]))
        elif kind == "freeze candidate":
            self.world.freeze(candidate, rng.choice([1.0, 6.0, 20.0]))
        elif kind == "kill node":
            node.die()
        elif kind in ("lose process", "limit") and node.procs:
            proc = rng.choice(node.procs)
            if kind == "lose process":
                node.lose_process(proc)
            elif not node.threads:
                node.events.append(("limit", proc))
        elif kind == "stop node":
            node.stopping = rng.choice(["warm", "cold"])
        elif kind == "ordinary":
            node.give_ordinary(rng.randrange(node.slots))
        elif kind == "reconnect":
            node.events.append(("reconnect",))
        elif kind == "serve":
            node.serve(not node.serving)
        elif kind == "evacuate" and rng.random() < 0.5:
            self._operator(self._operate)
        elif kind == "revoke":
            self._operator(self._revoke)
        elif kind == "stop candidate":
            candidate.scheduler.stop()
        elif kind == "kill candidate":
            self.world.note(f"{candidate.name} dies")
            self.world.kill_group(candidate)
        elif kind == "candidate up" and len(self.candidates) < 4:
            self._candidate()
        elif kind == "jump":
            self._jump(rng.choice([-31.7, -7.3, 3.1, 19.9]))

    def _jump(self, seconds: float) -> None:
        """The clock jumps; at times to and fro, maybe before anybody looks."""
        world, rng = self.world, self.world.rng
        world.jump(seconds)

        def strobe() -> None:
            for sign in [-1, 1] * 3:
                world.sleep(rng.choice([0.05, 0.5, 2.0]))
                if world.faults:
                    world.jump(sign * seconds)

        if rng.random() < 0.5:
            world.spawn("clock", Group("clock"), strobe)

    # Rest

    def _rest(self) -> None:
        world = self.world
        world.note("from here on nothing goes wrong")
        world.faults = False
        for actor in world.actors:
            actor.frozen_until = actor.group.frozen_until = 0
        if not [n for n in self.nodes if n.alive and not n.stopping]:
            self._node()
        self._candidate()
        self._operator(self._resume)
        for node in self.nodes:
            node.serve(True)
            for index in range(node.slots):
                node.give_ordinary(index)
        self._until(self._drained, "does not drain")
        # Whoever died unnoticed is noticed now; by a clock that was set back, that much later.
        until = world.now + int((TIMEOUT + LEADER_TTL + 3) * 1e6) + world.set_back
        # Else a few heartbeats are enough; the whole time makes half of a history.
        soon = until if world.rng.random() < 0.25 else world.now + int((LEADER_TTL + HEARTBEAT) * 1e6)
        self._until(
            lambda: world.now > (until if self._missed() else soon) and self._drained() and self._told(),
            "does not come to rest",
        )
        staying = [n for n in self.nodes if n.alive]
        at_rest(self.judge, sum(n.slots for n in staying), self.bad)
        for node in staying:
            node.stopping = node.stopping or "warm"
        self._until(lambda: not any(n.alive for n in self.nodes), "a node does not stop")
        nobody_left(self.judge, [n.inc for n in self.nodes])

    def _told(self) -> bool:
        """Whether nobody waits to hear of a burial: a worker that has died may have meant to tell."""
        return not self.world.ledger.command("EXISTS", KEYS.queue(STATE, "untold"), KEYS.queue(STATE, "telling"))

    def _missed(self) -> bool:
        """Whether a node that has died is still registered."""
        registered = {inc.decode() for inc in self.world.ledger.command("ZRANGE", KEYS.workers, 0, -1)}
        return not registered <= {n.inc for n in self.nodes if n.alive}

    def _drained(self) -> bool:
        world = self.world
        if any(a.alive for a in self.producing) or any(n.busy or n.stopping for n in self.nodes if n.alive):
            return False
        if any(r.active for r in self.judge.runs.values()):
            return False
        return not world.ledger.command("EXISTS", KEYS.queue(STATE, "m"), PENDING)

    def _until(self, done: Any, what: str) -> None:
        world = self.world
        until, steps = world.now + REST_US, world.steps + REST_STEPS
        while True:
            if world.steps % 10 == 0 and done():
                return
            world.step()
            if world.now > until or world.steps > steps:
                left = world.ledger.command("HKEYS", KEYS.queue(STATE, "m"))
                raise Violation("liveness", f"{what}; entries left: {[int(e) for e in left][:20]}")


def run_history(ledger: Ledger, seed: int, bug: Bug = NONE) -> tuple[History, Violation | None]:
    """Run one history; the violation that it ended with, if any."""
    history = History(ledger, seed, bug)
    try:
        history.run()
    except Violation as violation:
        history.world.note(f"VIOLATION {violation}")
        return history, violation
    return history, None
