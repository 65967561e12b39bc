"""What a node tells the ledger when its queues or slots change."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError

from celery_affinity.reporter import Reporter
from celery_affinity.watchdog import Lifeline
from harness import wait_until


class FakeScripts:
    """A ledger that can be away, and remembers what it was told."""

    def __init__(self) -> None:
        self.away = False
        self.tried = 0
        self.registered = True
        self.in_force = 0
        self.told: list[tuple[int, Any]] = []

    def _answer(self) -> None:
        self.tried += 1
        if self.away:
            raise RedisConnectionError("away")

    def register(self, incarnation: str, *, change: int, slots: int, **rest: Any) -> int:
        self._answer()
        self.registered, self.in_force = True, change
        self.told.append((change, slots))
        return change

    def heartbeat(self, *arguments: Any) -> tuple[bool, int, int, int]:
        self._answer()
        return self.registered, 0, 0, self.in_force if self.registered else 0

    def serve(self, incarnation: str, change: int, *, slots: int, **rest: Any) -> int | None:
        self._answer()
        if not self.registered:
            return None
        self.in_force = change
        self.told.append((change, slots))
        return 0

    def leave(self, incarnation: str) -> int:
        return 0


@contextmanager
def reporting(scripts: FakeScripts, node: dict[str, Any]) -> Iterator[Reporter]:
    """A reporter that beats, of a node with these slots."""
    reporter = Reporter(
        lambda: scripts,  # type: ignore[arg-type,return-value]
        "incarnation",
        lambda: {"slots": node["slots"], "queues": [], "junk": []},
        0.01,
        Lifeline(),
    )
    reporter.register()
    thread = threading.Thread(target=reporter.run, daemon=True)
    thread.start()
    try:
        yield reporter
    finally:
        reporter.leave()
        thread.join(5)


def test_a_broker_that_is_back_while_the_ledger_is_away_stops_no_worker() -> None:
    """Celery knows errors of its broker only: one of another server ends the worker."""
    scripts = FakeScripts()
    with reporting(scripts, {"slots": 2}) as reporter:
        scripts.away = True
        reporter.reconnected()
        scripts.away = False
        tried = scripts.tried
        wait_until(lambda: scripts.tried > tried, what="the next heartbeat")


def test_a_change_is_told_until_the_ledger_has_it() -> None:
    scripts, node = FakeScripts(), {"slots": 2}
    with reporting(scripts, node) as reporter:
        assert scripts.told == [(0, 2)]
        scripts.away = True
        node["slots"] = 3
        reporter.changed()
        tried = scripts.tried
        wait_until(lambda: scripts.tried >= tried + 3)
        scripts.away = False
        wait_until(lambda: scripts.told[1:] == [(1, 3)])
        scripts.in_force = 0  # restored from an older copy
        wait_until(lambda: scripts.told[1:] == [(1, 3), (1, 3)])
        node["slots"] = 2  # noticed by a beat, without a word
        wait_until(lambda: scripts.told[3:] == [(2, 2)])


def test_a_node_that_was_given_up_registers_with_its_change() -> None:
    scripts, node = FakeScripts(), {"slots": 2}
    with reporting(scripts, node):
        node["slots"] = 3
        wait_until(lambda: scripts.in_force == 1)
        scripts.registered = False
        wait_until(lambda: scripts.registered)
        assert scripts.told[-1] == (1, 3)
        told = len(scripts.told)
        tried = scripts.tried
        wait_until(lambda: scripts.tried >= tried + 3)
        assert len(scripts.told) == told, "it is in force: nothing more to tell"
