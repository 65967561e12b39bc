"""A worker node: Celery's part is a model, the reporter and the gates are the real ones.

The parent receives dispatched messages from the broker, hands them to its slots, and learns of what
became of them by events, as Celery's does from its pool. On a node with processes a message waits
for the process of its slot; on one with threads any free thread takes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from celery.exceptions import Reject
from redis.exceptions import RedisError

from celery_affinity.leftovers import Leftovers
from celery_affinity.message import STAMP_HEADER, Stamp
from celery_affinity.reporter import Reporter
from celery_affinity.running import current_run
from celery_affinity.watchdog import Lifeline

from .pool import Job, Process
from .server import KEYS, STATE
from .world import Actor, Group, SimScripts

if TYPE_CHECKING:
    from .history import History

__all__ = ("HEARTBEAT", "Node")

REFUSED = object()
#: Seconds.
HEARTBEAT = 2.0


class Node(Group):
    """One incarnation of a worker."""

    def __init__(self, history: History, number: int) -> None:
        super().__init__(f"n{number}")
        world = self.world = history.world
        self.history = history
        self.inc = f"inc{number}"
        self.list = f"{KEYS.prefix}wq-{self.inc}"
        self.threads = world.rng.random() < 0.35
        self.slots = world.rng.choice([1, 1, 2, 3])
        self.depth = 1 if self.threads else 2
        self.alive = self.serving = True
        self.stopping = ""
        self.events: list[tuple[Any, ...]] = []
        self.channel: list[bytes] = []
        self.seen: list[bytes] = []
        self.listed = 0
        self.buffers: dict[int, list[Job]] = {}
        self.procs: list[Process] = []
        self._born = 0
        self._limited: list[Job] = []
        #: Entries that were revoked or cannot be used here: no later copy of them gets further.
        self._doomed: dict[str, tuple[str, str]] = {}
        #: Entries of which a copy was here that could be used, or was not looked at so far.
        self._usable: set[str] = set()
        looks = [Leftovers(self.inc, self._is_gone).look]
        self.reporter = Reporter(self._connect, self.inc, self._announcement, HEARTBEAT, Lifeline(), looks)
        self.reporter.held = history.bugs.held(in_turn=not self.threads)
        self.reporter.held.on_end = self.reporter._on_end
        self._actor("parent", self._parent)

    def _is_gone(self, process: str) -> bool:
        """Whether one of its processes has ended, by what its parent knows of the system."""
        return not any(proc.identity == process for proc in self.procs)

    def _connect(self) -> SimScripts:
        return SimScripts(self.world)

    def _announcement(self) -> dict[str, Any]:
        return {
            "name": f"{self.name}@sim",
            "depth": self.depth,
            "slots": self.slots,
            "queues": [(STATE, self.slots, self.list)] if self.serving else [],
            "junk": [self.list],
            "role": "worker",
            "timeout_ms": self.history.judge.limits.timeout_us // 1000,
        }

    def _actor(self, name: str, run: Callable[[], None]) -> Actor:
        actor = self.world.spawn(f"{self.name}.{name}", self, run)
        actor.crash = self.die
        return actor

    # Faults

    def die(self) -> None:
        """SIGKILL of the whole node; with it, or a little later, its processes."""
        self.alive = False
        self.world.note(f"{self.name} dies")
        for proc in list(self.procs):
            if self.threads or self.world.rng.random() < 0.7:
                self._kill(proc)
            else:
                proc.actor.group = Group(f"{self.name}.orphan")
                proc.closing = True  # without a parent it takes no other job
                proc.actor.crash = lambda proc=proc: self._kill(proc)  # type: ignore[misc]
        self.world.kill_group(self)

    def lose_process(self, proc: Process) -> None:
        """A pool process dies; its parent is told by the pool."""
        if proc not in self.procs or self.threads:
            return
        self.world.note(f"{proc.actor.name} dies")
        job = proc.box[0] if proc.box else proc.job
        self._kill(proc)
        self.events.append(("died", proc.index, job))

    def serve(self, serving: bool) -> None:
        """Remote control: it consumes the queue no more, or again."""
        self.world.note(f"{self.name} serves the queue: {serving}")
        self.serving = serving
        self.reporter.changed()

    def _kill(self, proc: Process) -> None:
        if proc in self.procs:
            self.procs.remove(proc)
        self.history.judge.ends(proc.token, died=True)
        self.world.kill(proc.actor)

    @property
    def busy(self) -> bool:
        """Whether anything of it still runs or waits."""
        return bool(self.events or self.channel or any(p.job or p.box for p in self.procs))

    # The parent

    def _parent(self) -> None:
        for index in range(self.slots):
            self._start_process(index)
        while True:
            try:
                self.reporter.register()
                break
            except RedisError:
                self.world.sleep(0.5)
        self._actor("beat", self.reporter.run)
        while not self.stopping:
            self.world.wait_until(lambda: bool(self.events or self.channel or self.listed > 0 or self.stopping))
            self._turn()
        self._stop()

    def _turn(self) -> None:
        rng = self.world.rng
        if self.events and (rng.random() < 0.7 or not (self.channel or self.listed > 0)):
            event, *rest = self.events.pop(0)
            getattr(self, f"_on_{event}")(*rest)
        elif self.listed > 0:
            self._read()
        elif self.channel:
            at = rng.randrange(len(self.channel)) if self.world.chance(0.2) else 0
            self._receive(self.channel.pop(at))
        self._feed()

    def _read(self) -> None:
        """The broker: it loses, doubles, delays and redelivers."""
        self.listed -= 1
        raw = self.world.ledger.command("RPOP", self.list)
        if raw is None:
            return
        if self.world.chance(0.03):
            self.world.note(f"{self.name} never gets a message")
            return
        self.channel.append(raw)
        self.seen.append(raw)
        if self.world.chance(0.08):
            self.world.note(f"{self.name} gets a message twice")
            self.channel.append(raw)
        if self.world.chance(0.05):
            self.world.note(f"{self.name} gets an old message again")
            self.channel.append(self.world.rng.choice(self.seen))
        if self.world.chance(0.01):
            self.world.note("a dispatched message strays into the pending queue")
            self.history.stray(raw)

    def _receive(self, raw: bytes) -> None:
        headers = json.loads(raw)["headers"]
        stamp = Stamp.parse(headers[STAMP_HEADER])
        assert stamp is not None
        if self.reporter.held.was_discarded(stamp):
            return
        job = Job(headers, stamp)
        job.announced = self.reporter.held.was_refused(stamp)
        self.reporter.held.arrived(stamp, job)
        fate = self.world.rng.random()
        if fate < 0.02 or headers.get("affinity_revoked"):
            self._doomed.setdefault(stamp.entry, ("settle", "revoked"))
        elif fate < 0.03 and stamp.entry not in self._usable:
            self._doomed.setdefault(stamp.entry, ("bury", "unusable"))
        elif self.world.chance(0.3) and any(p.job and p.job.stamp and p.job.stamp.entry == stamp.entry for p in self.procs):
            self._doomed.setdefault(stamp.entry, ("settle", "revoked while a copy runs"))
        verdict, reason = self._doomed.get(stamp.entry, ("", ""))
        if not verdict and fate > 0.99:
            verdict, reason = "bury", "it could not be taken this time"
        self._usable.add(stamp.entry)
        # What is revoked too late goes on: its gate knows whether it has run.
        discarded = bool(verdict) and self.reporter.discard(stamp, verdict, reason)
        if discarded or verdict == "bury":
            self.reporter.held.ended(stamp, job)
            if not discarded:
                self.reporter.held.may_run(stamp)
        else:
            job.announced = job.announced or not stamp.resent
            self.buffers.setdefault(0 if self.threads else stamp.slot, []).append(job)

    def give_ordinary(self, index: int) -> None:
        """An ordinary task arrives; on processes, for this slot."""
        index = 0 if self.threads else index
        self.buffers.setdefault(index, []).append(Job({"id": "ordinary"}, None))
        self.events.append(("nothing",))

    def _feed(self) -> None:
        for proc in self.procs:
            buffer = self.buffers.get(0 if self.threads else proc.index)
            if buffer and not proc.job and not proc.box and not proc.dying and not self.stopping:
                proc.box.append(buffer.pop(0))

    def _on_nothing(self) -> None:
        pass

    def _on_accepted(self, job: Job) -> None:
        job.accepted = True
        if job.stamp:
            self.reporter.held.accepted(job.stamp, job)

    def _on_done(self, job: Job, answer: Any) -> None:
        if job.stamp is None or job.ended:
            return
        if answer is REFUSED and job.announced:
            self.reporter.held.refused(job.stamp)
        self._end(job)

    def _end(self, job: Job) -> None:
        job.ended = True
        assert job.stamp is not None
        self.reporter.held.ended(job.stamp, job)

    def _on_limit(self, proc: Process) -> None:
        """The time limit of what a process runs is over."""
        job = proc.job
        if proc not in self.procs or job is None or job.stamp is None or not job.accepted or job.ended:
            return
        if not proc.token:  # over before the ledger had answered: the process is killed at once
            self.lose_process(proc)
            return
        proc.dying = job.limited = True
        # It is held until the ledger has said what becomes of it.
        self.history.bugs.time_limit(self.reporter, job.stamp, lambda answer: self._end(job))

        def killer() -> None:
            self.world.sleep(self.world.rng.uniform(0.0, 0.5))
            if proc in self.procs:
                self.world.note(f"{proc.actor.name} is killed past its time limit")
                self._kill(proc)
                self.events.append(("died", proc.index, job))

        self._actor("killer", killer)

    def _on_died(self, index: int, job: Job | None) -> None:
        early = self.world.rng.random() < 0.5
        if early:
            self._start_process(index)
        if job is not None and job.stamp is not None and not (job.ended or job.limited):
            self.history.judge_lost(job.stamp)
            for other in list(self.buffers.get(index, ())):
                if other.stamp and other.stamp.epoch == job.stamp.epoch:
                    self.buffers[index].remove(other)
                    self._on_done(other, REFUSED)
            # The result backend may be away: then the leader tells of a burial.
            if self.reporter.process_lost(job.stamp) == "buried" and not self.world.chance(0.3):
                self.world.pause()
                self.reporter.told(job.stamp)
            self._end(job)
        if not early:
            self._start_process(index)

    def _on_reconnect(self) -> None:
        """The broker's connection was lost: what no process has taken is forgotten."""
        self.world.note(f"{self.name} reconnects to its broker")
        self.channel.clear()
        if not self.threads:  # only the prefork pool forgets what waits
            self.buffers.clear()
        try:
            self.reporter.register()
            self.reporter.reconnected()
        except RedisError:
            self.events.append(("reconnect",))

    def _stop(self) -> None:
        self.world.note(f"{self.name} stops ({self.stopping})")
        self.reporter.request_drain()
        self.reporter.drain()
        self.buffers.clear()
        if self.stopping == "cold":
            for proc in list(self.procs):
                self._kill(proc)
        for proc in self.procs:
            proc.closing = True
        self.world.wait_until(lambda: not self.procs)
        self.reporter.leave()
        self.alive = False
        self.world.note(f"{self.name} has left")
        for actor in [a for a in self.world.actors if a.group is self and a is not self.world.me]:
            self.world.kill(actor)

    # Its processes

    def _start_process(self, index: int) -> None:
        if self.stopping:
            return
        self._born += 1
        number = self._born
        actor = self._actor(f"p{index}.{number}", lambda: self._process(proc, number))
        proc = Process(actor, index)
        actor.crash = lambda: self.die() if self.threads else self.lose_process(proc)
        self.procs.append(proc)

    def _process(self, proc: Process, number: int) -> None:
        gate = self.history.bugs.make_gate(
            connect=self._connect,
            refusal=lambda _: REFUSED,
            queue_names={STATE: "q"},
            node=self.name,
            incarnations=[self.inc],
            slot=None if self.threads else proc.index,
            in_process=self.threads,
            trust_seconds=self.history.judge.limits.timeout_us / 2e6,
        )
        proc.identity = f"{self.name}:{proc.index}-{number}"
        gate._process = f"{proc.identity}:sim"
        gate.process_up()
        gated = gate.around(lambda *args: self._task(proc, *args))
        while True:
            self.world.wait_until(lambda: bool(proc.box) or proc.closing)
            if not proc.box:
                break
            job = proc.job = proc.box.pop()
            if self.alive:
                self.events.append(("accepted", job))
            answer = gated(job.headers["id"], (), {}, dict(job.headers))
            proc.job, proc.token = None, ""
            if self.alive:
                self.events.append(("done", job, answer))
            if gate._starts._grant and self.world.chance(0.1):  # a lease may end before it is used
                self.world.freeze(self, self.world.rng.choice([1.0, 12.0, 25.0]))
        gate.close()
        if proc in self.procs:
            self.procs.remove(proc)

    def _task(self, proc: Process, uuid: str, args: Any, kwargs: Any, request: Mapping[str, Any]) -> Any:
        """User code."""
        rng, judge, world = self.world.rng, self.history.judge, self.world
        run = current_run() if "identify_tag" in request else None
        if run is None:
            world.sleep(rng.uniform(0.0, 1.0))
            return SimpleNamespace(retval=None)
        stamp = run.stamp
        proc.token = run.token
        world.note(f"{proc.actor.name}: entry {stamp.entry} begins")
        where = stamp.incarnation, str(stamp.slot), int(stamp.entry), int(stamp.epoch)
        world.check(lambda: judge.begins(run.token, *where))
        for _ in range(rng.choice([1, 1, 2])):
            world.sleep(rng.choice([0.0, 0.01, 0.1, 0.5, 2.0 * rng.random(), 6.0 * rng.random()]))
        judge.ends(run.token)
        world.note(f"{proc.actor.name}: entry {stamp.entry} ends")
        fate = rng.random()
        if fate < 0.05 and self.history.may_retry(request):
            return SimpleNamespace(retval=Reject("not now", requeue=True))
        if fate < 0.15 and self.history.may_retry(request):
            run.retry_messages.append(self.history.retry_of(request))
        return SimpleNamespace(retval=None)
