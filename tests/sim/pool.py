"""What a node's parent knows of its jobs and of what runs them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from celery_affinity.message import Stamp

from .world import Actor

__all__ = ("Job", "Process")


@dataclass
class Job:
    """A task message inside a node."""

    headers: dict[str, Any]
    stamp: Stamp | None
    announced: bool = False
    accepted: bool = False
    ended: bool = False
    #: Past its time limit: the pool tells of the end of its process no more.
    limited: bool = False


@dataclass(eq=False)
class Process:
    """What runs tasks: a pool process, or a thread."""

    actor: Actor
    index: int
    job: Job | None = None
    token: str = ""
    #: How its parent knows it.
    identity: str = ""
    dying: bool = False
    closing: bool = False
    #: Jobs handed to it: one at most.
    box: list[Job] = field(default_factory=list)
