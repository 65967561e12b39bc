"""What the elected beat knows of the last runs of the app's periodic entries.

The records are in Redis; while a term lasts only its holder changes them, so it keeps a copy. A
claim compares the copy with the record, so a copy that is wrong after all (the data set was
emptied) is refused and read anew.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid5

from celery_affinity import dues
from celery_affinity.leadership import Elector
from celery_affinity.message import DUE_HEADER, ONCE_HEADER
from celery_affinity.scripts import Scripts

__all__ = ("Deposed", "Run", "Runs", "run_id", "stamped")

#: Microseconds after which the record of an entry that is scheduled no more is dropped. A rolling
#: deploy, in which beats with an old and a new schedule lead in turn, does not cost a record.
KEPT_MICROS = 3_600_000_000
#: Records that one script drops at most.
FORGET_BATCH = 100
_IDS = UUID("6f0d1e0c-9d5e-4c55-8a3f-5f2f1c9a0b7e")


class Deposed(Exception):
    """The term is over: nothing more may be sent under it."""


@dataclass(frozen=True)
class Run:
    """The last run of an entry: when it was due, in us, and by which schedule."""

    due: int
    mark: str

    def __str__(self) -> str:
        return f"{self.due} {self.mark}"


def run_id(namespace: str, app: str, name: str, due: int) -> str:
    """The task id of a run: the same for whoever publishes it, and however often."""
    return str(uuid5(_IDS, "\0".join((namespace, app, name, str(due)))))


def stamped(entry: Any, due: int, task_id: str) -> Any:
    """The entry with a run's own id; a copy by __dict__, as entries of all kinds allow."""
    options = dict(entry.options or {})
    options.setdefault("task_id", task_id)
    options["headers"] = {
        **(options.get("headers") or {}),
        ONCE_HEADER: task_id,
        DUE_HEADER: dues.moment(due).isoformat(),
    }
    copy: Any = object.__new__(type(entry))
    copy.__dict__.update(vars(entry), options=options)
    return copy


class Runs:
    """The records of one app's entries.

    Does not: know of schedules, or publish.
    """

    def __init__(self, scripts: Scripts, state: str, elector: Elector) -> None:
        self._scripts = scripts
        self._state = state
        self._elector = elector
        self._last: dict[str, Run] = {}
        self._unsent: dict[str, int] = {}

    @property
    def names(self) -> set[str]:
        """Entries that have a record."""
        return set(self._last)

    def load(self) -> None:
        """Read all records anew."""
        client: Any = self._scripts.client
        with client.pipeline(transaction=True) as pipe:
            for name in ("runs", "unsent"):
                pipe.hgetall(self._scripts.keys.queue(self._state, name))
            runs, unsent = pipe.execute()
        self._last = {
            name.decode(): Run(int(due), mark)
            for name, record in runs.items()
            for due, mark in [record.decode().split(" ", 1)]
        }
        self._unsent = {name.decode(): int(due) for name, due in unsent.items()}

    def last(self, name: str) -> Run | None:
        """The record of an entry."""
        return self._last.get(name)

    def unsent(self, name: str) -> int | None:
        """Due time of a run that was claimed and may not have been published."""
        return self._unsent.get(name)

    def begin(self, name: str, run: Run) -> None:
        """Count the entry from a moment on, without a run."""
        self._record(name, run, "begin")

    def claim(self, name: str, run: Run) -> None:
        """Claim a run, which then is `unsent`; where the record is another one it is read anew.

        Raises:
            Deposed: If the term is over.
        """
        if self._record(name, run, "send"):
            self._unsent[name] = run.due

    def confirm(self, name: str, due: int) -> None:
        """The claimed run was published, or is given up."""
        self._scripts.confirm_run(self._state, name, due)
        self._unsent.pop(name, None)

    def forget_all_but(self, names: Collection[str], now: int) -> None:
        """Drop records of entries without one of these names, after a while."""
        gone = [
            (name, str(run))
            for name, run in self._last.items()
            if name not in names and run.due < now - KEPT_MICROS
        ][:FORGET_BATCH]
        if gone and self._scripts.forget_runs(self._state, self._elector.fence, gone) == -1:
            raise Deposed
        for name, _ in gone:
            self._last.pop(name, None)
            self._unsent.pop(name, None)

    def _record(self, name: str, run: Run, how: str) -> bool:
        known = self._last.get(name)
        expected = "" if known is None else str(known)
        answer = self._scripts.claim_run(
            self._state, self._elector.fence, name, expected, str(run), how
        )
        if answer == -1:
            raise Deposed
        if answer == 0:
            self.load()
        else:
            self._last[name] = run
        return answer == 1
