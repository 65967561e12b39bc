"""Explanations in words."""

from __future__ import annotations

from collections.abc import Iterator

from celery_affinity.cli.rendering import duration, shown
from celery_affinity.types import HoldRecord, TagExplanation, TaskExplanation

__all__ = ("nothing_words", "tag_words", "task_words")

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


def tag_words(tag: TagExplanation) -> Iterator[str]:
    """A tag's explanation, a line each."""
    for hold in tag.holds:
        yield f"holds: {_hold(hold)}"
    if not tag.holds:
        last = f" (last: {tag.last_slot})" if tag.last_slot else ""
        yield f"holds: no slot{last}"
    if tag.waiting:
        oldest = f", oldest {duration(tag.oldest_seconds)}" if tag.oldest_seconds else ""
        yield f"waiting: {tag.waiting}{oldest}"
    else:
        yield "waiting: none"
    if tag.place is not None:
        about = f", about {duration(tag.wait_seconds)}" if tag.wait_seconds is not None else ""
        yield f"turn: {_nth(tag.place)} in the ring of {tag.ready_tags}{about}"
    for obstacle in tag.obstacles:
        yield f"why: {shown(obstacle, 200)}"


def nothing_words(tag: TagExplanation, unseen: str = "", has_dead: bool = False) -> str:
    """What is said where the ledger has neither a tag nor a task of that name.

    Arguments:
        unseen: Why it cannot be seen whether one waits on the broker; "" if it can.
        has_dead: Whether dead letters of that tag are kept.
    """
    text = f"{shown(tag.tag)}: no tag and no task of that name in {tag.queue!r}"
    if has_dead:
        text += ", but dead letters of that tag (see `dead list --tag`)"
    if tag.pending is None:
        return f"{text}; the broker does not answer: what waits there is not known"
    if tag.pending:
        text = f"{text}; {tag.pending} messages of its pending queue are not taken in yet"
        return f"{text}, and it may be among them: {shown(unseen, 200)}" if unseen else text
    return f"{text}: it has ended, or was never sent there"


def _hold(hold: HoldRecord) -> str:
    batch = f"{hold.current_batch_size} of {hold.max_batch_size} of its batch"
    if hold.current_batch_size > hold.max_batch_size:
        batch = f"{hold.current_batch_size} tasks, a batch of {hold.max_batch_size} extended"
    doing = "its next task is on the way"
    if hold.running_seconds is not None:
        doing = f"running {hold.task} {duration(hold.running_seconds)}"
    return f"{hold.worker} slot {hold.slot}, epoch {hold.epoch}, {batch}, {doing}"


def task_words(task: TaskExplanation) -> Iterator[str]:
    """A task's explanation, a line each, its tag's with it."""
    name = f"{task.task or 'task'} {shown(task.task_id)}"
    if task.state == "unknown":
        yield f"{name}: not in {task.queue!r}: it has ended, or was never sent there"
        return
    if task.state == "unseen":
        yield f"{name}: {_unseen(task)}"
        return
    if task.state == "pending":
        yield f"{name}: number {task.entry} in the pending queue; a scheduler has to take it in"
        return
    if task.state == "buried":
        yield f"{name}: dead letter {task.entry}: {shown(task.reason, 200)}"
        return
    if task.state == "scheduled":
        yield f"{name}: due in {duration(task.due_seconds or 0.0)}"
    elif task.state == "waiting":
        yield f"{name}: waits, {task.ahead} tasks of its tag before it"
    elif task.state == "dispatched":
        yield f"{name}: sent to its slot, not started"
    else:
        yield f"{name}: runs"
    if task.tag is not None:
        yield f"tag: {shown(task.tag.tag)}"
        yield from tag_words(task.tag)


def _unseen(task: TaskExplanation) -> str:
    text = f"not in the ledger of {task.queue!r}: it has ended, was never sent there, or waits"
    if task.unseen is None:
        return f"{text} on the broker; {shown(task.reason, 200)}"
    return f"{text} among {task.unseen} messages on the broker; {shown(task.reason, 200)}"


def _nth(place: int) -> str:
    if place <= len(ORDINALS):
        return ORDINALS[place - 1]
    ending = "th" if 10 < place % 100 < 20 else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{ending}"
