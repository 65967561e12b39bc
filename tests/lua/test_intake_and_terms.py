"""Laws of intake and of terms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from celery_affinity.exceptions import SchemaVersionError
from celery_affinity.intake import Intake, no_tag
from celery_affinity.scripts import Scripts

from .conftest import Bench

ODD_TAGS = [
    "{}",
    "{a}b",
    "a}{b",
    "*",
    "?",
    "[x]",
    "a:b",
    "line\nbreak",
    "\r\n",
    "\0",
    "tab\t",
    " ",
    " a",
    "\x06\x163",
    "Zürich",
    "Z\u0075\u0308rich",
    "🜁",
    "../x",
    "%s",
    "$(id)",
    "'; redis.call('x')",
    '"',
    "\\",
    "affinity:lock",
    "A",
    "a",
    "x" * 512,
]


def test_odd_tags_work_and_stay_distinct(bench: Bench) -> None:
    bench.lead()
    node = bench.node("n")
    for tag in ODD_TAGS:
        bench.send(tag, 1, 2)
    bench.admit_all()
    assert bench.dead() == []
    ran = node.drain_all()
    assert ran == [f"{tag}-{n}" for tag in ODD_TAGS for n in (1, 2)]


def test_an_int_and_its_text_are_one_tag(bench: Bench) -> None:
    bench.lead()
    bench.send(7, "int")
    bench.send("7", "text")
    bench.admit_all()
    assert len(bench.backlog("7")) == 2


#: Usable, but for a value that kombu would make something of.
MARKED = (
    b'{"headers": {"task": "t", "id": "1", "identify_tag": "a", "mine": %s}, "body": "W10=",'
    b' "content-type": "application/json", "properties": {"delivery_tag": "d"}}'
)
BAD_MESSAGES = {
    "a mark of a type that nobody knows": MARKED % b'{"__type__": "nobody", "__value__": 1}',
    "a value that is not of its type": MARKED % b'[{"__type__": "uuid", "__value__": "zz"}]',
    **{
        f"a number that is none for Python: {number}": MARKED % number.encode()
        for number in ("0x10", "nan", "inf", "-inf", "01", "+1", "1.", "1.e5", "[1 ,-20.]", "9" * 30 + ".")
    },
    "an integer of thousands of digits": MARKED % (b"9" * 4301),
    "as many levels as the leader could read": MARKED % (b"[" * 900 + b"]" * 900),
    "a mark in escapes": MARKED % b'{"\\u005f_type__": "nobody", "__value__": 1}',
    "a mark in other escapes": MARKED % b'{"__t\\u0079pe__": "nobody", "__value__": 1}',
    "not json": b"\x00\xff{",
    "truncated": b'{"headers": {"id": "x"',
    "null": b"null",
    "list": b"[1]",
    "no headers": b'{"body": "W10=", "properties": {}, "content-type": "application/json"}',
    "null headers": b'{"headers": null, "body": "", "properties": {}}',
    "no id": b'{"headers": {"task": "t", "identify_tag": "a"}, "body": "W10=", "properties": {}}',
    "task is a list": b'{"headers": {"task": ["t"], "id": "1", "identify_tag": "a"}, "body": "W10=",'
    b' "properties": {}}',
    "no tag": b'{"headers": {"task": "t", "id": "1"}, "body": "W10=", "properties": {}}',
    "bad eta": b'{"headers": {"task": "t", "id": "1", "identify_tag": "a", "eta": "garbage"},'
    b' "body": "W10=", "properties": {}}',
    "tag is a list": b'{"headers": {"task": "t", "id": "1", "identify_tag": ["a"]}, "body": "W10=",'
    b' "properties": {}}',
    "lone surrogate": b'{"headers": {"task": "t", "id": "1", "identify_tag": "\\ud800"},'
    b' "body": "W10=", "properties": {}}',
    "long tag": b'{"headers": {"task": "t", "id": "1", "identify_tag": "'
    + b"x" * 513
    + b'"}, "body": "W10=", "properties": {}}',
    "deep": b"[" * 5000 + b"]" * 5000,
}


@pytest.mark.parametrize("kind", BAD_MESSAGES)
def test_a_bad_message_is_buried_with_its_reason_and_takes_no_neighbour_along(
    bench: Bench, kind: str
) -> None:
    bench.lead()
    node = bench.node("n")
    bench.send("a", 1)
    bench.push(BAD_MESSAGES[kind])
    bench.send("a", 2)
    bench.admit_all()
    assert node.drain_all() == ["a-1", "a-2"]
    (dead,) = bench.dead()
    assert dead["reason"]
    assert bench.client.hvals(bench.queue_key("deadm")) == [BAD_MESSAGES[kind]]


USABLE = {
    "a header that is a UUID": {
        "headers": {"identify_tag": "a", "mine": {"__type__": "uuid", "__value__": {"hex": "0" * 32}}},
        "properties": {"delivery_tag": "d"},
    },
    "escapes of other producers": {
        "headers": {"identify_tag": "a", "big": 1.5, "mine": "1. x[2.] <&'>"}, "properties": {"delivery_tag": "d"},
    },
    "tag in the properties": {"properties": {"identify_tag": "a"}, "headers": {}},
    "body first, not encoded": {"body": '[["{", "\\"headers\\": {\\""], {}, {}]'},
    "a stamp of an earlier dispatch": {"headers": {"identify_tag": "a", "affinity_stamp": "1 2"}},
    "float that is whole": {"headers": {"identify_tag": 7, "big": 2**60, "empty": []}},
}


@pytest.mark.parametrize("kind", USABLE)
def test_an_unusual_but_usable_message_is_admitted_without_a_change_of_content(
    bench: Bench, kind: str
) -> None:
    bench.lead()
    node = bench.node("n")
    headers = {"id": "odd", "task": "t", "identify_tag": "a", **USABLE[kind].get("headers", {})}
    if kind == "tag in the properties":
        del headers["identify_tag"]
    message = {
        "body": "W10=",
        "content-type": "application/json",
        "properties": {},
        **USABLE[kind],
        "headers": headers,
    }
    bench.push(json.dumps(message))
    bench.admit_all()
    assert bench.dead() == []
    raw = bench.client.lindex(node.list, -1)
    assert raw is not None
    sent = json.loads(raw)
    assert sent["body"] == message["body"]
    for name in ("big", "empty"):
        assert sent["headers"].get(name) == headers.get(name)
    assert node.take().id == "odd"


def test_messages_of_all_priorities_are_admitted_the_urgent_first(bench: Bench) -> None:
    bench.lead()
    lists = [bench.pending, bench.pending + "3", bench.pending + "9"]
    for name in reversed(lists):
        bench.send(name[-1], 1)
        bench.client.rename(bench.pending, name + "x")
    for name in lists:
        bench.client.rename(name + "x", name)
    assert Intake(bench.scripts, "q", lists, no_tag).run(bench.fence)[0] == 3
    node = bench.node("n")
    assert node.drain_all() == ["g-1", "3-1", "9-1"]


def test_a_large_intake_comes_in_bounded_steps(bench: Bench) -> None:
    bench.lead()
    bench.send("a", *range(450))
    steps = []
    more = True
    while more:
        admitted, more = bench.admit()
        steps.append(admitted)
    assert steps == [200, 200, 50]
    assert len(bench.backlog("a")) == 450


@pytest.mark.proves(
    "9: a superseded leader acts",
    "none of its scripts changes anything",
)
def test_a_superseded_term_changes_nothing(bench: Bench) -> None:
    bench.lead(candidate="old/1")
    old = bench.fence
    bench.scripts.resign("q", old)
    bench.lead(candidate="new/1")
    node = bench.node("lost", timeout_ms=0)
    bench.send("a", 1)
    new, bench.fence = bench.fence, old
    assert bench.admit() == (-1, False)
    assert bench.scripts.promote("q", old, 10) == (-1, -1, 0)
    assert bench.scripts.rescue("q", old, 10) == [-1]
    assert not bench.scripts.rebase("q", old)
    assert bench.scripts.configure("q", old, {"max_batch_size": 1}, {}) == -1
    assert not bench.scripts.renew("q", old, 1000)
    assert not bench.scripts.resign("q", old)
    assert bench.scripts.resolve("q", old, bench.pending, b"", ("bury", "x", "")) == -1
    assert node.receive() is None and bench.client.llen(bench.pending) == 1
    bench.fence = new
    assert bench.admit()[0] == 1


def test_a_repeated_claim_gets_the_same_term(bench: Bench) -> None:
    assert bench.scripts.claim("q", "a/1", 5000) == bench.scripts.claim("q", "a/1", 5000)


def test_a_second_candidate_is_told_how_long_to_wait(bench: Bench) -> None:
    bench.scripts.claim("q", "a/1", 5000)
    term, wait_ms = bench.scripts.claim("q", "b/1", 5000)
    assert term is None and 4000 < wait_ms <= 5000


@pytest.mark.proves(
    "16: Redis comes back empty",
    "terms and epochs grow on (what it held is gone)",
)
def test_terms_and_epochs_grow_also_over_an_emptied_data_set(bench: Bench) -> None:
    bench.lead(candidate="a/1")
    first = int(bench.fence.split()[1])
    node = bench.node("n")
    bench.send("a", 1)
    bench.admit()
    epoch = int(node.take().stamp.epoch)
    for key in bench.client.scan_iter(match=f"{bench.scripts.keys.prefix}*"):
        bench.client.delete(key)
    bench.lead(candidate="b/1")
    assert int(bench.fence.split()[1]) > first
    node = bench.node("m")
    bench.send("a", 1)
    bench.admit()
    assert int(node.take().stamp.epoch) > epoch


def test_a_ledger_of_another_schema_is_refused(bench: Bench) -> None:
    bench.client.set(bench.scripts.keys.prefix + "schema", "99")
    with pytest.raises(SchemaVersionError, match="schema version 99"):
        bench.scripts.claim("q", "a/1", 1000)
    with pytest.raises(SchemaVersionError):
        bench.node("n")
    assert bench.client.exists(bench.queue_key("leader"), bench.scripts.keys.workers) == 0


@pytest.mark.proves(
    "21: SCRIPT FLUSH",
    "scripts are loaded again",
)
def test_scripts_survive_a_flush_of_the_script_cache(bench: Bench) -> None:
    bench.lead()
    bench.client.script_flush()
    bench.send("a", 1)
    assert bench.admit()[0] == 1


def test_every_script_states_its_contract() -> None:
    folder = Path(Scripts.__init__.__code__.co_filename).parent / "lua"
    for path in folder.glob("*.lua"):
        head = path.read_text().split("\n\n")[0]
        assert head.startswith(f"-- {path.stem}: "), path.name
        assert "KEYS[1]" in path.read_text() and "ARGV" in path.read_text(), path.name
        assert "Returns" in path.read_text(), path.name
        assert "'KEYS'" not in path.read_text() and "'SCAN'" not in path.read_text(), path.name


def test_a_dispatched_copy_that_comes_back_to_the_pending_queue_is_dropped(bench: Bench) -> None:
    node = bench.opening(1)
    bench.push(bench.client.lindex(node.list, 0))
    bench.send("a", 2)
    bench.admit_all()
    assert node.drain_all() == ["a-1", "a-2"]
    assert bench.dead() == []
    assert bench.client.hget(bench.queue_key("c"), "strays") == b"1"
