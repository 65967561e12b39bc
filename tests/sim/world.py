"""The world: actors that take turns in a seeded order, a clock, and what goes wrong around calls.

An actor is a greenlet that runs production code. It gives way wherever it calls the ledger, sleeps
or waits; the world then picks who goes on. So every interleaving of calls can happen, and the same
seed gives the same one. Around each call, besides being made:

- the actor's process dies before it, or after it (the reply is lost with it);
- the reply is lost, and the client repeats the call, at once or after others took steps;
- the client gives up, before or after the call took place (the actor sees a RedisError);
- the reply arrives late;
- it takes place late: others go on while it is under way.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet
from redis.exceptions import ConnectionError as RedisConnectionError

from celery_affinity.scripts import Scripts

from .account import Violation
from .judge import Judge
from .server import KEYS, Ledger, Reply, ScriptError
from .virtual import FakeClient

__all__ = ("Actor", "Group", "SimScripts", "World")

START_US = 1_760_000_000_000_000


@dataclass
class Call:
    """A script call under way."""

    name: str
    args: tuple[Any, ...]
    lists: tuple[str, ...]
    #: The answer whose reply was lost.
    first: Reply | None = None


class Group:
    """What lives and dies, freezes and thaws together: the actors of one machine or process."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.frozen_until = 0
        self.on_crash: Callable[[], None] | None = None


class Actor:
    """One thread of control."""

    def __init__(self, name: str, group: Group, run: Callable[[], None], hub: Any) -> None:
        self.name = name
        self.group = group
        self.alive = True
        self.frozen_until = 0
        self.wake_at: int | None = None
        self.ready: Callable[[], bool] | None = None
        self.call: Call | None = None
        self.result: Any = None
        self.greenlet = _Greenlet(run, self, hub)
        #: What its crash means: its process, its node, its candidate.
        self.crash: Callable[[], None] | None = None

    def can_go(self, now: int) -> bool:
        """Whether it has something to do now. Called more often than anything else."""
        wake_at, ready = self.wake_at, self.ready
        if wake_at is None:
            if ready is not None and not ready():
                return False
        elif now < wake_at and (ready is None or not ready()):
            return False
        return now >= self.frozen_until and now >= self.group.frozen_until


class _Greenlet(greenlet):  # type: ignore[misc]
    def __init__(self, run: Callable[[], None], actor: Actor, hub: Any) -> None:
        super().__init__(run, hub)
        self.actor = actor


class SimScripts(Scripts):
    """The ledger's scripts, called through the world."""

    def __init__(self, world: World) -> None:
        super().__init__(FakeClient(world), KEYS)  # type: ignore[arg-type]
        self._world = world

    def drain(self, incarnation: str, budget: int = 100) -> int:
        return super().drain(incarnation, self._budget(budget))

    def leave(self, incarnation: str, budget: int = 100) -> int:
        return super().leave(incarnation, self._budget(budget))

    def _budget(self, budget: int) -> int:
        """Small enough, at times, that it takes several steps."""
        return self._world.rng.choice([1, budget])

    def _call(self, name: str, *args: object, lists: Any = ()) -> Any:
        return self._world.call(name, args, tuple(lists))


@dataclass
class World:
    """One history."""

    ledger: Ledger
    seed: int
    judge: Judge
    rng: random.Random = field(init=False)
    #: Monotonic time in us, and what the server's clock is ahead of it.
    now: int = 0
    ahead: int = START_US
    steps: int = 0
    calls: int = 0
    faults: bool = True
    arrivals: bool = False
    vacant: bool = False
    #: The step after which the server's clock jumped last.
    jumped_at: int = -2
    #: When that was.
    jumped_us: int = -(10**12)
    #: What it was ahead at most.
    most_ahead: int = START_US
    actors: list[Actor] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    #: Told of every message that was dispatched to an incarnation.
    on_sent: Callable[[str], None] = lambda incarnation: None
    #: A violation that an actor has found.
    broken: Violation | None = None
    _looks: dict[str, int] = field(default_factory=dict)
    _doomed: list[Actor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self._hub = getcurrent()

    @property
    def redis_us(self) -> int:
        """The server's clock."""
        return self.now + self.ahead

    def chance(self, probability: float) -> bool:
        """Whether something happens that only happens while faults are on."""
        return self.faults and self.rng.random() < probability

    def note(self, text: str) -> None:
        """One line of the history."""
        self.log.append(f"{self.steps:5} {self.now / 1000:9.1f} ms  {text}")

    def digest(self) -> str:
        """A fingerprint of the history."""
        return hashlib.sha256("\n".join(self.log).encode()).hexdigest()[:16]

    # What actors call

    @property
    def me(self) -> Actor:
        return getcurrent().actor  # type: ignore[no-any-return]

    def call(self, name: str, args: tuple[Any, ...], lists: tuple[str, ...]) -> Any:
        """Call a script, sooner or later."""
        me = self.me
        if not me.alive:
            raise GreenletExit
        me.call = Call(name, args, lists)
        self._hub.switch()
        result, me.result = me.result, None
        if isinstance(result, Exception):
            raise result
        return result

    def sleep(self, seconds: float) -> None:
        """Others go on for so long."""
        self.wait_until(None, seconds)

    def pause(self) -> None:
        """Others may go on."""
        self.wait_until(lambda: True)

    def wait_until(self, ready: Callable[[], bool] | None, seconds: float | None = None) -> None:
        """Others go on until something is so, or the time is over."""
        me = self.me
        if not me.alive:
            raise GreenletExit
        me.ready = ready
        me.wake_at = None if seconds is None else self.now + int(seconds * 1e6)
        self._hub.switch()

    def check(self, law: Callable[[], None]) -> None:
        """Ask the judge from inside of production code, which must not see the exception."""
        try:
            law()
        except Violation as violation:
            self.broken = violation
            self.wait_until(lambda: False)

    def looked_at_clock(self) -> None:
        """The caller has read the server's clock."""
        self._looks[self.me.name] = self.steps

    # What the hub does

    def spawn(self, name: str, group: Group, run: Callable[[], None]) -> Actor:
        """A new actor, which begins at one of the next steps."""
        actor = Actor(name, group, run, self._hub)
        self.actors.append(actor)
        return actor

    def kill(self, actor: Actor) -> None:
        """It never takes another step."""
        if not actor.alive:
            return
        actor.alive = False
        if actor in self.actors:
            self.actors.remove(actor)
        if getcurrent() is self._hub:
            actor.greenlet.throw(GreenletExit)
        else:
            self._doomed.append(actor)  # what it throws away would run in its killer's place

    def kill_group(self, group: Group) -> None:
        """None of them takes another step."""
        for actor in [a for a in self.actors if a.group is group]:
            self.kill(actor)

    def step(self) -> None:
        """Somebody goes on; time passes."""
        self.steps += 1
        if self.rng.random() < 0.3:
            self.now += self.rng.randrange(200, 30_000)
        able = [a for a in self.actors if a.can_go(self.now)]
        if not able:
            self._pass_time()
            return
        actor = self.rng.choice(able)
        actor.wake_at = actor.ready = None
        if actor.call is not None and not self._make_call(actor):
            return
        self._resume(actor)

    def _pass_time(self) -> None:
        moments = [
            max(a.frozen_until, a.group.frozen_until, a.wake_at or 0)
            for a in self.actors
            if a.wake_at is not None or self.now < max(a.frozen_until, a.group.frozen_until)
        ]
        self.now = max(self.now + 1000, min(moments, default=0))

    def _resume(self, actor: Actor) -> None:
        actor.greenlet.switch()
        while self._doomed:
            self._doomed.pop().greenlet.throw(GreenletExit)
        if self.broken:
            raise self.broken
        if actor.greenlet.dead and actor in self.actors:
            self.actors.remove(actor)
            actor.alive = False

    def _make_call(self, actor: Actor) -> bool:
        """Whether the actor goes on at once."""
        call = actor.call
        assert call is not None
        fate = self.rng.random() if self.faults else 1.0
        if fate < 0.004 and actor.crash:
            self.note(f"{actor.name} dies before {call.name}")
            actor.crash()
            return False
        if fate < 0.012:
            self.note(f"{actor.name} cannot reach the server for {call.name}")
            actor.call, actor.result = None, RedisConnectionError("simulated")
            return True
        reply = self.execute(actor, call)
        if fate < 0.016 and actor.crash:
            self.note(f"{actor.name} dies before it has the reply")
            actor.crash()
            return False
        if fate < 0.024:
            self.note(f"{actor.name} loses the reply and gives up")
            actor.call, actor.result = None, RedisConnectionError("simulated")
            return True
        if fate < 0.05 and call.first is None:
            self.note(f"{actor.name} loses the reply")
            call.first = reply
            if self.rng.random() < 0.5:
                again = self.execute(actor, call, at_once=True)
                self.judge.repeated(call.name, call.args, reply, again)
                reply = again
            else:
                if self.rng.random() < 0.1:
                    self.freeze(actor.group, self.rng.choice([4.0, 12.0]))
                return False
        actor.call, actor.result = None, reply.answer
        return fate >= 0.1

    def execute(self, actor: Actor, call: Call, at_once: bool = False) -> Reply:
        """The call takes place."""
        self.calls += 1
        if not at_once:
            self.now += 20
        shown = " ".join(f"{a.decode() if isinstance(a, bytes) else a!s:.60}" for a in call.args)
        try:
            reply = self.ledger.run(call.name, call.args, call.lists, self.redis_us)
        except ScriptError as error:
            self.note(f"{actor.name}: {call.name} {shown} FAILS")
            raise Violation("script", str(error)) from None
        sent = "".join(f" >{stamp.replace(' ', '/')}" for stamp, _ in reply.sent)
        self.note(f"{actor.name}: {call.name} {shown} = {_shown(reply.answer)}{sent}")
        self.arrivals, self.vacant = reply.arrivals, reply.vacant
        unseen = self._looks.get(actor.name, -1) <= self.jumped_at
        late = unseen or self.now - self.jumped_us < self.judge.limits.timeout_us
        self.judge.called(self.now, self.redis_us, call, reply, late)
        for stamp, _ in reply.sent:
            self.on_sent(stamp.split(" ")[3])
        return reply

    @property
    def set_back(self) -> int:
        """By how much the server's clock is behind what it once said."""
        return self.most_ahead - self.ahead

    # What goes wrong with machines

    def freeze(self, target: Group | Actor, seconds: float) -> None:
        """It takes no step for so long; a call of it under way may take place in the meantime."""
        self.note(f"{target.name} freezes for {seconds:.1f} s")
        members = [a for a in self.actors if a is target or a.group is target]
        for actor in members:
            if actor.call is not None and self.rng.random() < 0.5:
                call, actor.call = actor.call, None
                actor.result = self.execute(actor, call).answer
        target.frozen_until = self.now + int(seconds * 1e6)

    def jump(self, seconds: float) -> None:
        """The server's clock jumps."""
        self.note(f"the server's clock jumps by {seconds:+.1f} s")
        # The server expires keys all the time, not only when a script runs.
        self.ledger.expire(self.redis_us)
        self.judge.time_passed(self.redis_us)
        self.ahead += int(seconds * 1e6)
        self.most_ahead = max(self.most_ahead, self.ahead)
        self.jumped_at, self.jumped_us = self.steps, self.now


def _shown(answer: Any) -> str:
    if isinstance(answer, bytes):
        return answer.decode("utf-8", "replace")
    if isinstance(answer, list):
        return "[" + " ".join(_shown(one)[:40] for one in answer) + "]"
    return str(answer)
