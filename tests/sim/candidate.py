"""A process that schedules: the real scheduler, in a group of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from celery_affinity.burials import Burials
from celery_affinity.intake import Intake, no_tag
from celery_affinity.leadership import Elector
from celery_affinity.scheduler import Scheduler

from .server import PENDING, STATE
from .virtual import SimDoorbell
from .world import Group, SimScripts

if TYPE_CHECKING:
    from .history import History

__all__ = ("LEADER_TTL", "TIMEOUT", "Candidate")

LEADER_TTL = 5.0
TIMEOUT = 10.0


class Candidate(Group):
    """A process that schedules."""

    def __init__(self, history: History, number: int) -> None:
        super().__init__(f"s{number}")
        world, rng = history.world, history.world.rng
        scripts = SimScripts(world)
        rescuer, intake = history.bugs.rescuer(scripts, STATE, TIMEOUT), Intake(scripts, STATE, [PENDING], no_tag)
        if rng.random() < 0.3:
            rescuer.BATCH, intake.BATCH = 1, 2
        self.scheduler = Scheduler(
            scripts, history.queue, Elector(scripts, STATE, f"{self.name}/1", LEADER_TTL), intake,
            rescuer, Burials(scripts, STATE, history.tell), lambda lists: SimDoorbell(world, lists), [PENDING],  # type: ignore[arg-type, return-value]
        )  # fmt: skip
        self.actor = world.spawn(self.name, self, self.scheduler.run)
        self.actor.crash = lambda: world.kill_group(self)
