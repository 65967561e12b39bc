"""The gate's own laws, with a ledger that answers as it is told."""

from __future__ import annotations

from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from gevent import Timeout
from redis.exceptions import ConnectionError

from celery_affinity import gate as gate_module
from celery_affinity import patience as patience_module
from celery_affinity import starts as starts_module
from celery_affinity.gate import REFUSED, Gate
from celery_affinity.message import STAMP_HEADER, TAG_HEADER


class Ledger:
    """Answers each `start` with the next answer, after so many seconds of the test's clock."""

    def __init__(self, *answers: tuple[int, float], grants: str = "") -> None:
        self.now = 0.0
        self.tokens: list[str] = []
        self.settled = 0
        self.refusals = 0
        #: Tokens that settles proposed, and those that were declined.
        self.proposed: list[str] = []
        self.declined: list[str] = []
        self.away = False
        self._answers = list(answers)
        #: The entry that the first settle grants a start.
        self._grants = grants

    def refused(self, state: str) -> None:
        assert state == "jobs"
        self.refusals += 1

    def start(self, *arguments: Any) -> int:
        self.tokens.append(arguments[-2])
        answer, took = self._answers.pop(0)
        self.now += took
        return answer

    def settle(self, *arguments: Any, grant: str, least_ms: int) -> str:
        assert least_ms == 5000
        self.settled += 1
        self.proposed.append(grant)
        granted, self._grants = self._grants, ""
        return f"held {granted}" if granted else "empty"

    def decline(self, *arguments: Any) -> bool:
        self.declined.append(arguments[-1])
        if self.away:
            raise ConnectionError("away")
        return True

    def occupy(self, *arguments: Any) -> bool:
        return True

    def vacate(self, *arguments: Any) -> bool:
        return True


def gate_of(
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
    slot: int | None = 0,
    incarnations: tuple[str, ...] = ("inc",),
) -> Gate:
    """A gate that trusts 5 s, so a grant 1 s."""
    for module in (starts_module, gate_module):
        monkeypatch.setattr(module, "seconds", lambda: ledger.now)
    return Gate(
        connect=lambda: ledger,  # type: ignore[arg-type, return-value]
        refusal=lambda text: text, queue_names={}, node="w1", incarnations=incarnations, slot=slot,
        in_process=False, trust_seconds=5.0,
    )


class OneAway(Ledger):
    """The node's second shard does not answer."""

    up: list[str]

    def _told(self, incarnation: str) -> bool:
        if incarnation == "inc-1" and self.away:
            raise ConnectionError("away")
        return True

    def process_up(self, incarnation: str, slot: int) -> bool:
        self.up = [*getattr(self, "up", []), incarnation]
        return self._told(incarnation)

    def occupy(self, incarnation: str, *arguments: Any) -> bool:
        return self._told(incarnation)

    def vacate(self, incarnation: str, *arguments: Any) -> bool:
        return self._told(incarnation)


@pytest.fixture
def one_away(monkeypatch: pytest.MonkeyPatch) -> tuple[OneAway, Gate]:
    def waits(seconds: float) -> None:
        raise AssertionError("it waits for the shard that does not answer")

    ledger = OneAway((1, 0.0), (1, 0.0))
    gate = gate_of(ledger, monkeypatch, incarnations=("inc", "inc-1"))
    monkeypatch.setattr(patience_module.time, "sleep", waits)
    ledger.away = True
    return ledger, gate


def test_a_new_process_does_not_wait_for_a_shard_whose_task_it_does_not_run(
    one_away: tuple[OneAway, Gate],
) -> None:
    ledger, gate = one_away
    gate.process_up()
    assert message(gate, 1) == "ran"
    ledger.away = False
    ledger.up.clear()
    request = {TAG_HEADER: "tag", STAMP_HEADER: "2 9 2 inc-1 0 1 1 jobs"}
    assert gate.around(lambda uuid, args, kwargs, request: "ran")("id", (), {}, request) == "ran"
    assert ledger.up == ["inc-1"], "that one has to know before anything of it starts"


def test_an_ordinary_task_does_not_keep_its_process_for_a_further_shard(
    one_away: tuple[OneAway, Gate],
) -> None:
    _, gate = one_away
    assert message(gate, None) == "ran"
    assert message(gate, 1) == "ran"


@pytest.mark.parametrize("late", ["occupy", "vacate"])
def test_a_soft_time_limit_that_strikes_beside_an_ordinary_task_leaves_no_slot_occupied(
    late: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is meant for the task: raised in a call to the ledger, it kept the slot from all leases."""
    ledger, calls = Ledger(), []

    def called(name: str) -> bool:
        calls.append(name)
        if name == late and calls.count(name) == 1:
            raise SoftTimeLimitExceeded
        return True

    monkeypatch.setattr(ledger, "occupy", lambda *_: called("occupy"))
    monkeypatch.setattr(ledger, "vacate", lambda *_: called("vacate"))
    assert message(gate_of(ledger, monkeypatch), None) == "ran"
    assert calls == ["occupy", "vacate"] + ["vacate"] * (late == "vacate")


@pytest.mark.parametrize("away, entry", [("start", 1), ("settle", 1), ("vacate", None)])
def test_a_soft_time_limit_that_strikes_while_the_gate_waits_for_redis_is_let_pass(
    away: str, entry: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was raised in the wait: what had succeeded failed, and a slot stayed occupied."""
    ledger, calls = Ledger((1, 0.0)), []
    answers = getattr(ledger, away)

    def once_away(*arguments: Any, **named: Any) -> Any:
        calls.append(away)
        if len(calls) == 1:
            raise ConnectionError("away")
        return answers(*arguments, **named)

    gate = gate_of(ledger, monkeypatch)
    monkeypatch.setattr(ledger, away, once_away)
    strike_in_the_first_wait(monkeypatch)
    assert message(gate, entry) == "ran"
    assert len(calls) == 2


def test_a_soft_time_limit_that_strikes_while_the_heartbeat_is_late_is_let_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = gate_of(Ledger((-5, 0.0), (1, 0.0)), monkeypatch)
    strike_in_the_first_wait(monkeypatch)
    assert message(gate, 1) == "ran"


def strike_in_the_first_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 1:
            raise SoftTimeLimitExceeded

    monkeypatch.setattr(patience_module.time, "sleep", sleep)


def test_a_greenlets_time_limit_that_strikes_while_its_slot_is_vacated_leaves_none_occupied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ledger, calls = Ledger(), []

    def vacate(*_: Any) -> bool:
        calls.append("vacate")
        if len(calls) == 1:
            raise Timeout(1)
        return True

    monkeypatch.setattr(ledger, "vacate", vacate)
    with pytest.raises(Timeout):
        message(gate_of(ledger, monkeypatch, slot=None), None)
    assert len(calls) == 2


def message(gate: Gate, entry: int | None, epoch: int = 2) -> Any:
    """What a message's tracer answers behind the gate; without an entry, an ordinary one's."""
    request = {TAG_HEADER: "tag"}
    if entry is not None:
        request[STAMP_HEADER] = f"{entry} {epoch} {entry} inc 0 1 1 jobs"
    return gate.around(lambda uuid, args, kwargs, request: "ran")("id", (), {}, request)


def run(monkeypatch: pytest.MonkeyPatch, ledger: Ledger) -> Any:
    return message(gate_of(ledger, monkeypatch), 1)


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


# A start that the settle before has granted (starts.py)


def test_what_a_settle_granted_runs_without_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger((1, 0.0), grants="2")
    gate = gate_of(ledger, monkeypatch)
    assert [message(gate, 1), message(gate, 2)] == ["ran", "ran"]
    assert len(ledger.tokens) == 1, "one question for two tasks"
    assert ledger.proposed[0].endswith("?") and ledger.proposed[0] != ledger.tokens[0]


def test_a_grant_is_for_one_run_of_one_entry_of_one_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger((1, 0.0), (-1, 0.0), (-1, 0.0), (-1, 0.0), grants="2")
    gate = gate_of(ledger, monkeypatch)
    message(gate, 1)
    assert [message(gate, 1), message(gate, 3, epoch=7)] == [REFUSED, REFUSED]
    assert message(gate, 2) == "ran", "what came before and other leases leave it as it is"
    assert message(gate, 2) == REFUSED
    assert not {ledger.proposed[0]} & set(ledger.tokens)


def test_a_grant_that_is_late_is_asked_for_with_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger((1, 0.0), (-1, 0.0), grants="2")
    gate = gate_of(ledger, monkeypatch)
    message(gate, 1)
    ledger.now += 1.1
    assert message(gate, 2) == REFUSED
    assert ledger.tokens[1] == ledger.proposed[0], "the ledger may have started it with this one"


def test_a_grant_is_as_old_as_the_first_time_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger((1, 0.0), (1, 0.0), grants="2")
    gate = gate_of(ledger, monkeypatch)
    answer, lost = ledger.settle, []

    def settle(*arguments: Any, **options: Any) -> str:
        if not lost:
            lost.append(True)
            ledger.now += 1.1
            raise ConnectionError("the reply is lost")
        return answer(*arguments, **options)

    monkeypatch.setattr(ledger, "settle", settle)
    message(gate, 1)
    assert message(gate, 2) == "ran"
    assert ledger.tokens[1:] == ledger.proposed[:1], "a repeated settle gets its first answer, which is old"


def test_a_process_that_ends_declines_its_grant(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger((1, 0.0), grants="2")
    gate = gate_of(ledger, monkeypatch)
    message(gate, 1)
    gate.close()
    gate.close()
    assert ledger.declined == ledger.proposed[:1]


def test_a_grant_is_declined_before_an_ordinary_task(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger((1, 0.0), (1, 0.0), grants="2")
    gate = gate_of(ledger, monkeypatch)
    assert [message(gate, 1), message(gate, None), message(gate, 2)] == ["ran"] * 3
    assert ledger.declined == ledger.proposed[:1]
    assert ledger.tokens[1] not in ledger.proposed, "a declined one is asked for like any other"


def test_a_grant_that_could_not_be_declined_is_declined_later(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger((1, 0.0), (1, 0.0), grants="2")
    ledger.away = True
    gate = gate_of(ledger, monkeypatch)
    message(gate, 1)
    message(gate, None)
    ledger.away = False
    assert message(gate, 2) == "ran"
    assert ledger.declined == ledger.proposed[:1] * 2
    assert ledger.tokens[1] not in ledger.proposed, "the first decline may arrive while it runs"


def test_a_grant_whose_message_was_overtaken_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger((1, 0.0), (-4, 0.0), (1, 0.0), grants="2")
    gate = gate_of(ledger, monkeypatch)
    message(gate, 1)
    assert message(gate, 3) == REFUSED
    assert ledger.declined == ledger.proposed[:1], "nobody else knows that it does not run"
    assert message(gate, 2) == "ran"
    assert ledger.tokens[2] not in ledger.proposed


def test_where_a_slot_is_no_process_nothing_is_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger((1, 0.0))
    message(gate_of(ledger, monkeypatch, slot=None), 1)
    assert ledger.proposed == [""]


# What joins a batch task


class Joiners(Ledger):
    """Answers each `take` with the next answer, after so many seconds."""

    def __init__(self, *takes: tuple[int, float], grants: str = "") -> None:
        super().__init__((1, 0.0), grants=grants)
        self.takes, self.took, self.joint = list(takes), [], 0

    def take(self, *arguments: Any) -> tuple[int, list[tuple[str, bytes]]]:
        *_, token, least_ms, _task, _most_bytes = arguments
        assert least_ms == 5000
        self.took.append(token)
        code, took = self.takes.pop(0)
        self.now += took
        return code, [("7", b"")] if code == 1 else []

    def settle_batch(self, *arguments: Any) -> str:
        assert arguments[-1] == "ends"
        self.joint += 1
        return "held"


class Batch:
    """A batch task whose call says so."""

    name, most_bytes = "t", 1000

    def call(self, run: Any, request: Any, found: Any) -> Any:
        return self

    def trace(self, tracer: Any, *arguments: Any) -> str:
        return f"{tracer(*arguments)} together"

    def ends(self, run: Any, outcome: str, words: Any) -> str:
        return "ends"


def call(gate: Gate, entry: int) -> Any:
    """What the tracer of a batch task's message answers behind the gate."""
    request = {TAG_HEADER: "tag", STAMP_HEADER: f"{entry} 2 {entry} inc 0 1 1 jobs"}
    return gate.around(lambda uuid, args, kwargs, request: "ran", Batch())("id", (), {}, request)


def test_a_call_takes_and_settles_with_the_token_of_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Joiners((1, 0.0), grants="2")
    gate = gate_of(ledger, monkeypatch)
    assert [message(gate, 1), call(gate, 2)] == ["ran", "ran together"]
    assert ledger.took == ledger.proposed, "it was granted"
    assert (ledger.settled, ledger.joint) == (1, 1)


def test_a_call_is_not_begun_on_an_old_answer_or_behind_a_late_heartbeat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ledger = Joiners((1, 6.0), (-5, 0.0), (-1, 0.0))
    assert call(gate_of(ledger, monkeypatch), 1) == REFUSED
    assert len(ledger.took) == 3 and set(ledger.took) == set(ledger.tokens)
    assert (ledger.settled, ledger.joint) == (0, 0)
