"""Whoever waits for the result of a buried task is told: by whichever leader, at least once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from celery_affinity.burials import Burials

from .conftest import Bench


class Backend:
    """Remembers what it was told; out of reach at first, if so wanted."""

    def __init__(self, failures: int = 0) -> None:
        self.told: list[tuple[Any, str]] = []
        self._failures = failures

    def __call__(self, message: Mapping[str, Any], reason: str) -> None:
        if self._failures:
            self._failures -= 1
            raise ConnectionError("the result backend is away")
        headers = message.get("headers")
        self.told.append((headers["id"] if isinstance(headers, dict) else None, reason))


def bury(bench: Bench, *tags: object) -> None:
    for tag in tags:
        bench.send(tag, "one")
    bench.admit_all()


def test_whoever_waits_for_a_buried_message_is_told_once(bench: Bench) -> None:
    bench.lead()
    backend = Backend()
    burials = Burials(bench.scripts, "q", backend)
    bury(bench, 1.5)
    bench.push(b'{"headers": null}')
    bench.push(b"\xff\xfe no message at all")
    bench.admit_all()
    assert bench.promote()[2] == 3
    burials.run(bench.fence)
    burials.run(bench.fence)
    assert [task_id for task_id, _ in backend.told] == ["1.5-one", None, None]
    assert "found float 1.5" in backend.told[0][1]
    assert bench.promote()[2] == 0
    assert len(bench.dead()) == 3, "the message is kept"


def test_a_burial_that_could_not_be_told_is_told_later_and_holds_up_nobody(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.lead()
    backend = Backend(failures=1)  # of the first one's errback, maybe
    burials = Burials(bench.scripts, "q", backend)
    bury(bench, 1.5, 2.5)
    burials.run(bench.fence)
    burials.start(bench.fence)
    assert burials._thread is None and backend.told == [], "not before its pause is over"
    monkeypatch.setattr(burials, "_not_before", 0.0)
    burials.start(bench.fence)
    burials._thread.join()
    assert [task_id for task_id, _ in backend.told] == ["2.5-one", "1.5-one"]


@pytest.mark.proves(
    "7: a leader dies while it tells of a burial",
    "the next one tells of it",
)
def test_a_burial_is_told_by_the_next_leader_if_the_first_died_over_it(bench: Bench) -> None:
    bench.lead(candidate="first/1")
    bury(bench, 1.5)
    assert len(bench.scripts.untold("q", 10)) == 1  # and here the first leader dies
    old = bench.fence
    bench.scripts.resign("q", old)
    bench.lead(candidate="second/1")
    backend = Backend()
    Burials(bench.scripts, "q", backend).run(bench.fence)
    assert [task_id for task_id, _ in backend.told] == ["1.5-one"]
    assert bench.scripts.untold("q", 10) == []


def test_a_superseded_leader_strikes_no_note_off(bench: Bench) -> None:
    bench.lead(candidate="first/1")
    old = bench.fence
    bury(bench, 1.5)
    bench.scripts.resign("q", old)
    bench.lead(candidate="second/1")
    Burials(bench.scripts, "q", Backend()).run(old)
    assert len(bench.scripts.untold("q", 10)) == 1
