"""What a chapter of chaos must satisfy: its history, and the ledger once all is quiet.

Excused is one thing only, the limit that docs/how_it_works.md declares: a worker that was frozen
or cut off longer than its lease may still be running a task whose tag has moved on. Such a run is
left out of the judgement of exclusion and order if (a) the fault log says that its worker was
frozen or cut off, (b) the run was under way when the lease can have ended, and (c) the same
task ran again under a later epoch. It never excuses a loss.

A worker that comes back has what is left of its last heartbeat until its next one is noted: it may
be given up in that time. So the lease of (b) may end one heartbeat interval past the fault. But it
starts nothing in that time: start.lua refuses while less than half of a lease is left. So an excused
run began before the fault or in the first half of a lease after that, or it had passed its gate when
its process was frozen, and recorded its start as soon as that woke.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from celery_affinity import Affinity
from celery_affinity.types import DeadLetter
from chaos.faults import Fault
from chaos.system import HEARTBEAT_INTERVAL_SECONDS, HEARTBEAT_TIMEOUT_SECONDS, SLOTS
from history import History, Run

#: Cut a worker off from Redis, or stop its heartbeat.
SEVERING = ("freeze_parent", "freeze_tree", "freeze_leader", "blackhole", "drop_replies")
#: Those that stop the processes that run its tasks, too.
FREEZING = ("freeze_tree", "freeze_leader")
#: From the gate's permission to the record of the start, on a loaded machine.
RECORD_SECONDS = 0.5
#: End a process that may just have recorded a task's end, and not yet settled it.
ENDING = (
    "kill_worker", "kill_tree", "kill_child", "kill_leader", "kill_all", "stop_warm", "stop_cold", "stop_twice",
    "rolling_restart", "died", "died_of_busy", "start_failed",
)
#: The kinds of tasks that may be in order only among themselves: each has a tag of its own.
_DUE = "due-"
#: Of the ledger, without any work and with all workers: see tests/acceptance/test_cleanup.py.
LASTING = re.compile(
    r"\{affinity:default\}:(schema|revoked|workers|q:jobs:(c|conf|warm|warmz|wake|vacant|leader|"
    r"idle|dead|deadm|deadz|pace|carried|answer|abroad)|q:\"beat:\w+\":(c|runs|vacant|leader)|[ws]:(?P<incarnation>[0-9a-f]{32}):(info|idle|\d))"
)


def stale_runs(history: History, faults: Sequence[Fault]) -> list[Run]:
    """The runs that the declared limit excuses."""
    severed: dict[str, list[Fault]] = defaultdict(list)
    for fault in faults:
        if fault.verb in SEVERING:
            severed[fault.target].append(fault)
    latest: dict[tuple[str, int, int], int] = {}
    for run in history.runs:
        key = (run.tag, run.seq, run.retries)
        latest[key] = max(latest.get(key, 0), run.epoch or 0)
    return [
        run for run in history.runs
        if (run.epoch or 0) < latest[run.tag, run.seq, run.retries]
        and any(_outlived_its_lease(run, fault) for fault in severed[run.worker])
    ]


def _outlived_its_lease(run: Run, fault: Fault) -> bool:
    # The last heartbeat before the fault may be an interval old.
    lease_ends = fault.begin + HEARTBEAT_TIMEOUT_SECONDS - HEARTBEAT_INTERVAL_SECONDS
    started = run.start / 1e9
    ended = float("inf") if run.end is None else run.end / 1e9
    back = fault.end + HEARTBEAT_INTERVAL_SECONDS
    if back <= lease_ends or ended <= lease_ends:
        return False
    had_passed = fault.verb in FREEZING and fault.end <= started <= fault.end + RECORD_SECONDS
    return had_passed or started <= fault.begin + HEARTBEAT_TIMEOUT_SECONDS / 2 + RECORD_SECONDS


def judge_history(
    history: History, faults: Sequence[Fault], dead: Iterable[DeadLetter] = (), batch_limit: int = 10
) -> tuple[list[str], Counter[str]]:
    """Every broken promise, and what was seen on the way (reruns, excused runs)."""
    buried = buried_tasks(dead)
    found: list[str] = []
    for violation in history.violations(allow_rerun=True):
        if violation.kind == "loss" and _task_of(violation.tag, violation.detail) not in buried:
            found.append(str(violation))
    stale = {id(run) for run in stale_runs(history, faults)}
    rest = History([run for run in history.runs if id(run) not in stale], history.submits)
    for violation in rest.violations(allow_rerun=True):
        if violation.kind == "process" and _child_was_killed(rest, violation.tag, violation.detail, faults):
            continue
        if violation.kind != "loss" and not (violation.kind == "order" and violation.tag.startswith(_DUE)):
            found.append(str(violation))
    found += _twice_without_cause(rest, faults)
    found += long_leases(rest, batch_limit)
    seen = Counter(
        runs=len(history.runs), tasks=len(history.submits), reruns=history.reruns(),
        excused=len(stale), buried=len(buried),
    )
    return found, seen


def buried_tasks(dead: Iterable[DeadLetter]) -> dict[tuple[str, int], DeadLetter]:
    """Dead letters that may be there: started max_deliveries times without an end."""
    tasks = {}
    for letter in dead:
        if "max_deliveries" in letter.reason and letter.attempts >= 3:
            args = json.loads(b64decode(json.loads(letter.message)["body"]))[0]
            tasks[args[0], args[1]] = letter
    return tasks


def _task_of(tag: str, detail: str) -> tuple[str, int]:
    return tag, int(detail.split()[1])


def _twice_without_cause(history: History, faults: Sequence[Fault]) -> list[str]:
    """Runs that ended, and whose task ran again although nobody ended or severed their worker."""
    causes: dict[str, list[Fault]] = defaultdict(list)
    for fault in faults:
        if fault.verb in ENDING + SEVERING:
            causes[fault.target].append(fault)
    runs: dict[tuple[str, int, int], list[Run]] = defaultdict(list)
    for run in history.runs:
        runs[run.tag, run.seq, run.retries].append(run)
    found = []
    for of_task in runs.values():
        for run in of_task[:-1]:
            at = (run.end or run.start) / 1e9
            if run.outcome == "aborted":
                continue
            if not any(fault.begin - 5 < at and run.start / 1e9 < fault.end + 1 for fault in causes[run.worker]):
                what = "ended" if run.end is not None else "did not end"
                found.append(f"doubled of {run.tag!r}: {run} {what} and ran again without a cause")
    return found


def _child_was_killed(history: History, tag: str, detail: str, faults: Sequence[Fault]) -> bool:
    epoch = int(detail.split()[1])
    runs = [run for run in history.runs if run.tag == tag and run.epoch == epoch]
    begin, end = runs[0].start / 1e9 - 5, (runs[-1].end or runs[-1].start) / 1e9 + 5
    return any(
        fault.verb == "kill_child" and fault.target == runs[0].worker and begin < fault.begin < end
        for fault in faults
    )


def long_leases(history: History, limit: int, slots: int = SLOTS) -> list[str]:
    """Leases that went on past their batch although other tags waited.

    A tag waits for sure at a moment if a task of it has not started and one that was sent after
    it has: it was admitted before that. (Held by slots are at most `slots` of those, and as many
    again by lost workers.) Due and retried tasks are not counted, so less is convicted, not more.
    """
    order = {task: place for place, task in enumerate(history.submits)}
    waiting: Counter[str] = Counter()
    tasks = [task for task in history.submits if not task[0].startswith(_DUE)]
    admitted, upto = 0, -1
    started: set[tuple[str, int]] = set()
    lengths: dict[tuple[str, int], int] = defaultdict(int)
    crowded_at: dict[tuple[str, int], bool] = {}
    found = []
    for run in history.runs:
        task = (run.tag, run.seq)
        if not run.tag.startswith(_DUE):
            upto = max(upto, order.get(task, -1))
            while admitted < len(tasks) and order[tasks[admitted]] <= upto:
                if tasks[admitted] not in started:
                    waiting[tasks[admitted][0]] += 1
                admitted += 1
            if task not in started and task in order:
                started.add(task)
                waiting[run.tag] -= 1
                if not waiting[run.tag]:
                    del waiting[run.tag]
        lease = (run.tag, run.epoch or 0)
        lengths[lease] += 1
        crowded = len(waiting) > 2 * slots + 2
        if lengths[lease] == limit - 1:
            crowded_at[lease] = crowded
        if lengths[lease] == limit + 1 and crowded and crowded_at.get(lease):
            found.append(f"batch of {run.tag!r}: epoch {run.epoch} went past {limit} while {len(waiting)} tags waited")
    return found


def judge_ledger(affinity: Affinity, client: Any, slots: int = SLOTS) -> list[str]:
    """What is left in the ledger of a system that is whole and has nothing to do."""
    stats = affinity.stats("jobs")
    found = [
        f"leak: {name} is {value}, not {expected}"
        for name, value, expected in (
            ("pending", stats.pending, 0), ("entries", stats.entries, 0),
            ("scheduled", stats.scheduled, 0), ("ready_tags", stats.ready_tags, 0),
            ("held_tags", stats.held_tags, 0), ("idle_slots", stats.idle_slots, slots),
        )
        if value != expected
    ]
    if stats.idle_slots != slots:
        found += [f"  {line}" for line in slots_of(affinity, client)]
    living = {worker.worker_id for worker in affinity.workers()}
    names = [key.decode() for key in client.scan_iter("*", count=1000)]
    for name in names:
        if name.startswith("{affinity"):
            match = LASTING.fullmatch(name)
            if match is None or (match["incarnation"] or min(living)) not in living:
                found.append(f"leak: key {name!r} is nobody's")
        for part in re.findall(r"jobs\.worker\.[^.]+@[^.]+\.([0-9a-f]{12})", name):
            if not any(incarnation.startswith(part) for incarnation in living):
                found.append(f"leak: queue or binding {name!r} of a worker that is gone")
    return found


def slots_of(affinity: Affinity, client: Any) -> list[str]:
    """What the ledger says of each worker's slots, for whoever looks for a lost one."""
    lines = []
    for worker in affinity.workers():
        key = f"{{affinity:default}}:w:{worker.worker_id}:"
        lines.append(
            f"{worker.name} {worker.worker_id} draining={worker.draining} idle={client.smembers(key + 'idle')} "
            f"leased={client.smembers(key + 'leased')} busy={client.hgetall(key + 'busy')} "
            f"owed={client.lrange(key + 'owed', 0, -1)} {worker.slots}"
        )
    return [*lines, f"idle of the queue: {client.zrange('{affinity:default}:q:jobs:idle', 0, -1)}"]
