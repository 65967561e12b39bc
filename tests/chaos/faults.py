"""What may be done to the system, as verbs; each begins at once and undoes itself later.

A verb is logged with its time and its target: the judge excuses what a declared limit excuses by
that log, and by nothing else.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import random
import signal
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

from redis.exceptions import RedisError

from chaos.system import BUSY_AFTER_MS, HEARTBEAT_TIMEOUT_SECONDS, LEADER_TTL_SECONDS, System, now
from harness import Node

#: A node that was asked to stop and has not ended by then hangs: that is a violation.
STOP_SECONDS = 60.0
#: How long after a BUSY a worker may take to end of it.
BUSY_DEATH_SECONDS = 8.0
#: What Celery logs when it gives up a start because its pool processes were not up within 4 s.
FAILED_START = "Could not start worker processes"


@dataclass
class Fault:
    """One verb that was applied."""

    verb: str
    target: str
    begin: float
    #: When it was undone; infinite while it lasts.
    end: float = float("inf")


class Faults:
    """The verbs. Nothing here blocks: what comes later is done by `run_due`.

    Arguments:
        system: What they are applied to.
        rng: Draws targets and durations.
        log_path: Where `save` writes each verb as a line.
    """

    def __init__(self, system: System, rng: random.Random, log_path: Path) -> None:
        self.system = system
        self.random = rng
        self.log: list[Fault] = []
        #: What a verb found that breaks a promise by itself: a stop that hangs.
        self.violations: list[str] = []
        self.redis_is_down = self.broker_is_down = False
        self._log_path = log_path
        self._under: set[str] = set()
        self._numbers = count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []

    # Processes

    def kill_worker(self) -> None:
        """SIGKILL a worker's parent; it is started again within 2 s."""
        if node := self._pick_worker():
            self._kill(node, "kill_worker")

    def kill_tree(self) -> None:
        """SIGKILL a worker with all its processes."""
        if node := self._pick_worker():
            for pid in node.group():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._kill(node, "kill_tree")

    def kill_child(self) -> None:
        """SIGKILL one pool process."""
        node = self._pick_worker()
        children = node.children() if node else []
        if node and children:
            self._note("kill_child", node.name, 0.0)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.random.choice(children), signal.SIGKILL)

    def kill_all(self) -> None:
        """SIGKILL all workers and beats at once."""
        for node in self.system.nodes:
            if node.name not in self._under and node.alive:
                self._kill(node, "kill_all")

    def kill_leader(self) -> None:
        """SIGKILL whoever leads."""
        node = self.system.leading()
        if node and node.name not in self._under and node.alive:
            self._kill(node, "kill_leader")

    def freeze_leader(self) -> None:
        """SIGSTOP a leader past its term: a zombie when it wakes."""
        node = self.system.leading()
        if node and node.name not in self._under and node in self.system.beats:
            self._freeze(node, "freeze_leader", LEADER_TTL_SECONDS * self.random.uniform(0.5, 2), True)

    def freeze_parent(self) -> None:
        """SIGSTOP a worker's parent; its pool processes go on."""
        if node := self._pick_worker():
            seconds = HEARTBEAT_TIMEOUT_SECONDS * self.random.uniform(0.2, 2)
            self._freeze(node, "freeze_parent", seconds, False)

    def freeze_tree(self) -> None:
        """SIGSTOP a worker with all its processes."""
        if node := self._pick_worker():
            seconds = HEARTBEAT_TIMEOUT_SECONDS * self.random.uniform(0.2, 2)
            self._freeze(node, "freeze_tree", seconds, True)

    def stop_warm(self) -> None:
        """SIGTERM: a warm stop, then a new start."""
        if node := self._pick_worker():
            self._stop(node, "stop_warm", node.term)

    def stop_cold(self) -> None:
        """SIGQUIT: a cold stop, then a new start."""
        if node := self._pick_worker():
            self._stop(node, "stop_cold", node.quit)

    def stop_twice(self) -> None:
        """SIGTERM and another one soon after."""
        if node := self._pick_worker():
            self._stop(node, "stop_twice", node.term)
            self._later(self.random.uniform(0.05, 0.5), node.term)

    def rolling_restart(self) -> None:
        """Warm stops of all workers, one after the other."""
        if not self._under & {node.name for node in self.system.workers}:
            self._roll(list(self.system.workers))

    # Connections of one worker

    def blackhole(self) -> None:
        """A half-open connection: all bytes are swallowed, then RST."""
        self._cut("blackhole")

    def drop_replies(self) -> None:
        """Requests pass, replies do not, then RST."""
        self._cut("drop_replies")

    def delay(self) -> None:
        """Every piece takes 20 to 200 ms longer, in both directions."""
        if node := self._pick_worker():
            proxy = self.system.proxy_of(node)
            self._begin(node, "delay", self.random.uniform(1, 5), proxy.heal)
            proxy.delay(self.random.uniform(0.02, 0.2))

    def reset(self) -> None:
        """RST of all connections of a worker."""
        if node := self._pick_worker():
            self._note("reset", node.name, 0.0)
            self.system.proxy_of(node).reset()

    # Redis

    def kill_redis(self) -> None:
        """SIGKILL the server; it is back within 3 s, with its AOF."""
        if not self._redis_goes("kill_redis", self.random.uniform(0.1, 3), self._redis_back):
            return
        self.system.server.kill()

    def pause_redis(self) -> None:
        """SIGSTOP the server for up to twice the leader's time."""
        if self._redis_goes("pause_redis", self.random.uniform(0.3, 4), self.system.server.resume):
            self.system.server.pause()

    def busy_redis(self) -> None:
        """A foreign script that blocks all others, for up to 2 s.

        Celery's consumer takes the server's BUSY for an unrecoverable error: the worker stops by
        itself, as in any Celery. Here it is started again.
        """
        seconds = self.random.uniform(0.3, 2)
        foreign = threading.Thread(target=self._busy, args=(seconds,), daemon=True)
        if self._redis_goes("busy_redis", seconds, foreign.join):
            foreign.start()
            self._later(seconds + BUSY_DEATH_SECONDS, lambda: None)  # until then it is not quiet

    def client_kill(self) -> None:
        """All connections are closed by the server."""
        self._tell_redis("client_kill", lambda client: client.client_kill_filter(_type="normal"))

    def script_flush(self) -> None:
        """The server forgets all scripts."""
        self._tell_redis("script_flush", lambda client: client.script_flush())

    # RabbitMQ, where it is the broker

    def kill_broker(self) -> None:
        """SIGKILL it; it is started again within 3 s, and lets nobody in for some seconds more."""
        rabbit = self.system.rabbit
        if rabbit is None or self.broker_is_down:
            return
        self.broker_is_down = True
        fault = self._note("kill_broker", "broker")
        rabbit.kill()

        def start() -> None:
            rabbit.spawn()
            self._later(0.2, look)

        def look() -> None:
            if not rabbit.lets_in():
                self._later(0.2, look)
                return
            fault.end = now()
            self.broker_is_down = False

        self._later(self.random.uniform(0.1, 3), start)

    def close_broker_connections(self) -> None:
        """All its connections are closed, those of workers, of the leader and of producers."""
        if self.system.rabbit is not None and not self.broker_is_down:
            self._note("close_broker_connections", "broker", 0.0)
            self.system.rabbit.close_connections()

    # Time

    def run_due(self) -> None:
        """Do what is due; start what has ended by itself, which only Celery's own limits may bring about."""
        for node in self.system.nodes:
            if node.name not in self._under and not node.alive:
                cause = self._cause_of_death(node)
                if not cause:
                    self.violations.append(f"death: {node.name} has ended by itself: {node.log_tail(15)}")
                self._note(cause or "died", node.name, 0.0)
                node.destroy()
                node.start()
        while self._due and self._due[0][0] <= now():
            heapq.heappop(self._due)[2]()

    def _cause_of_death(self, node: Node) -> str:
        """Which declared limit of Celery itself explains the end of a node; "" if none does.

        A BUSY; or a start that it has given up, in which it was frozen, or starved.
        """
        if FAILED_START in node.log_text():
            return "start_failed"
        since = max((f.begin for f in self.log if f.verb == "busy_redis"), default=0.0)
        return "died_of_busy" if now() - since <= 2 * BUSY_DEATH_SECONDS else ""

    def save(self) -> None:
        """Write the log, a line each."""
        self._log_path.write_text("".join(json.dumps(asdict(fault)) + "\n" for fault in self.log))

    @property
    def quiet(self) -> bool:
        """Whether all has been undone."""
        return not self._due and not self._under

    # How

    def _pick_worker(self) -> Node | None:
        free = [n for n in self.system.workers if n.name not in self._under and n.alive]
        return self.random.choice(free) if free else None

    def _note(self, verb: str, target: str, seconds: float | None = None) -> Fault:
        fault = Fault(verb, target, now())
        if seconds is not None:
            fault.end = fault.begin + seconds
        self.log.append(fault)
        return fault

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (now() + seconds, next(self._numbers), action))

    def _begin(self, node: Node, verb: str, seconds: float, undo: Callable[[], None]) -> None:
        fault = self._note(verb, node.name)
        self._under.add(node.name)

        def end() -> None:
            undo()
            fault.end = now()
            self._under.discard(node.name)

        self._later(seconds, end)

    def _kill(self, node: Node, verb: str) -> None:
        def back() -> None:
            node.destroy()
            node.start()

        self._begin(node, verb, self.random.uniform(0, 2), back)
        node.kill9()

    def _freeze(self, node: Node, verb: str, seconds: float, tree: bool) -> None:
        self._begin(node, verb, seconds, lambda: node.cont(tree=tree))
        node.stop_process(tree=tree)

    def _cut(self, verb: str) -> None:
        if node := self._pick_worker():
            proxy = self.system.proxy_of(node)
            seconds = HEARTBEAT_TIMEOUT_SECONDS * self.random.uniform(0.1, 2)
            self._begin(node, verb, seconds, proxy.heal)
            getattr(proxy, verb)()

    def _stop(
        self, node: Node, verb: str, signal_it: Callable[[], None],
        then: Callable[[], None] = lambda: None,
    ) -> None:
        fault = self._note(verb, node.name)
        self._under.add(node.name)
        signal_it()

        def look() -> None:
            if node.alive and now() - fault.begin < STOP_SECONDS:
                self._later(0.1, look)
                return
            if node.alive:
                self.violations.append(f"hang: {verb} of {node.name} (pid {node.pid}) has not ended")
                node.destroy()
            fault.end = now()
            node.start()
            self._under.discard(node.name)
            then()

        self._later(0.1, look)

    def _roll(self, nodes: list[Node]) -> None:
        node, *rest = nodes
        if node.name not in self._under and node.alive:
            self._stop(node, "rolling_restart", node.term, lambda: rest and self._roll(rest))  # type: ignore[arg-type, func-returns-value]
        elif rest:
            self._roll(rest)

    def _redis_goes(self, verb: str, seconds: float, back: Callable[[], None]) -> bool:
        if self.redis_is_down:
            return False
        self.redis_is_down = True
        fault = self._note(verb, "redis")

        def end() -> None:
            back()
            fault.end = now()
            self.redis_is_down = False

        self._later(seconds, end)
        return True

    def _redis_back(self) -> None:
        self.system.server.start()
        self.system.client.config_set("busy-reply-threshold", BUSY_AFTER_MS)

    def _busy(self, seconds: float) -> None:
        text = (
            "local t = redis.call('TIME') local e = t[1] * 1000 + t[2] / 1000 + ARGV[1] "
            "repeat t = redis.call('TIME') until t[1] * 1000 + t[2] / 1000 > e"
        )
        with contextlib.suppress(RedisError):
            self.system.server.client().eval(text, 0, int(seconds * 1000))

    def _tell_redis(self, verb: str, command: Callable[[object], object]) -> None:
        if not self.redis_is_down:
            self._note(verb, "redis", 0.0)
            with contextlib.suppress(RedisError):
                command(self.system.client)
