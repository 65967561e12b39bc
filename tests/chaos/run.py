"""`make chaos MINUTES=60 SEED=7`: chapters of chaos, each judged once all is quiet again.

First an undisturbed minute, for its throughput; then chapters: the nemesis applies faults under
load, everything is undone, what was sent has to be done soon, and the history and the ledger are
judged. A violation prints the seed, the faults before it and where the history is, and ends it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from brokers import QUORUM, RABBIT, SAME, broker_of
from celery_affinity.embedded import start_server
from chaos.faults import Faults
from chaos.judge import buried_tasks, judge_history, judge_ledger, slots_of
from chaos.nemesis import Kind, Nemesis, kinds, verbs
from chaos.system import System, now
from chaos.tail import Tail
from chaos.workload import Workload
from harness import BROKER_VARIABLE, wait_until
from history import HISTORY_VARIABLE, History
from rabbit import RabbitServer, start_rabbit

#: Once all faults are undone, what was sent has to be done within so many seconds.
DRAIN_SECONDS = 120.0


class Chaos:
    """One run: a system, its workload, its nemesis, its judge."""

    def __init__(
        self, directory: Path, seed: str, picks: list[Kind], kind: str = SAME
    ) -> None:
        self.directory, self.seed = directory, seed
        self.history_path = directory / "history.jsonl"
        os.environ[HISTORY_VARIABLE] = str(self.history_path)
        self.server = start_server(aof=True)
        self.rabbit = start_rabbit() if kind in RABBIT else None
        broker = broker_of(kind, self.server, self.rabbit)
        os.environ.update({BROKER_VARIABLE: broker.url, **broker.environ})
        self.system = System(self.server, directory, self.history_path, broker, self.rabbit)
        self.tail = Tail(self.history_path)
        self.workload = Workload(self.system.producer, self.tail, seed)
        self.faults = Faults(self.system, random.Random(f"{seed}/faults"), directory / "faults.jsonl")
        self.nemesis = Nemesis(self.faults, seed, picks)
        self.totals: Counter[str] = Counter()
        self._judged = self._verbs = 0

    def close(self) -> None:
        """End all processes; the directory stays."""
        self.system.close()
        if self.rabbit is not None:
            self.rabbit.close()
        self.server.close()

    def load(
        self, seconds: float, *, chaos: bool, enough: Callable[[], bool] = lambda: True
    ) -> float:
        """Work for so long; returns tasks done in a second.

        Arguments:
            chaos: Whether the nemesis is at work.
            enough: If not, it goes on: on a machine that is busy otherwise little happens in a while.
        """
        self.tail.read()
        begin, before = now(), len(self.tail.done)
        if chaos:
            self.nemesis.start()
        while now() < begin + seconds or (now() < begin + 5 * seconds and not enough()):
            self.faults.run_due()
            if chaos:
                self.nemesis.step()
            if not (self.faults.redis_is_down or self.faults.broker_is_down):
                self.workload.step()
            time.sleep(0.02)
        self.tail.read()
        return (len(self.tail.done) - before) / (now() - begin)

    def settle(self) -> list[str]:
        """Undo all, wait for the end of all tasks, judge. Returns what was violated."""
        deadline = now() + DRAIN_SECONDS
        while not self.faults.quiet and now() < deadline:
            self.faults.run_due()
            time.sleep(0.02)
        found: list[str] = []
        try:
            self.system.wait_until_whole(revive=self.faults.run_due)
            wait_until(lambda: not self._open_tasks(), DRAIN_SECONDS, "the end of all tasks")
            affinity, client = self.system.producer.affinity, self.system.client
            with suppress(AssertionError):  # a last settle, a reply queue of Celery's own inspect
                wait_until(lambda: not judge_ledger(affinity, client), 10)
            found += judge_ledger(affinity, client)
            if self.rabbit is not None:
                found += self._judge_broker(self.rabbit)
        except AssertionError as error:
            found.append(f"liveness: {error}")
            found += slots_of(self.system.producer.affinity, self.system.client)
        self.faults.save()
        history = self._chapter()
        broken, seen = judge_history(history, self.faults.log, self._dead())
        self.totals.update(seen)
        return [*self.faults.violations, *found, *broken]

    def _judge_broker(self, rabbit: RabbitServer) -> list[str]:
        """What RabbitMQ keeps of workers that are gone, once the leader has looked for it again."""
        affinity, url = self.system.producer.affinity, self.system.broker.url

        def strangers() -> list[str]:
            living = {worker.worker_id[:12] for worker in affinity.workers()}
            return [
                name for name in rabbit.queues(url)
                if name.startswith("jobs.worker.") and name.rpartition(".")[2] not in living
            ]

        with suppress(AssertionError):
            wait_until(lambda: not strangers(), 15)
        return [f"leak: queue {name!r} of a worker that is gone" for name in strangers()]

    def _open_tasks(self) -> list[Any]:
        left = self.tail.left(self.tail.sent)
        if not left:
            return []
        buried = buried_tasks(self._dead())
        return [task for task in left if task not in buried][:5]

    def _dead(self) -> list[Any]:
        return self.system.producer.affinity.dead_letters("jobs", 10_000)

    def _chapter(self) -> History:
        """What was recorded since the last chapter."""
        with self.history_path.open("rb") as file:
            file.seek(self._judged)
            new = file.read()
        self._judged += len(new)
        # All of it is done or buried: it need not be looked at again.
        for task in list(self.tail.sent):
            self.tail.done.setdefault(task, now())
        return History.parse(new.splitlines())

    def verbs(self) -> Counter[str]:
        """How often each verb was applied since the last call."""
        found, self._verbs = self.verbs_so_far(), len(self.faults.log)
        return found

    def verbs_so_far(self) -> Counter[str]:
        """The same, and the next call tells them again."""
        return Counter(fault.verb for fault in self.faults.log[self._verbs:])


def run(
    chaos: Chaos, minutes: float, chapter_minutes: float, calm_seconds: float, summary_path: Path
) -> int:
    """All chapters; the exit status."""
    chaos.system.wait_until_whole()
    begin = now()
    calm = chaos.load(calm_seconds, chaos=False)
    print(f"seed {chaos.seed}: undisturbed {calm:.0f} tasks/s, {chaos.directory}", flush=True)
    if found := chaos.settle():
        return report(chaos, found)
    end = now() + 60 * minutes
    rates: list[float] = []
    found = []
    while now() < end and not found:
        rates.append(chaos.load(min(60 * chapter_minutes, end - now()), chaos=True))
        quiet = now()
        found = chaos.settle()
        verbs = chaos.verbs()
        print(
            f"chapter {len(rates)}: {rates[-1]:.0f} tasks/s ({rates[-1] / calm:.0%}), {verbs.total()} "
            f"faults, all done {now() - quiet:.1f} s after; so far {dict(chaos.totals)}; "
            f"{dict(verbs.most_common())}", flush=True,
        )
    summary = {
        "seed": chaos.seed, "minutes": round((now() - begin) / 60, 1), "violations": found,
        "undisturbed_tasks_per_second": round(calm, 1),
        "chapter_tasks_per_second": [round(rate, 1) for rate in rates],
        "throughput_share": round(sum(rates) / len(rates) / calm, 3), **chaos.totals,
        "faults": Counter(fault.verb for fault in chaos.faults.log),
    }
    summary_path.write_text(json.dumps(summary, indent=2) + "\n")
    print(
        f"seed {chaos.seed}, {summary['minutes']} minutes: {len(found)} violations; throughput "
        f"{summary['throughput_share']:.0%} of the undisturbed {calm:.0f} tasks/s; {dict(chaos.totals)}; "
        f"{len(chaos.faults.log)} faults; all counts in {summary_path}", flush=True,
    )
    return report(chaos, found) if found else 0


def run_each(chaos: Chaos, names: list[str], rounds: int) -> int:
    """Each verb alone, so many times, each time judged; the exit status."""
    chaos.system.wait_until_whole()
    for name in names:
        before = Counter(chaos.totals)
        slowest = 0.0
        for _ in range(rounds):
            chaos.load(1.0, chaos=False)
            getattr(chaos.faults, name)()
            chaos.load(2.0, chaos=False)
            quiet = now()
            if found := chaos.settle():
                return report(chaos, found)
            slowest = max(slowest, now() - quiet)
        new = chaos.totals - before
        print(
            f"| {name} | {rounds} | {new['tasks']} | {new['reruns']} | {new['excused']} | "
            f"{slowest:.1f} |", flush=True,
        )
    return 0


def report(chaos: Chaos, found: list[str]) -> int:
    """Say what was violated, and with what to look at it."""
    print(f"{len(found)} VIOLATIONS with seed {chaos.seed}:", flush=True)
    for line in found[:40]:
        print(f"  {line}")
    print("the last faults:")
    for fault in chaos.faults.log[-25:]:
        print(f"  {fault.begin:.2f} to {fault.end:.2f} {fault.verb} {fault.target}")
    print(f"history, faults and logs: {chaos.directory}", flush=True)
    return 1


def main() -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(prog="python -m chaos.run", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", default=str(random.randrange(10**6)))
    parser.add_argument("--chapter-minutes", type=float, default=3)
    parser.add_argument("--calm-seconds", type=float, default=60)
    parser.add_argument("--json", type=Path, help="where the counts go; default: in the temporary directory")
    parser.add_argument("--each", type=int, help="no mix: each verb alone, so many times")
    parser.add_argument(
        "--broker", choices=("redis", "rabbitmq"), default="redis",
        help="rabbitmq: quorum queues, the ledger in Redis",
    )
    parser.add_argument("--verbs", help="which, comma-separated; default: all")
    given = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    rabbitmq = given.broker == "rabbitmq"
    chaos = Chaos(directory, given.seed, kinds(rabbitmq), QUORUM if rabbitmq else SAME)
    status = 1
    try:
        if given.each:
            names = given.verbs.split(",") if given.verbs else verbs(rabbitmq)
            chaos.workload = Workload(chaos.system.producer, chaos.tail, given.seed, backlog=60)
            status = run_each(chaos, names, given.each)
        else:
            summary_path = given.json or Path(tempfile.gettempdir(), f"chaos-{given.seed}.json")
            status = run(
                chaos, given.minutes, given.chapter_minutes, given.calm_seconds, summary_path
            )
    finally:
        chaos.close()
        if not status:
            shutil.rmtree(directory, ignore_errors=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
