"""The harness of chaos starts what Celery's own limits have ended, and takes any other end for a violation."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chaos.faults import FAILED_START, Faults


class Dead:
    """A node that has ended by itself."""

    name = "w1@test"
    alive = False

    def __init__(self, log: str) -> None:
        self._log = log
        self.starts = 0

    def log_text(self) -> str:
        return self._log

    def log_tail(self, lines: int) -> str:
        return self._log

    def destroy(self) -> None:
        pass

    def start(self) -> None:
        self.starts += 1


@pytest.mark.parametrize("log, verb, is_violation", [
    (f"Unrecoverable error: WorkerLostError('{FAILED_START}')", "start_failed", False),
    ("Unrecoverable error: KeyError('x')", "died", True),
])
def test_a_start_that_celery_has_given_up_is_logged_and_repeated_and_no_violation(
    tmp_path: Path, log: str, verb: str, is_violation: bool
) -> None:
    node = Dead(log)
    system: Any = SimpleNamespace(nodes=[node])
    faults = Faults(system, random.Random(0), tmp_path / "faults.jsonl")
    faults.run_due()
    assert [(fault.verb, fault.target) for fault in faults.log] == [(verb, node.name)]
    assert bool(faults.violations) == is_violation
    assert node.starts == 1
