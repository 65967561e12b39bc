"""What `celery affinity` says before it does anything, and how it prints."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from celery import Celery
from click.testing import CliRunner

from celery_affinity import Affinity, AffinityQueue
from celery_affinity.cli import affinity
from celery_affinity.cli.rendering import duration, lines, rich_table, shown


def test_a_queue_that_is_not_declared_is_refused_before_anything_is_asked() -> None:
    app = Celery("cli", broker="redis://127.0.0.1:1/0", set_as_current=False)
    Affinity(app, queues=[AffinityQueue("jobs")])
    done = CliRunner().invoke(affinity, ["evacuate", "jbos"], obj=SimpleNamespace(app=app))
    assert done.exit_code == 1
    assert done.output.strip() == "Error: 'jbos' is not an affinity queue (declared: 'jobs')"


def test_without_rich_tables_are_plain_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("a", 5, None), ("bcd", 1000, "x")]
    assert rich_table(("tag", "waiting", "slots"), rows) is not None
    monkeypatch.setitem(sys.modules, "rich", None)
    assert rich_table(("tag", "waiting", "slots"), rows) is None
    assert lines(("tag", "waiting", "slots"), rows) == [
        "tag  waiting  slots", "a          5  -", "bcd     1000  x"
    ]  # fmt: skip


def test_a_tag_cannot_write_to_the_terminal() -> None:
    assert shown("a\x1b[2Jb\nc") == "a\\x1b[2Jb\\nc"
    assert shown("\u00fc" * 100, 10) == "\u00fc" * 7 + "..."


def test_times_are_told_in_the_unit_that_fits() -> None:
    told = [duration(seconds) for seconds in (0.04, 9.94, 40, 119, 600, 7200 * 2)]
    assert told == ["0.0 s", "9.9 s", "40 s", "119 s", "10 min", "4 h"]
