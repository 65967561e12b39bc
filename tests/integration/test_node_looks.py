"""Laws of what a node looks for after its heartbeats, on a real ledger and a clock of the test's own."""

from __future__ import annotations

from uuid import uuid4

import pytest

from celery_affinity.embedded import Server
from celery_affinity.keys import Keys
from celery_affinity.namesake import Namesake
from celery_affinity.scripts import Scripts
from celery_affinity.vacancy import Vacancy


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def scripts(shared_server: Server, namespace: str) -> Scripts:
    return Scripts(shared_server.client(), Keys(namespace))


def look(watch: Vacancy | Namesake, scripts: Scripts, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    watch.look(scripts)
    return caplog.messages


def test_a_vacancy_is_told_after_its_patience_once_for_each_queue(
    scripts: Scripts, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    watch = Vacancy({"j": "jobs", "m": "mails"}, 10.0, clock)
    term, _ = scripts.claim("m", "beat@host/1/a", 60_000)
    assert look(watch, scripts, caplog) == []
    clock.now += 9.9
    assert look(watch, scripts, caplog) == []
    clock.now += 0.2
    (message,) = look(watch, scripts, caplog)
    assert "'jobs'" in message
    clock.now += 100
    assert look(watch, scripts, caplog) == []
    scripts.resign("m", f"beat@host/1/a {term}")
    assert look(watch, scripts, caplog) == []
    clock.now += 9.9
    assert look(watch, scripts, caplog) == [], "its own patience"
    scripts.claim("j", "w1@host/2/b", 60_000)
    assert look(watch, scripts, caplog) == ["The affinity queue 'jobs' is scheduled again, by w1@host/2/b."]


def test_a_change_of_leaders_is_no_vacancy(
    scripts: Scripts, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    watch = Vacancy({"j": "jobs"}, 10.0, clock)
    for number in range(5):
        assert look(watch, scripts, caplog) == []
        clock.now += 9
        assert look(watch, scripts, caplog) == []
        term, _ = scripts.claim("j", f"c{number}", 60_000)
        assert look(watch, scripts, caplog) == []
        scripts.resign("j", f"c{number} {term}")


def test_looking_for_a_leader_is_one_command(server: Server, namespace: str) -> None:
    scripts = Scripts(server.client(), Keys(namespace))
    watch = Vacancy({f"q{n}": f"q{n}" for n in range(10)}, 10.0)
    watch.look(scripts)
    before = scripts.client.info("stats")["total_commands_processed"]
    watch.look(scripts)
    assert scripts.client.info("stats")["total_commands_processed"] - before == 2  # and the INFO


def registered(scripts: Scripts, name: str) -> str:
    incarnation = uuid4().hex
    scripts.register(
        incarnation, name=name, depth=1, slots=1, queues=[("j", 1, f"{incarnation}.list")],
        junk=[], role="both", timeout_ms=60_000,
    )
    return incarnation


@pytest.mark.parametrize(
    "fate", ["beats", "is silent", "is rebased", "has another name", "drains", "drains later", "leaves"]
)
def test_a_namesake_is_one_that_is_alive_and_stays(
    scripts: Scripts, caplog: pytest.LogCaptureFixture, fate: str
) -> None:
    elder = registered(scripts, "w2@host" if fate == "has another name" else "w1@host")
    if fate == "drains":
        scripts.drain(elder)
    watch = Namesake("w1@host", "newcomer")
    watch.before_registration(scripts)
    own = registered(scripts, "w1@host")
    if fate == "drains later":
        scripts.drain(elder)
    elif fate == "leaves":
        scripts.leave(elder)
    told = []
    for beat in range(3):
        if fate == "is rebased":  # what a new leader does for all, the dead among them
            term, _ = scripts.claim("j", "c", 60_000)
            assert scripts.rebase("j", f"c {term}")
        elif fate not in ("is silent", "leaves"):
            scripts.heartbeat(elder, f"1.{beat}", 1000, [])
        scripts.heartbeat(own, f"2.{beat}", 1000, [])
        told += look(watch, scripts, caplog)
    assert len(told) == (fate == "beats"), told
    assert all(elder in message for message in told)


def test_a_node_without_a_namesake_asks_nothing_more(server: Server, namespace: str) -> None:
    scripts = Scripts(server.client(), Keys(namespace))
    watch = Namesake("w1@host", "newcomer")
    watch.before_registration(scripts)
    before = scripts.client.info("stats")["total_commands_processed"]
    watch.look(scripts)
    assert scripts.client.info("stats")["total_commands_processed"] - before == 1
