"""Laws of a Flower that is not there or not as expected: it is said, and the rest goes on."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from celery import Celery
from click.testing import CliRunner, Result
from flower import command as flower_command

from celery_affinity import Affinity, AffinityQueue
from celery_affinity.cli import affinity as group
from celery_affinity.cli import flower as cli_flower
from celery_affinity.flower import host


def run(*arguments: str) -> Result:
    app = Celery("shop", broker="redis://127.0.0.1:1/0", set_as_current=False)
    Affinity(app, queues=[AffinityQueue("jobs")])
    return CliRunner().invoke(group, ["flower", *arguments], obj=SimpleNamespace(app=app))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What Flower's command was started with: its application's class, its options."""
    seen: list[tuple[Any, ...]] = []
    stand_in = click.Command(
        "flower", params=[click.Argument(["tornado_argv"], nargs=-1)],
        callback=lambda tornado_argv: seen.append((flower_command.Flower, tornado_argv)),
    )  # fmt: skip
    monkeypatch.setattr(flower_command, "flower", stand_in)
    return seen


def test_flower_runs_with_the_page_and_its_own_options_and_is_itself_again(
    started: list[tuple[Any, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    stock = flower_command.Flower
    assert run("--port=1", "--basic_auth=a:b").exit_code == 0
    assert started == [(host.Dashboard, ("--port=1", "--basic_auth=a:b"))]
    assert flower_command.Flower is stock
    assert caplog.messages == []


def test_another_version_of_flower_is_named(
    started: list[tuple[Any, ...]], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "version", lambda name: "2.20.1")
    assert run().exit_code == 0
    assert caplog.messages == ["Found Flower 2.20.1; the Affinity page was checked with 2.2."]
    assert len(started) == 1


def test_a_flower_without_the_expected_classes_is_started_as_it_is(
    started: list[tuple[Any, ...]], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "celery_affinity.flower.host", None)
    assert run("--port=1").exit_code == 0
    assert started == [(flower_command.Flower, ("--port=1",))]
    assert "starting it without the Affinity page" in caplog.text


def test_without_flower_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise cli_flower.PackageNotFoundError(name)

    monkeypatch.setattr(cli_flower, "version", missing)
    result = run()
    assert result.exit_code == 1
    assert "pip install 'celery-affinity[flower]'" in result.output


def test_a_navigation_of_another_make_stays_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "navbar.html").write_text("<nav>another one</nav>")
    assert host.Templates(str(tmp_path)).load("navbar.html").generate() == b"<nav>another one</nav>"
    assert "left out: the Affinity tab (the page is at /affinity)" in caplog.text


def test_a_table_of_tasks_of_another_make_gets_no_column(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(host.task_views, "TASK_COLUMNS")
    with host._part("the column of tags among the tasks"):
        host.show_tags(SimpleNamespace())
    assert "left out: the column of tags among the tasks" in caplog.text
