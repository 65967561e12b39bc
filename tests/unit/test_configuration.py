"""Laws of `Affinity` and its tasks in an app that is configured before, later, twice or not at all."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
from celery import Celery, shared_task, signals
from click import Command
from click.testing import CliRunner

from celery_affinity import (
    Affinity,
    AffinityQueue,
    ConfigurationError,
    TagError,
    UndeclaredQueueError,
    affinity_task,
    current,
)
from celery_affinity.appconf import affinity_conf

QUEUES = [AffinityQueue("invoices"), AffinityQueue("mails")]
_numbers = count()


@pytest.fixture
def module() -> Iterator[Callable[..., str]]:
    """Makes a module that holds settings; its name."""
    made = []

    def make(**names: Any) -> str:
        name = f"settings_{next(_numbers)}"
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(names)
        made.append(name)
        return name

    yield make
    for name in made:
        del sys.modules[name]


@pytest.fixture
def new_app() -> Iterator[Callable[..., Celery]]:
    """Makes apps that are not current, and are gone after the test."""
    apps = []

    def make(name: str = "unit", **options: Any) -> Celery:
        apps.append(Celery(name, **{"broker": "memory://", "set_as_current": False, **options}))
        return apps[-1]

    yield make
    for app in apps:
        app.close()


def published(app: Celery, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """The name, the queue and the tag of what the app would publish."""
    calls: list[tuple[str, str, str]] = []

    def send_task(name: str, *args: Any, queue: Any = None, headers: Any = None, **_: Any) -> None:
        calls.append((name, queue, headers["identify_tag"]))

    monkeypatch.setattr(app, "send_task", send_task)
    return calls


# Sources of app.conf


@pytest.mark.parametrize("first", ["affinity", "configuration"])
@pytest.mark.parametrize(
    "namespace, names, origin",
    [
        (None, {"affinity_role": "worker"}, "app.conf.affinity_role"),
        (None, {"AFFINITY_ROLE": "worker"}, "settings.AFFINITY_ROLE"),
        (None, {"CELERY_AFFINITY_ROLE": "worker"}, "settings.CELERY_AFFINITY_ROLE"),
        ("CELERY", {"CELERY_AFFINITY_ROLE": "worker"}, "settings.CELERY_AFFINITY_ROLE"),
        ("CELERY_", {"CELERY_AFFINITY_ROLE": "worker"}, "settings.CELERY_AFFINITY_ROLE"),
        ("shop", {"shop_affinity_role": "worker"}, "app.conf.shop_affinity_role"),
        ("SHOP", {"SHOP_AFFINITY_ROLE": "worker"}, "settings.SHOP_AFFINITY_ROLE"),
    ],
)
def test_a_setting_is_found_as_the_user_wrote_it_whatever_came_first(
    new_app, module, first: str, namespace: str | None, names: dict, origin: str
) -> None:
    app = new_app()
    affinity = Affinity(app, queues=QUEUES) if first == "affinity" else None
    app.config_from_object(module(**names), namespace=namespace)
    affinity = affinity or Affinity(app, queues=QUEUES)
    assert (affinity.settings.role, affinity.origins["role"]) == ("worker", origin)


def test_settings_of_another_namespace_are_not_the_apps(new_app, module) -> None:
    names = {"CELERY_AFFINITY_ROLE": "worker", "SHOP_AFFINITY_LEADER_TTL": 3}
    app = new_app()
    app.config_from_object(module(**names), namespace="SHOP")
    assert affinity_conf(app)[0] == {"leader_ttl": 3}


def test_what_is_set_on_the_app_goes_before_its_module(new_app, module) -> None:
    app = new_app()
    app.conf.affinity_role = "scheduler"
    app.config_from_object(
        module(CELERY_AFFINITY_ROLE="worker", CELERY_AFFINITY_LEADER_TTL=3), namespace="CELERY"
    )
    app.conf.affinity_leader_ttl = 4
    assert affinity_conf(app) == (
        {"role": "scheduler", "leader_ttl": 4},
        {"role": "app.conf.affinity_role", "leader_ttl": "app.conf.affinity_leader_ttl"},
    )


def test_what_a_settings_module_imports_is_no_setting(new_app, module) -> None:
    app = new_app()
    app.config_from_object(module(affinity_task=affinity_task, affinity_module=types))
    assert affinity_conf(app) == ({}, {})


def test_an_unknown_setting_is_refused_under_the_name_that_the_user_wrote(new_app, module) -> None:
    app = new_app()
    affinity = Affinity(app, queues=QUEUES)
    app.config_from_object(module(CELERY_AFFINITY_LEDER_TTL=3), namespace="CELERY")
    with pytest.raises(ConfigurationError) as error:
        _ = affinity.settings
    assert "(from settings.CELERY_AFFINITY_LEDER_TTL): there is no such setting" in str(error.value)


# When it is read


def test_affinity_reads_no_setting_before_one_is_needed(new_app, module) -> None:
    app = new_app(broker=None)
    affinity = Affinity(app)

    @affinity.task(queue="invoices", tag_from="tag", name="unit.lazy")
    def task(tag: str) -> None: ...

    assert not app.configured
    app.config_from_object(module(broker_url="memory://", affinity_queues={"invoices": {}}))
    assert not app.configured
    assert affinity.settings.queue_names == ["invoices"]
    assert app.configured


def test_an_app_that_is_configured_anew_has_its_new_settings(new_app, module) -> None:
    app = new_app()
    affinity = Affinity(app, queues=QUEUES)
    assert affinity.settings.role == "both"
    app.config_from_object(module(affinity_role="worker"))
    assert affinity.settings.role == "worker"


def test_the_command_line_is_read_into_the_settings_of_the_app_that_it_names(new_app) -> None:
    app, other = new_app(), new_app()
    for one in (app, other):
        Affinity(one, queues=QUEUES, role="both")
    again = Affinity(app, queues=QUEUES, role="both")  # replaces the first: one option is left
    assert again.settings.role == "both"
    (option,) = app.user_options["worker"]
    command = Command("worker", params=[option], callback=lambda: None)
    said = CliRunner().invoke(command, ["--affinity-role", "worker"])
    assert said.exit_code == 0, said.output
    assert (again.settings.role, again.origins["role"]) == ("worker", "--affinity-role")
    assert other.celery_affinity.settings.role == "both"
    assert CliRunner().invoke(command, ["--affinity-role", "boss"]).exit_code == 2


# Tasks


def test_tasks_work_before_and_without_any_app(monkeypatch: pytest.MonkeyPatch, new_app) -> None:
    """A module of tasks is imported before the app exists, as Django's and most tests do."""

    @affinity_task(queue="invoices", tag_from="tag", name="unit.early")
    def early(tag: str) -> tuple[str, str]:
        here = current()
        return here.tag, here.queue

    app = new_app(set_as_current=True)
    app.conf.task_always_eager = True
    assert early.delay("a").get() == ("a", "invoices")
    assert early.apply(("b",)).get() == ("b", "invoices")
    with pytest.raises(TagError):
        early.delay(None)

    app.conf.task_always_eager = False
    calls = published(app, monkeypatch)
    early.delay("a")
    assert calls == [("unit.early", "invoices", "a")]

    Affinity(app, queues=[AffinityQueue("mails")])
    with pytest.raises(UndeclaredQueueError):
        early.delay("a")


def test_a_shared_task_belongs_to_each_app_with_that_apps_queues(
    monkeypatch: pytest.MonkeyPatch, new_app
) -> None:
    @affinity_task(queue="invoices", tag_from="tag", name="unit.shared")
    def shared(tag: str) -> None: ...

    one, other, plain = new_app("one"), new_app("other"), new_app("plain")
    Affinity(one, queues=[AffinityQueue("invoices", pending_queue_name="one.in")])
    Affinity(other, queues=[AffinityQueue("invoices", pending_queue_name="other.in")])
    for app, queue in ((one, "one.in"), (other, "other.in"), (plain, "invoices")):
        calls = published(app, monkeypatch)
        app.tasks["unit.shared"].delay("a")
        assert calls == [("unit.shared", queue, "a")]
        app.set_current()
        shared.delay("b")
        assert calls[1:] == [("unit.shared", queue, "b")]
    assert one.tasks["unit.shared"] is not other.tasks["unit.shared"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_task_may_be_declared_before_and_after_the_app_is_finalized(
    monkeypatch: pytest.MonkeyPatch, new_app, when: str
) -> None:
    app = new_app(set_as_current=True)
    affinity = Affinity(app, queues=QUEUES)
    if when == "after":
        app.finalize()

    @affinity.task(queue="invoices", tag_from="tag", name=f"unit.own.{when}")
    def own(tag: str) -> None: ...

    @affinity_task(queue="mails", tag_from="tag", name=f"unit.shared.{when}")
    def shared(tag: str) -> None: ...

    calls = published(app, monkeypatch)
    own.delay("a")
    shared.delay("b")
    assert calls == [(own.name, "invoices", "a"), (shared.name, "mails", "b")]


def test_an_ordinary_shared_task_stays_one(monkeypatch: pytest.MonkeyPatch, new_app) -> None:
    @shared_task(name="unit.ordinary")
    def ordinary(tag: str) -> None: ...

    app = new_app(set_as_current=True)
    Affinity(app, queues=QUEUES)
    assert not hasattr(ordinary, "affinity_tag_from")


def test_an_app_does_not_hear_the_workers_of_another(new_app) -> None:
    class Worker:
        hostname = "w@h"

        def __init__(self, app: Celery) -> None:
            self.app = app

    app = new_app()
    affinity = Affinity(app, queues=QUEUES, role="boss")
    signals.worker_init.send(sender=Worker(new_app()))
    affinity.raise_startup_error()
    signals.worker_init.send(sender=Worker(app))
    with pytest.raises(ConfigurationError, match="boss"):
        affinity.raise_startup_error()


# Django's transactions


def test_only_the_tasks_of_a_django_app_have_delay_on_commit(new_app) -> None:
    app = new_app()

    @Affinity(app, queues=QUEUES).task(queue="mails", tag_from="tag", name="unit.no_django")
    def task(tag: str) -> None: ...

    assert not hasattr(task, "delay_on_commit")
    assert not hasattr(task, "apply_async_on_commit")
