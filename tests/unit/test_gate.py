"""The gate's own laws, with a ledger that answers as it is told."""

from __future__ import annotations

from typing import Any

import pytest

from celery_affinity import gate as gate_module
from celery_affinity.gate import REFUSED, Gate
from celery_affinity.message import STAMP_HEADER, TAG_HEADER


class Ledger:
    """Answers each `start` with the next answer, after so many seconds of the test's clock."""

    def __init__(self, *answers: tuple[int, float]) -> None:
        self.now = 0.0
        self.tokens: list[str] = []
        self.settled = 0
        self.refusals = 0
        self._answers = list(answers)

    def refused(self, state: str) -> None:
        assert state == "jobs"
        self.refusals += 1

    def start(self, *arguments: Any) -> int:
        self.tokens.append(arguments[-2])
        answer, took = self._answers.pop(0)
        self.now += took
        return answer

    def settle(self, *arguments: Any) -> str:
        self.settled += 1
        return "empty"


def run(monkeypatch: pytest.MonkeyPatch, ledger: Ledger) -> Any:
    """What a dispatched message's tracer answers behind a gate that trusts 5 s."""
    monkeypatch.setattr(gate_module, "seconds", lambda: ledger.now)
    gate = Gate(
        connect=lambda: ledger,  # type: ignore[arg-type, return-value]
        refusal=lambda text: text, queue_names={}, node="w1", incarnation="inc", slot=0,
        in_process=False, ordinary=False, trust_seconds=5.0,
    )
    request = {STAMP_HEADER: "1 2 1 inc 0 1 1 jobs", TAG_HEADER: "tag"}
    return gate.around(lambda uuid, args, kwargs, request: "ran")("id", (), {}, request)


def test_a_process_that_was_frozen_while_it_asked_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger((1, 6.0), (-1, 0.1))
    assert run(monkeypatch, ledger) == REFUSED
    assert len(set(ledger.tokens)) == 1, "the same token: had nothing happened, it may still run"
    assert ledger.settled == 0
    assert ledger.refusals == 1, "it is counted"


def test_nothing_starts_while_the_heartbeat_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger((-5, 0.0), (-5, 0.0), (1, 0.0))
    assert run(monkeypatch, ledger) == "ran"
    assert len(ledger.tokens) == 3 and len(set(ledger.tokens)) == 1


def test_a_quick_answer_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger((1, 0.1))
    assert run(monkeypatch, ledger) == "ran"
    assert (len(ledger.tokens), ledger.settled) == (1, 1)
