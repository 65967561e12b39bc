"""A node's reports where it serves several shards: by the name that a message's stamp has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from celery_affinity.message import Stamp
from celery_affinity.reporter import Reporter
from celery_affinity.reporters import Reporters
from celery_affinity.scripts import Scripts
from celery_affinity.sharded_scripts import ShardedScripts
from celery_affinity.watchdog import Lifeline


class Ledger:
    """Notes who is told what."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def discard(self, incarnation: str, *_: Any) -> int:
        self.told.append(incarnation)
        return 0


def stamp(incarnation: str, state: str = "jobs") -> Stamp:
    return Stamp("1", "7", "1", incarnation, 0, 1, 1, state)


def reporters() -> tuple[Reporters, list[Ledger]]:
    ledgers = [Ledger(), Ledger()]
    made = {
        name: Reporter(lambda ledger=ledger: ledger, name, dict, 1.0, Lifeline())  # type: ignore[arg-type, misc]
        for name, ledger in zip(("inc", "inc-1"), ledgers, strict=True)
    }
    return Reporters(made), ledgers


def test_each_message_is_reported_to_its_own_shard() -> None:
    made, ledgers = reporters()
    made.discard(stamp("inc-1"), "bury")
    request = SimpleNamespace(id="task")
    made.held.arrived(stamp("inc-1"), request)
    assert [ledger.told for ledger in ledgers] == [[], ["inc-1"]]
    assert [reporter.held.names() for reporter in made.all] == [[], ["0:1:7:1"]]
    assert made.held.names() == ["0:1:7:1"]
    assert made.held.other_request("task", None) is not None
    made.held.ended(stamp("inc-1"), request)
    assert made.held.names() == []


def test_a_stray_message_of_another_node_is_refused_and_stops_nobody() -> None:
    made, ledgers = reporters()
    assert not made.held.was_discarded(stamp("another"))
    made.held.arrived(stamp("another"), None)
    assert not made.discard(stamp("another"), "bury")
    assert [ledger.told for ledger in ledgers] == [["another"], []]
    calls: list[tuple[str, str]] = []
    shards = [SimpleNamespace(client=None, keys=None, _call=lambda name, *args, at=at, **_: calls.append((at, args[0]))) for at in "01"]
    scripts = ShardedScripts({"inc": shards[0], "inc-1": shards[1]})  # type: ignore[dict-item]
    assert isinstance(scripts, Scripts)
    for name in ("inc-1", "another"):
        scripts._call("process_up", name, 0)
    assert calls == [("1", "inc-1"), ("0", "another")]
