"""Laws of affinity_task: where a tag comes from, and what is refused at submit."""

from __future__ import annotations

import base64
import json
import warnings
from itertools import count
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from celery import Celery, Task
from celery.exceptions import CDeprecationWarning, Reject

from celery_affinity import (
    Affinity,
    AffinityQueue,
    ConfigurationError,
    MissingTagError,
    TagError,
    UndeclaredQueueError,
    affinity_task,
    current,
)
from celery_affinity.message import tag_text
from celery_affinity.routing import usual_queue

_numbers = count()


@pytest.fixture
def app() -> Celery:
    made = Celery("unit", broker="memory://", set_as_current=True)
    made.conf.task_always_eager = False
    return made


@pytest.fixture
def sent(app: Celery, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would have been published."""
    calls: list[dict[str, Any]] = []

    def send_task(name: str, args: Any = None, kwargs: Any = None, **options: Any) -> None:
        calls.append({"name": name, "args": args, "kwargs": kwargs, **options})

    monkeypatch.setattr(app, "send_task", send_task)
    return calls


def declare(app: Celery, tag_from: Any = "tag", **options: Any) -> Task:
    affinity = getattr(app, "celery_affinity", None) or Affinity(
        app, queues=[AffinityQueue("invoices"), AffinityQueue("mails")]
    )
    options.setdefault("queue", "invoices")

    @affinity.task(tag_from=tag_from, name=f"unit.{next(_numbers)}", **options)
    def task(tag: Any = None, other: Any = None) -> Any:
        return current()

    return task


@pytest.mark.parametrize(
    "args, kwargs", [(("a",), {}), ((), {"tag": "a"}), (("a", 1), {}), (("a",), {"other": 2})]
)
def test_the_tag_comes_from_the_named_argument(app, sent, args, kwargs) -> None:
    declare(app).apply_async(args, kwargs)
    assert sent[0]["headers"] == {"identify_tag": "a"}
    assert sent[0]["queue"] == "invoices"


def test_a_default_of_the_argument_is_a_tag_too(app, sent) -> None:
    affinity = Affinity(app, queues=[AffinityQueue("q")])

    @affinity.task(tag_from="region", name="unit.default")
    def task(x: int, region: str = "eu") -> None: ...

    task.delay(1)
    assert sent[0]["headers"]["identify_tag"] == "eu"


@pytest.mark.parametrize("order", [{"company": {"id": 7}}, SimpleNamespace(company={"id": 7})])
def test_a_dotted_path_goes_into_models_and_dicts(app, sent, order) -> None:
    declare(app, tag_from="tag.company.id").delay(order)
    assert sent[0]["headers"]["identify_tag"] == "7"


def test_a_callable_is_given_the_calls_arguments(app, sent) -> None:
    declare(app, tag_from=lambda tag, other=None: f"{tag}/{other}").delay("a", other=2)
    assert sent[0]["headers"]["identify_tag"] == "a/2"


def test_an_explicit_tag_goes_before_tag_from(app, sent) -> None:
    declare(app).apply_async(("a",), identify_tag="eu:a")
    declare(app).apply_async(("a",), headers={"identify_tag": "us:a", "trace": "t"})
    assert [c["headers"] for c in sent] == [
        {"identify_tag": "eu:a"},
        {"identify_tag": "us:a", "trace": "t"},
    ]


@pytest.mark.parametrize("tag", ["x", 0, 7, UUID(int=7), " ", "ü", "🜁"])
def test_texts_ints_and_uuids_are_tags(tag) -> None:
    assert tag_text(tag) == str(tag)


@pytest.mark.parametrize(
    "tag, says",
    [
        ("", "empty"),
        ("x" * 513, "513 bytes"),
        ("ü" * 257, "514 bytes"),
        (True, "bool"),
        (1.5, "float"),
        (float("nan"), "float"),
        (b"a", "bytes"),
        (None, "yields None"),
        (["a"], "list"),
        ({"a": 1}, "dict"),
        ("\ud800", "lone surrogate"),
    ],
)
def test_what_cannot_be_a_tag_is_refused_at_submit(app, sent, tag, says) -> None:
    with pytest.raises(TagError, match=says):
        declare(app).delay(tag)
    assert sent == []


def test_a_call_without_a_tag_is_refused_and_says_what_to_pass(app, sent) -> None:
    with pytest.raises(TagError, match="identify_tag=.*or declare"):
        declare(app, tag_from=None).delay("a")


def test_a_tag_from_that_names_no_argument_is_refused_when_the_task_is_declared(app) -> None:
    with pytest.raises(TypeError, match="no argument 'company' .found: 'tag', 'other'"):
        declare(app, tag_from="company")


def test_an_undeclared_queue_is_refused_at_submit_and_names_the_declared(app, sent) -> None:
    with pytest.raises(UndeclaredQueueError, match="'nope'.*'invoices', 'mails'"):
        declare(app).apply_async(("a",), queue="nope")
    with pytest.raises(ConfigurationError):
        declare(app, queue=None).delay("a")


def test_the_queue_may_come_from_a_route_or_be_the_only_one(app, sent) -> None:
    app.conf.task_routes = {"unit.*": {"queue": "mails"}}
    declare(app, queue=None).delay("a")
    assert sent[0]["queue"] == "mails"
    single = Celery("single", broker="memory://")
    Affinity(single, queues=[AffinityQueue("only", pending_queue_name="in")])

    @single.celery_affinity.task(tag_from="tag", name="t")
    def task(tag: str) -> None: ...

    single.send_task = lambda *a, **o: sent.append(o)
    task.delay("a")
    assert sent[1]["queue"] == "in"


def test_the_decorator_works_without_affinity_and_eagerly(app) -> None:
    app.conf.task_always_eager = True

    @affinity_task(queue="anything", tag_from="tag", bind=True)
    def seen(self: Any, tag: str) -> Any:
        return self.affinity

    assert seen("a") is None, "a plain call is under no lease"
    context = seen.delay("a").get()
    assert (context.tag, context.queue, context.eager, context.epoch) == ("a", "anything", True, 0)
    assert current() is None


def test_the_users_base_stays_the_base_and_is_called(app, sent) -> None:
    class Base(Task):
        def apply_async(self, *args: Any, **options: Any) -> Any:
            options["headers"]["base"] = "seen"
            return super().apply_async(*args, **options)

    declare(app, base=Base).delay("a")
    assert sent[0]["headers"] == {"identify_tag": "a", "base": "seen"}


def test_an_affinity_task_may_be_the_base_of_others(app, sent) -> None:
    work = declare(app)

    class Sub(work.__class__):  # type: ignore[misc, name-defined]
        name = "unit.sub"
        affinity_tag_from = "tag"

        def apply_async(self, *args: Any, **options: Any) -> Any:
            return super().apply_async(*args, countdown=5, **options)

        def run(self, tag: Any) -> Any:
            return tag

    sub = app.register_task(Sub())
    other = declare(app, base=Sub)
    for task in (sub, other):
        task.delay("a")
        assert task.apply(("a",)).successful()
        assert task.queue == "invoices"
    assert [call["countdown"] for call in sent] == [5, 5], "what stands between is called"
    assert [call["headers"]["identify_tag"] for call in sent] == ["a", "a"]


@pytest.mark.parametrize("how", ["map", "starmap", "chunks"])
def test_what_would_call_a_task_inside_of_another_is_refused(app, how) -> None:
    with pytest.raises(TypeError, match="group"):
        getattr(declare(app), how)([("a",)], *([1] if how == "chunks" else []))


def test_the_queue_of_a_task_is_seen_by_celery_which_does_not_warn_of_it(app) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CDeprecationWarning)
        task = declare(app)
        assert task.queue == "invoices"
    assert declare(app, queue=None).queue is None, "one of two"
    app.conf.task_routes = {"unit.*": {"queue": "mails"}}
    app.amqp.flush_routes()
    app.amqp.router = app.amqp.Router()
    assert declare(app, queue=None).queue == "mails"


def route_by_all(name: str, args: Any, kwargs: Any, options: Any, task: Any = None, **_: Any) -> Any:
    """A router as Celery's documentation has it, which looks at all that it is given."""
    urgent = kwargs.get("other") or options.get("priority") or (args and args[0] == "urgent")
    if task.name.startswith("unit."):
        return "mails" if urgent else {"queue": "invoices"}
    return None


def route_by_argument(name: str, args: Any, kwargs: Any, options: Any, **_: Any) -> Any:
    """One that cannot do without a call."""
    return {"queue": kwargs["other"]}


def test_a_router_function_is_asked_as_celery_asks_it(app, sent) -> None:
    app.conf.task_routes = (route_by_all,)
    task = declare(app, queue=None)
    task.delay("a")
    task.delay("urgent")
    task.delay("a", other=1)
    task.apply_async(("a",), priority=3)
    assert [call["queue"] for call in sent] == ["invoices", "mails", "mails", "mails"]
    assert usual_queue(task) == "invoices"


@pytest.mark.parametrize("nothing", [False, "", {}, {"queue": None}])
def test_a_route_that_says_nothing_is_none(app, sent, nothing) -> None:
    """As for Celery: `name.startswith(...) and {...}` is a router."""
    Affinity(app, queues=[AffinityQueue("only")])
    app.conf.task_routes = (lambda *_, **__: nothing,)
    task = declare(app, queue=None)
    assert usual_queue(task) is None
    task.delay("a")
    assert sent[0]["queue"] == "only"


def test_without_affinity_a_base_may_name_the_queue(app, sent) -> None:
    class Base(Task):
        queue = "of the base"

    task = affinity_task(tag_from="tag", base=Base, name=f"unit.{next(_numbers)}")(same)
    task.delay("a")
    assert sent[0]["queue"] == "of the base"


def same(tag: Any) -> Any:
    return tag


def test_a_router_is_given_the_headers_of_a_call_that_may_have_no_tag(app, sent) -> None:
    Affinity(app, queues=[AffinityQueue("only", untagged="spread")])
    app.conf.task_routes = (lambda n, a, k, options, **_: {"queue": options["headers"]["where"]},)
    task = declare(app, tag_from=None, queue=None)
    task.apply_async((), headers={"where": "only"})
    assert sent[0]["headers"]["identify_tag"].startswith("untagged:")


def test_only_a_retry_that_could_not_be_sent_is_a_failure(app) -> None:
    """A base may reject in its own `retry`, as Celery's does where it cannot send."""

    class Base(Task):
        def retry(self, *args: Any, **options: Any) -> Any:
            raise Reject(OSError("no broker"), requeue=options["requeue"])

    task = declare(app, base=Base)
    with pytest.raises(Reject):
        task.retry(requeue=True)
    with pytest.raises(OSError, match="no broker") as told:
        try:
            _ = 1 / 0
        except ZeroDivisionError:
            task.retry(requeue=False)
    assert isinstance(told.value.__cause__, ZeroDivisionError), "why it retried is not forgotten"


def test_celerys_own_tasks_are_tags_of_their_own_and_no_others(app) -> None:
    affinity = Affinity(app, queues=[AffinityQueue("only")])
    task = affinity.task(tag_from="tag", name="celery.reports")(same)
    app.finalize()
    body = base64.b64encode(json.dumps([["a"], {}, {}]).encode()).decode()

    def tag_of(name: str) -> object:
        return affinity._tag_of_message({
            "headers": {"task": name, "id": "1"}, "body": body, "content-type": "application/json",
            "content-encoding": "utf-8", "properties": {"body_encoding": "base64"},
        })  # fmt: skip

    assert tag_of("celery.chord_unlock") == "untagged:1"
    assert tag_of(task.name) == "a"
    for name in ("celery.map", "celery.starmap", "celery.chunks", "celery.other"):
        with pytest.raises(MissingTagError):
            tag_of(name)


def test_a_router_that_needs_a_call_is_asked_for_each_and_stops_no_start(app, sent) -> None:
    app.conf.task_routes = (route_by_argument,)
    task = declare(app, queue=None)
    assert usual_queue(task) is None
    assert task.queue is None
    task.apply_async(kwargs={"tag": "a", "other": "mails"})
    assert sent[0]["queue"] == "mails"


def test_affinity_does_no_io_and_reads_no_setting_when_it_is_made() -> None:
    class Untouchable(Celery):
        @property
        def conf(self) -> Any:
            raise AssertionError("read too early")

    Affinity(Untouchable("lazy", set_as_current=False), queues=[AffinityQueue("q")])


def test_a_namespaced_conf_is_read(app) -> None:
    made = Celery("spaced", set_as_current=False)
    config = SimpleNamespace(CELERY_AFFINITY_ROLE="worker", CELERY_BROKER_URL="redis://x/1")
    made.config_from_object(config, namespace="CELERY")
    assert Affinity(made).settings.role == "worker"


def test_an_unknown_setting_in_the_conf_is_refused() -> None:
    made = Celery("typo", set_as_current=False)
    made.conf.affinity_rolle = "worker"
    with pytest.raises(ConfigurationError, match="rolle"):
        _ = Affinity(made).settings


@pytest.mark.parametrize(
    "broker, says",
    [
        ("memory://", "the broker is 'memory', which has no place for the queue of each worker"),
        ("filesystem://", "the broker is 'filesystem'.*expected RabbitMQ .* or a Redis"),
        ("amqp://host", "the broker is 'amqp'.* needs a Redis .* for its ledger.*set redis_url"),
    ],
)
def test_a_broker_that_cannot_be_used_is_refused_with_what_is_needed(broker: str, says: str) -> None:
    app = Celery("elsewhere", broker=broker, set_as_current=False)
    with pytest.raises(ConfigurationError, match=says):
        _ = Affinity(app, queues=[AffinityQueue("q")]).redis_url


def test_on_a_transport_without_worker_queues_publishing_and_eager_stay_possible() -> None:
    app = Celery("unit", broker="memory://", set_as_current=False)
    affinity = Affinity(app, queues=[AffinityQueue("q")])

    @affinity.task(queue="q", tag_from="tag")
    def echo(tag: str) -> str:
        return tag

    assert echo.apply_async(("a",)).id
    assert echo.apply(("a",)).get() == "a"
    app.conf.task_always_eager = True
    assert echo.delay("b").get() == "b"


def test_the_public_names_are_all_there_and_listed() -> None:
    import celery_affinity

    for name in celery_affinity.__all__:
        assert getattr(celery_affinity, name).__doc__ or name.startswith("tag_"), name
    assert len(set(celery_affinity.__all__)) == len(celery_affinity.__all__)


def test_without_affinity_a_call_goes_to_the_queue_that_the_task_names(
    app: Celery, sent: list[dict[str, Any]]
) -> None:
    @affinity_task(queue="invoices", tag_from="tag", name="unit.unbound")
    def task(tag: str) -> None: ...

    task.delay("a")

    assert [(call["queue"], call["headers"]) for call in sent] == [
        ("invoices", {"identify_tag": "a"})
    ]
