"""Why a tag or a task waits: one look at the ledger, put into a record.

Does not: change anything, or look at more than a bounded part; a task is searched for in pages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from celery_affinity.broker import OutOfSight
from celery_affinity.delivery import Delivery, waiting_elsewhere
from celery_affinity.keys import Keys
from celery_affinity.ledger import Ledger, pace_of
from celery_affinity.operator_scripts import OperatorScripts
from celery_affinity.settings import AffinityQueue
from celery_affinity.types import (
    ChangeRecord,
    HoldRecord,
    TagExplanation,
    TaskExplanation,
    TaskState,
)

__all__ = ("Explainer",)

#: What one step looks through for a task's id: about 2 ms of Redis, however long messages are.
FIND_PAGE = 1000
FIND_BYTES = 1_000_000
CONF = ("evac", "paused", "mapped", "tag_concurrency", "max_batch_size")


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")


class Explainer:
    """Explains tags and tasks of one queue, or of one shard of it.

    Arguments:
        queue: Its part in that shard.
        changes: Reads what operators asked for.
    """

    def __init__(
        self,
        ledger: Ledger,
        scripts: OperatorScripts,
        delivery: Delivery,
        queue: AffinityQueue,
        changes: Callable[[], Sequence[ChangeRecord]],
    ) -> None:
        self._ledger = ledger
        self._scripts = scripts
        self._client: Any = scripts.client
        self._keys: Keys = scripts.keys
        self._delivery = delivery
        self._queue = queue
        self._changes = changes

    def tag(self, tag: str) -> TagExplanation:
        """Where a tag stands."""
        elsewhere = waiting_elsewhere(self._delivery, self._queue)
        found = self._look(tag)
        carried = sum(found[name] for name in found if name.startswith("pending "))
        now = found["now"]
        conf = dict(zip(CONF, found["conf"], strict=True))
        pace = [_text(sample) for sample in found["pace"]]
        place = None if found["rank"] is None else int(found["rank"]) + 1
        rate = pace_of(pace, now)[0]
        concurrency = int(found["limit"] or 0) if conf["mapped"] == b"1" else 0
        holds = self._holds(tag, _text(found["held"]).split(), conf, now)
        return TagExplanation(
            queue=self._queue.name,
            tag=tag,
            holds=tuple(holds),
            concurrency=concurrency or int(conf["tag_concurrency"] or 1),
            waiting=found["waiting"],
            oldest_seconds=_age(found["first"], pace, now),
            place=place,
            ready_tags=found["ready"],
            wait_seconds=place / rate if place and rate else None,
            last_slot=self._last_slot(found["warm"]),
            obstacles=tuple(self._obstacles(tag, found, conf, holds)),
            pending=None if elsewhere is None else elsewhere + carried,
        )

    def _look(self, tag: str) -> dict[str, Any]:
        """All that there is to see of a tag, in one round trip and one moment."""
        key, state = self._keys.queue, self._queue.state
        reads: dict[str, tuple[str, ...]] = {
            "time": ("TIME",),
            "conf": ("HMGET", key(state, "conf"), *CONF),
            "leader": ("GET", key(state, "leader")),
            "free": ("ZCARD", key(state, "idle")),
            "workers": ("ZCARD", self._keys.workers),
            "pace": ("LRANGE", key(state, "pace"), "0", "-1"),
            "ready": ("ZCARD", key(state, "ring")),
            "rank": ("ZRANK", key(state, "ring"), tag),
            "waiting": ("LLEN", self._keys.backlog(state, tag)),
            "first": ("LINDEX", self._keys.backlog(state, tag), "0"),
            "hold": ("ZSCORE", key(state, "hold"), tag),
            **{
                f"pending {name}": ("LLEN", name)
                for name in self._delivery.pending_lists(self._queue)
            },
            **{
                name: ("HGET", key(state, where), tag)
                for name, where in {
                    "held": "held", "limit": "limits", "halted": "halted", "needs": "needs",
                    "moves": "moves", "warm": "warm", "gone": "gone",
                }.items()
            },
        }  # fmt: skip
        with self._client.pipeline(transaction=True) as pipe:
            for command in reads.values():
                pipe.execute_command(*command)
            found = dict(zip(reads, pipe.execute(), strict=True))
        seconds, micros = found["time"]
        found["now"] = int(seconds) * 1000 + int(micros) // 1000
        return found

    def _holds(
        self, tag: str, slots: Sequence[str], conf: dict[str, Any], now: int
    ) -> list[HoldRecord]:
        with self._client.pipeline(transaction=False) as pipe:
            for slot in slots:
                incarnation, _, index = slot.partition(":")
                pipe.hget(self._keys.worker(incarnation, "info"), "name")
                pipe.hmget(
                    self._keys.slot(incarnation, int(index)),
                    "tag",
                    "epoch",
                    "n",
                    "e1",
                    "k1",
                    "began",
                    "b",
                )
            found = pipe.execute()
        entries = [int(values[3]) for values in found[1::2] if values[3]]
        headers = self._ledger.message_headers(self._queue, entries)
        holds = []
        for slot, name, (holds_tag, epoch, n, e1, k1, began, mates) in zip(
            slots, found[::2], found[1::2], strict=True
        ):
            if _text(holds_tag) != tag:
                continue  # it has passed on meanwhile
            about = headers.get(int(e1), {}) if e1 else {}
            holds.append(
                HoldRecord(
                    worker=_text(name),
                    slot=int(slot.partition(":")[2]),
                    epoch=int(epoch),
                    current_batch_size=int(n or 0),
                    max_batch_size=int(conf["max_batch_size"] or self._queue.max_batch_size),
                    entry=int(e1) if e1 else None,
                    task=str(about.get("task", "")),
                    task_id=str(about.get("id", "")),
                    running_seconds=max(0.0, (now - int(began)) / 1000) if k1 and began else None,
                    mates=tuple(int(mate) for mate in _text(mates).split()),
                )
            )
        return holds

    def _last_slot(self, warm: bytes | None) -> str:
        if warm is None:
            return ""
        incarnation, _, index = _text(warm).partition(":")
        name = self._client.hget(self._keys.worker(incarnation, "info"), "name")
        return f"{_text(name)} slot {index}" if name else ""

    def _obstacles(
        self, tag: str, found: dict[str, Any], conf: dict[str, Any], holds: Sequence[HoldRecord]
    ) -> list[str]:
        name, told = self._queue.name, []
        command = f"`celery affinity resume {tag} --queue {name}`"
        halted = _text(found["halted"]).split()
        if "pause" in halted:
            told.append(f"paused{self._by('pause', tag)}; {command}")
        for why in halted:
            kind, _, entry = why.partition(":")
            if kind in ("block", "park"):
                ends = "requeue or purge it" if kind == "block" else command
                told.append(
                    f"{kind}ed by its failed task, dead letter {entry} (on_failure); {ends}"
                )
        hold = found["hold"]
        if hold is not None and float(hold) != float("inf"):
            told.append(f"waits for the retry at its head, due in {_left(hold, found):.1f} s")
        incarnation, _, until = _text(found["moves"]).partition(" ")
        if until and int(until) > found["now"]:
            told.append(f"on its way to {self._name(incarnation)} (move)")
        if found["needs"] is not None:
            told.append(f"waits for a worker that knows the task {_text(found['needs'])!r}")
        if not (found["waiting"] or holds):
            return told
        if conf["paused"]:
            told.append(
                f"queue paused{self._by('pause', '')}; `celery affinity resume --queue {name}`"
            )
        if conf["evac"]:
            told.append(f"queue evacuated; `celery affinity resume --queue {name}`")
        if found["gone"] is not None:
            told.append("what it had is revoked; each task ends as REVOKED when its turn comes")
        if not found["workers"]:
            told.append("no worker is registered; start one")
        if found["leader"] is None:
            told.append(
                "nobody schedules the queue; start `beat -S affinity` or a worker with role both"
            )
        if len(holds) >= int(found["limit"] or conf["tag_concurrency"] or 1) and found["waiting"]:
            told.append("as many of its tasks run as may at once")
        elif found["rank"] is not None and found["workers"] and not found["free"]:
            told.append("no slot is free")
        return told

    def _by(self, what: str, target: str) -> str:
        for change in self._changes():
            if (change.what, change.queue, change.target) == (what, self._queue.name, target):
                return f" by {change.who}"
        return ""

    def _name(self, incarnation: str) -> str:
        name = self._client.hget(self._keys.worker(incarnation, "info"), "name")
        return _text(name) or incarnation

    # A task

    def task(self, task_id: str) -> TaskExplanation | None:
        """Where a task is, if the ledger has it; it is searched in pages."""
        key, state = self._keys.queue, self._queue.state
        entry = self._find(key(state, "m"), task_id)
        if entry is not None:
            return self._admitted(task_id, entry)
        entry = self._find(key(state, "deadm"), task_id)
        if entry is not None:
            return self._buried(task_id, entry)
        for pending in self._delivery.pending_lists(self._queue):
            place = self._find(pending, task_id)
            if place is not None:
                return TaskExplanation(self._queue.name, task_id, "pending", place)
        return None

    def task_elsewhere(self, task_id: str) -> TaskExplanation:
        """What can be said of a task that the ledger's Redis does not have."""
        name, pending, lookout = self._queue.name, self._queue.pending, self._delivery.lookout
        try:
            place = lookout.find(pending, task_id) if lookout is not None else None
        except OutOfSight as error:
            waiting = waiting_elsewhere(self._delivery, self._queue)
            if waiting != 0:
                return TaskExplanation(name, task_id, "unseen", reason=str(error), unseen=waiting)
            place = None
        state: TaskState = "unknown" if place is None else "pending"
        return TaskExplanation(name, task_id, state, place)

    def _find(self, key: str, task_id: str) -> int | None:
        return self._scripts.find(key, task_id, FIND_PAGE, FIND_BYTES)

    def _admitted(self, task_id: str, entry: int) -> TaskExplanation:
        about = self._ledger.message_headers(self._queue, [entry]).get(entry)
        if about is None:
            return TaskExplanation(self._queue.name, task_id, "unknown")  # it has just ended
        text = str(about.get("identify_tag", ""))
        tag = self.tag(text)
        common: dict[str, Any] = {"entry": entry, "task": str(about.get("task", "")), "tag": tag}
        for hold in tag.holds:
            if entry in (hold.entry, *hold.mates):
                state = "dispatched" if hold.running_seconds is None else "running"
                return TaskExplanation(self._queue.name, task_id, state, **common)  # type: ignore[arg-type]
        key, state = self._keys.queue, self._queue.state
        with self._client.pipeline(transaction=True) as pipe:
            pipe.lpos(self._keys.backlog(state, text), str(entry))
            pipe.zscore(key(state, "eta"), f"{entry}:{text}")
            pipe.time()
            ahead, due, (seconds, micros) = pipe.execute()
        if due is not None:
            left = float(due) / 1000 - (seconds + micros / 1e6)
            common["due_seconds"] = max(0.0, left)
            return TaskExplanation(self._queue.name, task_id, "scheduled", **common)
        if ahead is None:  # the second of the two messages that a slot has out
            return TaskExplanation(self._queue.name, task_id, "dispatched", **common)
        return TaskExplanation(self._queue.name, task_id, "waiting", ahead=int(ahead), **common)

    def _buried(self, task_id: str, entry: int) -> TaskExplanation:
        meta = self._client.hget(self._keys.queue(self._queue.state, "dead"), str(entry))
        note = json.loads(_text(meta)) if meta else {}
        about = self._ledger.message_headers(self._queue, [entry]).get(entry, {})
        return TaskExplanation(
            self._queue.name, task_id, "buried", entry, str(about.get("task", "")),
            reason=str(note.get("reason", "")),
        )  # fmt: skip


def _left(due: Any, found: dict[str, Any]) -> float:
    return max(0.0, (float(due) - float(found["now"])) / 1000)


def _age(first: bytes | None, pace: Sequence[str], now: int) -> float | None:
    """For how long an entry has waited at least: since the first note that counts it in."""
    if first is None:
        return None
    for sample in pace:
        at, seq = sample.split(" ")[:2]
        if int(seq) >= int(first):
            return max(0.0, (now - int(at)) / 1000)
    return 0.0
