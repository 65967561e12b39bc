"""One contestant's run: start its processes, submit every file, watch, maybe kill a worker."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from celery import Celery

from demo.contestant import INDEX_VARIABLE, NODE_VARIABLE, QUEUE
from demo.corpus import Source
from demo.processes import ProcessEndedError, Processes
from demo.progress import Progress, SlotState, Snapshot

__all__ = ("Contest", "Contestant", "Outcome", "View")

WORKERS = ("w1", "w2")
PROCESSES_PER_WORKER = 2
_READY_SECONDS = 60.0
_TICK_SECONDS = 0.25
#: Without progress for so long a run is over. A lost worker's work is back sooner.
_STALL_SECONDS = 15.0


class Contestant(Protocol):
    """What is run against others."""

    title: str
    app: Celery
    task: Any
    #: How `celery -A` finds the app.
    module: str
    #: Whether it has a beat service.
    beat: bool

    def ready(self, workers: int) -> bool:
        """Whether it can take tasks with so many workers."""

    def slots(self, links: Mapping[str, Any]) -> tuple[SlotState, ...]:
        """What its pool processes do."""

    def notes(self) -> tuple[str, ...]:
        """Other facts for the table."""


class View(Protocol):
    """Where a run is shown."""

    def show(self, snapshot: Snapshot) -> None:
        """Show the state of a run."""

    def say(self, text: str) -> None:
        """Show an event."""


@dataclass
class Outcome:
    """What cannot be read from the index afterwards."""

    #: When a worker was killed, by CLOCK_MONOTONIC.
    killed_at: float | None = None
    #: Tags that it held, and nobody else could work on.
    held_tags: tuple[str, ...] = ()


class Contest:
    """A run of one contestant.

    Arguments:
        directory: Where its index and its logs go.
        broker_url: A database of its own.
        kill: Whether the first worker is killed half way.
    """

    def __init__(
        self,
        contestant: Contestant,
        sources: Sequence[Source],
        directory: Path,
        broker_url: str,
        view: View,
        *,
        kill: bool,
    ) -> None:
        self._contestant = contestant
        self._sources = sources
        self._directory = directory
        self._view = view
        self._kill_at = len(sources) // 2 if kill else None
        self._environment = {
            "CELERY_BROKER_URL": broker_url,
            INDEX_VARIABLE: str(directory / "index"),
        }
        self._total = Counter(source.tag for source in sources)
        self._progress = Progress(directory / "index")
        self._outcome = Outcome()
        self._began = self._ticked = self._progressed = 0.0
        self._done = 0

    def run(self) -> Outcome:
        """Run until all is done, or nothing happens any more."""
        (self._directory / "index").mkdir(parents=True)
        try:
            with Processes(self._directory) as processes:
                self._start(processes)
                self._began = self._progressed = time.monotonic()
                self._submit(lambda: self._tick(processes))
                while self._done < len(self._sources) and not self._is_stalled():
                    time.sleep(_TICK_SECONDS / 5)
                    self._tick(processes)
        finally:
            self._progress.close()
        return self._outcome

    def _start(self, processes: Processes) -> None:
        celery = ("-m", "celery", "-A", self._contestant.module)
        for name in WORKERS:
            options = f"worker -n {name}@%h -c {PROCESSES_PER_WORKER} -Q {QUEUE} -l WARNING"
            environment = {**self._environment, NODE_VARIABLE: name}
            processes.start(name, [*celery, *options.split()], environment)
        if self._contestant.beat:
            schedule = str(self._directory / "beat-schedule")
            options = "beat -S affinity -l WARNING -s"
            processes.start("beat", [*celery, *options.split(), schedule], self._environment)
        deadline = time.monotonic() + _READY_SECONDS
        while not self._contestant.ready(len(WORKERS)):
            processes.check()
            if time.monotonic() > deadline:
                raise ProcessEndedError(
                    f"{self._contestant.title} was not ready within {_READY_SECONDS:g} s; see the "
                    f"logs in {self._directory}"
                )
            time.sleep(0.1)

    def _submit(self, tick: Callable[[], None]) -> None:
        task = self._contestant.task
        with self._contestant.app.producer_or_acquire() as producer:
            for source in self._sources:
                task.apply_async(
                    (source.tag, source.seq, source.name, str(source.path), time.monotonic()),
                    producer=producer,
                )
                tick()

    def _tick(self, processes: Processes) -> None:
        now = time.monotonic()
        if now - self._ticked < _TICK_SECONDS:
            return
        self._ticked = now
        processes.check()
        links = self._progress.last_links(self._total)
        done = {tag: link.position for tag, link in links.items()}
        if sum(done.values()) > self._done:
            self._done, self._progressed = sum(done.values()), now
        slots = self._contestant.slots(links)
        if self._kill_at is not None and self._done >= self._kill_at:
            self._kill(processes, slots)
        self._view.show(
            Snapshot(
                self._contestant.title,
                now - self._began,
                done,
                self._total,
                slots,
                self._contestant.notes(),
            )
        )

    def _kill(self, processes: Processes, slots: Sequence[SlotState]) -> None:
        self._kill_at = None
        victim = WORKERS[0]
        processes.kill(victim)
        self._outcome.killed_at = time.monotonic()
        self._outcome.held_tags = tuple(
            slot.tag for slot in slots if slot.worker == victim and slot.holds and slot.tag
        )
        self._view.say(f"kill -9 of {victim} after {self._done:,} files")

    def _is_stalled(self) -> bool:
        stalled = time.monotonic() - self._progressed > _STALL_SECONDS
        if stalled:
            missing = len(self._sources) - self._done
            self._view.say(f"{missing} files are not in, and nothing happens: gave up on them")
        return stalled
