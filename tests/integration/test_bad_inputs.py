"""What cannot be a task is buried with its reason; no worker dies or hangs over it, no neighbour waits.

The rows of bad inputs that no other file has: messages (44 to 71 of the list), sent raw to the
pending queue of real workers. Tags are in test_task.py and test_intake_and_terms.py, settings in
test_settings.py and test_start_refusals.py, waits for one's own tag in test_semantics.py.
"""

from __future__ import annotations

import base64
import bz2
import json
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from celery import chord
from celery.result import AsyncResult
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import acceptance.apps.odd  # noqa: F401  (the test's producer knows its tasks)
from acceptance.apps.odd import ReadByTheParentOnly
from acceptance.support import APP, LEAN, QUICK, Producer, keys_with, slots, wait_for_nodes
from celery_affinity import AffinityQueue, BuriedError, ConfigurationError, TagError
from celery_affinity.message import MAX_BODY_BYTES, MAX_MESSAGE_BYTES, tag_text
from fuzzing import anything
from harness import RESULTS_VARIABLE, Cluster, Node, wait_until
from history import History
from pools import SOLO, long

pytestmark = pytest.mark.acceptance

Message = dict[str, Any]


def message(tag: str, seq: int) -> Message:
    """A usable one, as a producer without the library sends it."""
    return {
        "body": encoded(json.dumps([[tag, seq], {}, {}]).encode()),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"id": str(uuid4()), "task": "jobs.work", "identify_tag": tag, "retries": 0},
        "properties": {
            "body_encoding": "base64", "delivery_info": {"exchange": "", "routing_key": "jobs"},
            "delivery_tag": str(uuid4()),
        },
    }


class StrEnumLike(str):
    """A subclass of str."""


class Lazy:
    """A translation that is made when it is shown."""

    def __str__(self) -> str:
        return "lazy"


def encoded(body: bytes) -> str:
    return base64.b64encode(body).decode()


def body(content: bytes) -> Callable[[Message], None]:
    return lambda m: m.update(body=encoded(content))


def headers(**values: object) -> Callable[[Message], None]:
    return lambda m: m["headers"].update(values)


def fields(**values: object) -> Callable[[Message], None]:
    return lambda m: m.update({name.replace("_", "-"): value for name, value in values.items()})


def compressed(content: bytes, name: str) -> Callable[[Message], None]:
    def change(m: Message) -> None:
        m["headers"]["compression"] = name
        m["body"] = encoded(content)

    return change


def json_with_zeros(size: int) -> bytes:
    return json.dumps([["bomb", 0], {}, {}]).encode() + b" " * size


#: What makes a message unusable, and a word of the reason that it is buried with.
POISON: dict[str, tuple[Callable[[Message], None], str]] = {
    "body [1]": (body(b"[1]"), "ValueError"),
    "body null": (body(b"null"), "TypeError"),
    'body "str"': (body(b'"str"'), "args are 's'"),
    "body not UTF-8": (body(b"\xff\xfe[[], {}, {}]"), "utf-8"),
    "body truncated": (body(b'[["a", 1], {}, {'), "DecodeError"),
    "body not base64": (fields(body="%%%"), "Error"),
    "kwargs a list": (body(b'[["a", 1], [], {}]'), "not a mapping"),
    "args a number": (body(b"[7, {}, {}]"), "args are 7"),
    "embed a list": (body(b'[["a", 1], {}, [1]]'), "embed is [1]"),
    "timelimit x": (headers(timelimit="x"), "timelimit is 'x'"),
    "timelimit of texts": (headers(timelimit=["x", "y"]), "timelimit is"),
    "eta garbage": (headers(eta="garbage"), "expected ISO 8601 text"),
    "a header of a type that nobody knows": (
        headers(mine={"__type__": "nobody", "__value__": 1}), "cannot be read by kombu"
    ),
    "a header whose value is not of its type": (
        headers(mine=[{"__type__": "uuid", "__value__": "zz"}]), "cannot be read by kombu"
    ),
    "eta a number": (headers(eta=12), "expected ISO 8601 text"),
    "expires garbage": (headers(expires="soon"), "expires"),
    "expires a list": (headers(expires=[1]), "expires"),
    "unknown content type": (fields(content_type="application/x-nobody"), "x-nobody"),
    "pickle": (
        lambda m: m.update(
            {
                "content-type": "application/x-python-serialize",
                "content-encoding": "binary",
                "body": encoded(pickle.dumps([["a", 1], {}, {}])),
            }
        ),
        "ContentDisallowed",
    ),
    "compressed by nobody": (compressed(b"xx", "squeeze"), "squeeze"),
    "compressed wrongly": (compressed(b"xx", "application/x-gzip"), "rror"),
    "gzip bomb": (
        compressed(zlib.compress(json_with_zeros(MAX_BODY_BYTES)), "application/x-gzip"),
        "decompressed",
    ),
    "bzip2 bomb": (
        compressed(bz2.compress(json_with_zeros(MAX_BODY_BYTES)), "application/x-bz2"),
        "decompressed",
    ),
    "huge": (lambda m: m.update(body="x" * MAX_MESSAGE_BYTES), "bytes, expected at most"),
}

#: As above, but without an id that a result could be stored under.
NAMELESS: dict[str, tuple[Callable[[Message], None], str]] = {
    "no id": (lambda m: m["headers"].pop("id"), "header 'id' is None"),
    "id null": (headers(id=None), "header 'id' is None"),
    "id a list": (headers(id=["a"]), "header 'id' is"),
    "protocol 1": (
        lambda m: m.update(
            headers={}, body=encoded(b'{"task": "jobs.work", "id": "1", "args": [], "kwargs": {}}')
        ),
        "protocol 2",
    ),
    "headers null": (fields(headers=None), "headers are None"),
    "properties null": (fields(properties=None), "properties are None"),
}

#: Odd, but a task: it runs.
ODD: dict[str, Callable[[Message], None]] = {
    "retries x": headers(retries="x"),
    "unknown content encoding": fields(content_encoding="klingon"),
    "timelimit null": headers(timelimit=[None, None]),
    "eta in year 1": headers(eta="0001-01-01T00:00:00+00:00"),
    "expires in year 9999": headers(expires="9999-12-31T23:59:59+00:00"),
    "id with a newline": headers(id=f"new\nline {uuid4()}"),
    "id of 100 kB": headers(id="x" * 100_000),
    "no delivery tag": lambda m: m["properties"].pop("delivery_tag"),
    "priority -1": lambda m: m["properties"].update(priority=-1),
    "priority 300": lambda m: m["properties"].update(priority=300),
    "property with another tag": lambda m: m["properties"].update(identify_tag="another"),
    "stamp x": headers(affinity_stamp="x"),
    "stamp of numbers nobody gave": headers(
        affinity_stamp=f"{2**63} {2**63} {2**63} {uuid4().hex} 0 1 1 jobs"
    ),
    "stamp with a negative epoch": headers(affinity_stamp=f"1 -1 1 {uuid4().hex} 0 1 1 jobs"),
    "stamp of another queue": headers(affinity_stamp=f"1 1 1 {uuid4().hex} 0 1 1 other"),
    "compressed": lambda m: compressed(
        zlib.compress(base64.b64decode(m["body"])), "application/x-gzip"
    )(m),
}


@pytest.mark.parametrize("tag", ["\u202eabc", "a\u200bb", "x" * 256, StrEnumLike("sub")])
def test_more_odd_texts_are_tags(tag: str) -> None:
    assert tag_text(tag) == str(tag)


@pytest.mark.parametrize("tag", ["x" * 65_536, "x" * 1_000_000, Lazy()], ids=["64 kB", "1 MB", "lazy"])
def test_more_that_is_no_tag_is_refused_at_submit(tag: object) -> None:
    with pytest.raises(TagError, match="expected at most 512|must be a str"):
        tag_text(tag)


@pytest.mark.parametrize("number", [0, -1, 1.5, "2", True, {"default": 0}, {"a": "x"}])
def test_a_concurrency_that_is_no_usable_number_is_refused(number: object) -> None:
    with pytest.raises(ConfigurationError, match="tag_concurrency"):
        AffinityQueue("q", tag_concurrency=number)


def test_a_policy_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="on_failure.*'skip', 'block' or 'park'"):
        AffinityQueue("q", on_failure="stop")


@pytest.fixture
def producer(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Producer:
    monkeypatch.setenv(RESULTS_VARIABLE, "1")
    cluster.environ[RESULTS_VARIABLE] = "1"
    return Producer(cluster.broker_url)


def push(producer: Producer, raw: str | bytes, queue: str = "jobs") -> None:
    """Put it into a queue past Celery."""
    with producer.app.connection_for_write() as connection:
        connection.default_channel.client.lpush(queue, raw)


def serve(cluster: Cluster, producer: Producer) -> Node:
    node = cluster.worker(
        "acceptance.apps.odd", queues="jobs", concurrency=2, environ=QUICK, extra=LEAN
    )
    wait_for_nodes(producer.affinity, 1)
    return node


def idle(producer: Producer, count: int = 2) -> bool:
    """Nothing is in the ledger any more and every slot is free."""
    stats = producer.affinity.stats("jobs")
    free = all(slot.status == "idle" for slot in slots(producer.affinity))
    return free and (stats.pending, stats.entries, stats.idle_slots) == (0, 0, count)


@pytest.mark.proves(
    "bad input: 28 kinds of unusable messages",
    "each is buried with its reason, FAILURE is stored if it has an id; the worker and its neighbours go on",
)
@pytest.mark.parametrize("pool", ["prefork", pytest.param("shared prefork", marks=long), "threads", SOLO])
def test_no_poison_kills_or_wedges_a_worker_and_each_is_buried_with_its_reason(
    cluster: Cluster, history_path: Path, producer: Producer, pool: str
) -> None:
    shared = {"AFFINITY_SLOT_IS_PROCESS": "0"} if pool == "shared prefork" else {}
    concurrency = 1 if pool == "solo" else 2
    node = cluster.worker(
        APP, queues="jobs", concurrency=concurrency, pool=pool.split()[-1],
        environ={**QUICK, **shared}, extra=LEAN,
    )
    wait_for_nodes(producer.affinity, 1)
    sent: dict[str, str] = {}
    neighbours = []
    for kind, (spoil, _) in {**POISON, **NAMELESS}.items():
        neighbours += producer.send("tag")
        bad = message("tag", -1)
        if kind in POISON:
            sent[bad["headers"]["id"]] = kind
        spoil(bad)
        push(producer, json.dumps(bad))
    neighbours += producer.send("tag")

    assert [result.get(timeout=60) for result in neighbours] == list(range(len(neighbours)))
    for task_id, kind in sent.items():
        told = AsyncResult(task_id, app=producer.app)
        error = told.get(timeout=30, propagate=False)
        assert (told.state, type(error), kind) == ("FAILURE", BuriedError, kind)
        assert POISON[kind][1] in str(error), kind
    dead = producer.affinity.dead_letters("jobs", limit=1000)
    wanted = [why for _, why in {**POISON, **NAMELESS}.values()]
    assert len(dead) == len(wanted), [letter.reason for letter in dead]
    for letter, why in zip(dead, wanted, strict=True):
        assert why in letter.reason
    assert node.alive
    wait_until(lambda: idle(producer, concurrency), what="an idle system")
    found = History.load(history_path)
    assert [run.seq for run in found.runs] == list(range(len(neighbours)))


@pytest.mark.proves(
    "bad input: a body that only the pool process cannot read",
    "buried; FAILURE is stored",
)
def test_what_only_the_pool_process_cannot_read_is_buried(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    cluster.environ.update(AFFINITY_TEST_ACCEPT="pickle", C_FORCE_ROOT="1")  # CI may be root
    serve(cluster, producer)
    bad = message("tag", 0)
    bad.update({
        "content-type": "application/x-python-serialize", "content-encoding": "binary",
        "body": encoded(pickle.dumps([[ReadByTheParentOnly(), 0], {}, {}])),
    })
    push(producer, json.dumps(bad))
    (behind,) = producer.send("tag")
    assert behind.get(timeout=30) == 0
    with pytest.raises(BuriedError, match="not here"):
        AsyncResult(bad["headers"]["id"], app=producer.app).get(timeout=30)
    wait_until(lambda: idle(producer), what="an idle system")
    assert [letter.reason for letter in producer.affinity.dead_letters("jobs")] == [
        "DecodeError: not here"
    ]


@pytest.mark.proves(
    "bad input: 16 kinds of odd but usable messages",
    "they run in their place",
)
def test_odd_messages_run_in_their_place(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    serve(cluster, producer)
    sent = []
    for seq, (kind, change) in enumerate(ODD.items()):
        odd = message("tag", seq)
        change(odd)
        sent.append((kind, odd["headers"]["id"]))
        push(producer, json.dumps(odd))
    for seq, (kind, task_id) in enumerate(sent):
        assert AsyncResult(task_id, app=producer.app).get(timeout=30) == seq, kind
    assert [run.seq for run in History.load(history_path).runs] == list(range(len(sent)))
    wait_until(lambda: idle(producer), what="an idle system")
    assert producer.affinity.stats("jobs").dead == 0


def test_a_message_that_is_due_in_the_year_9999_waits_and_holds_up_nobody(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    serve(cluster, producer)
    far = message("tag", -1)
    far["headers"]["eta"] = "9999-12-31T23:59:59+00:00"
    push(producer, json.dumps(far))
    (near,) = producer.send("tag")
    assert near.get(timeout=30) == 0
    wait_until(lambda: producer.affinity.stats("jobs").settled == 1, what="its settle")
    stats = producer.affinity.stats("jobs")
    assert (stats.scheduled, stats.entries, stats.dead) == (1, 1, 0)


@pytest.mark.proves(
    "38: visibility_timeout shorter than a task",
    "one run",
)
def test_a_visibility_timeout_shorter_than_a_task_does_not_run_it_twice(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    cluster.environ["AFFINITY_TEST_VISIBILITY"] = "1"
    serve(cluster, producer)
    results = producer.send("tag", 2, ms=4000)
    assert [result.get(timeout=60) for result in results] == [0, 1]
    assert [run.seq for run in History.load(history_path).runs] == [0, 1]


def test_two_tasks_of_one_id_both_run(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    serve(cluster, producer)
    producer.send("tag", 2, task_id="one-and-the-same")
    wait_until(lambda: producer.affinity.stats("jobs").settled == 2, what="two ends")
    assert [run.seq for run in History.load(history_path).runs] == [0, 1]


def test_a_retry_in_thirty_years_is_scheduled(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    serve(cluster, producer)
    (later,) = producer.send("tag", task="much_later")
    (behind,) = producer.send("tag")
    assert behind.get(timeout=30) == 1
    assert later.state == "RETRY"
    assert producer.affinity.stats("jobs").scheduled == 1


def test_a_chord_whose_members_share_a_tag_comes_to_its_end(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    serve(cluster, producer)
    work = producer.app.tasks["jobs.work"]
    result = chord([work.si("tag", n) for n in range(3)])(work.si("tag", 3))
    assert result.get(timeout=30) == 3
    found = History.load(history_path)
    assert [run.seq for run in found.runs] == [0, 1, 2, 3]


@pytest.mark.proves(
    "bad input: a message sent straight to a worker queue",
    "it goes through the ledger",
)
@pytest.mark.parametrize("kind", ["no stamp", "stamp x"])
def test_a_tagged_message_sent_straight_to_a_worker_queue_goes_through_the_ledger(
    cluster: Cluster, history_path: Path, producer: Producer, kind: str
) -> None:
    node = serve(cluster, producer)
    node.wait_ready()
    found: Any = producer.app.control.inspect(timeout=5).active_queues()
    (name,) = (queue["name"] for queue in found["w1@test"])
    astray = message("tag", 0)
    if kind == "stamp x":
        astray["headers"]["affinity_stamp"] = "x"
    push(producer, json.dumps(astray), name)
    result = AsyncResult(astray["headers"]["id"], app=producer.app)
    assert result.get(timeout=30) == 0
    assert History.load(history_path).runs[0].epoch, "it ran under a lease"
    assert "past the ledger; passed on to 'jobs'" in node.log_text()


@pytest.mark.proves(
    "bad input: unusable messages in an ordinary queue",
    "rejected; the worker goes on",
)
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_poison_in_an_ordinary_queue_neither_ends_nor_wedges_the_worker(
    cluster: Cluster, history_path: Path, producer: Producer, pool: str
) -> None:
    """Stock Celery ends, or reconnects for ever, over these."""
    node = cluster.worker(
        APP, queues="jobs,ordinary", concurrency=1, pool=pool, environ=QUICK, extra=LEAN
    )
    wait_for_nodes(producer.affinity, 1)
    spoils = [
        body(b"[1]"), body(b"null"), fields(body="%%%"), headers(timelimit="x"),
        headers(task=["x"]), lambda m: m["headers"].pop("id"),
    ]
    for spoil in spoils:
        poison = message("tag", -1)
        poison["headers"]["task"] = "jobs.plain_work"
        poison["properties"]["delivery_info"] = {"exchange": "", "routing_key": "ordinary"}
        spoil(poison)
        push(producer, json.dumps(poison), "ordinary")
    (ordinary,) = producer.send("plain", task="plain_work")
    (tagged,) = producer.send("tag")
    assert (ordinary.get(timeout=30), tagged.get(timeout=30)) == (0, 0)
    assert node.alive and "Connection to broker lost" not in node.log_text()
    wait_until(lambda: idle(producer, 1), what="an idle system")
    left = keys_with(producer.affinity._scripts.client, "plain_work")
    assert left == [], "none of them comes again"


@pytest.mark.proves(
    "bad input: fuzzed messages",
    "each ends once: run, scheduled or buried; the worker goes on",
)
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_no_fuzzed_message_ends_or_wedges_a_worker_or_changes_the_number_of_messages(
    cluster: Cluster, history_path: Path, producer: Producer, pool: str
) -> None:
    node = cluster.worker(
        APP, queues="jobs", concurrency=2, pool=pool, environ=QUICK, extra=LEAN
    )
    wait_for_nodes(producer.affinity, 1)
    client = producer.affinity._scripts.client
    pushed: list[bytes] = []

    @settings(max_examples=15, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(bad=st.lists(anything, min_size=10, max_size=20))
    def law(bad: list[bytes]) -> None:
        neighbours = []
        for raw in bad:
            neighbours += producer.send("neighbour")
            push(producer, raw)
        pushed.extend(bad)
        for result in neighbours:
            result.get(timeout=30)

    law()

    def rest() -> tuple[int, int, int]:
        stats = producer.affinity.stats("jobs")
        strays = int(client.hget("{affinity:default}:q:jobs:c", "strays") or 0)
        ended = stats.settled + stats.dead + stats.scheduled + strays
        return ended - producer.sent - len(pushed), stats.idle_slots, stats.entries - stats.scheduled

    wait_until(lambda: rest() == (0, 2, 0), 60, "every message's end")
    assert node.alive and "Connection to broker lost" not in node.log_text()
    ran = [run.seq for run in History.load(history_path).runs if run.tag == "neighbour"]
    assert ran == list(range(producer.sent))
