"""Tells the ledger what it cannot see of a slot: a new process, and ordinary tasks that occupy it.

An ordinary task is any that the ledger did not dispatch. While it runs its slot gets no lease.

Crash windows:
- a slot whose process is gone in an ordinary task is free again when the next one comes up; if
  Redis was away then, before that one's first task
  (test_a_process_that_could_not_announce_itself_does_so_before_its_first_task), or with one of the
  next heartbeats (leftovers.py).
- Redis is away while an ordinary task ends: its slot is vacated when Redis is back
  (test_a_slot_takes_leases_again_after_an_ordinary_task_that_ended_while_redis_was_away).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from celery_affinity.node_scripts import NodeScripts
from celery_affinity.patience import Patience

__all__ = ("Occupancy",)

_Result = TypeVar("_Result")


class Occupancy:
    """One process' word on its slot.

    Arguments:
        incarnations: The node's name in each shard.
        slot: The slot that this process is; None if slots are not processes.
        token: Makes a name for the stay of one ordinary task.
    """

    def __init__(
        self,
        scripts: NodeScripts,
        patience: Patience,
        incarnations: Sequence[str],
        slot: int | None,
        token: Callable[[], str],
    ) -> None:
        self._scripts = scripts
        self._patience = patience
        self._incarnations = incarnations
        self._slot = slot
        self._token = token
        #: The node's names where it is not told that this process is new, or free.
        self._untold: set[str] = set()

    def process_up(self) -> None:
        """This slot has a new process.

        Not patiently: the pool kills a process that does not come up. The heartbeat finds what an
        earlier process had started, too.
        """
        if self._slot is not None:
            self._tell_soon(self._incarnations)

    def announce(self, incarnation: str) -> None:
        """Before a task of that shard: tell it what could not be told."""
        if incarnation in self._untold:
            self._patience.patiently(self._up(incarnation))
            self._untold.discard(incarnation)

    def around(self, ordinary_task: Callable[[], _Result]) -> _Result:
        """Run an ordinary task, and hold its slot meanwhile."""
        token = self._token()
        first, *others = self._incarnations
        self.announce(first)
        self._tell_soon(self._untold)
        # A slot that is a process may work for any shard; of others one shard has one less.
        others = others if self._slot is not None else []
        try:
            for one in (first, *others):
                self._patience.briefly(partial(self._scripts.occupy, one, self._slot, token))
            return ordinary_task()
        finally:
            self._vacate(first, others, token)

    def _vacate(self, first: str, others: Sequence[str], token: str) -> None:
        # Patiently: a slot that is not vacated takes no lease as long as its process lives.
        # Further shards hear of it by the node's next look, too (slot_exchange.py).
        vacate = partial(self._scripts.vacate, first, token)
        try:
            self._patience.patiently(vacate)
        except BaseException:  # a greenlet's time limit, which is meant for the task
            self._patience.patiently(vacate)
            raise
        for one in others:
            if not self._patience.briefly(partial(self._scripts.vacate, one, token)):
                self._untold.add(one)

    def _tell_soon(self, incarnations: Sequence[str] | set[str]) -> None:
        briefly = self._patience.briefly
        self._untold = {one for one in incarnations if not briefly(self._up(one))}

    def _up(self, incarnation: str) -> Callable[[], bool]:
        return partial(self._scripts.process_up, incarnation, self._slot)  # type: ignore[arg-type]
