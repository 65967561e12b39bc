"""Laws of tags over shards: whatever way a tag comes to the ledger, it is in its one shard."""

from __future__ import annotations

import json

import pytest

from celery_affinity import Affinity
from celery_affinity.intake import Intake, no_tag, shard_in
from celery_affinity.scripts import Scripts
from celery_affinity.sharding import shard_of

from .test_carrying import message
from .test_shards import SHARDS, Shards, shards
from .test_whole_queues import TAGS, Died, System, system, three

__all__ = ("shards", "system", "three")


@pytest.mark.parametrize(
    "written",
    ["5", '"5"', "5.0", "5e0", "50e-1", "-0", "-0.0", "0", "0.0", "1e2", "-7", "-7.0", "0x1F", "9007199254740991",
     "9007199254740992", "9007199254740993.0", "1e400", '"\\u0035"', '"\\ud83d\\ude00"', '"a\\u0000b"', '"\\/"', "5.5", "true"],
)  # fmt: skip
def test_a_tag_is_in_one_shard_whatever_way_it_is_written(shards: Shards, written: str) -> None:
    """Python reads it to find the shard, Lua to admit it."""
    shards.lead()
    raw = message("TAG-1").replace(b'"TAG"', written.encode())
    shard = shard_in(raw, no_tag, False, SHARDS)
    bench = shards.benches[shard]
    bench.push(raw)
    bench.admit_all()
    (kept,) = [*bench.client.hvals(bench.queue_key("m")), None][:1]
    if kept is None:
        assert len(bench.dead()) == 1
        return
    prefix = f"{bench.scripts.keys.prefix}b:1:q:"
    (backlog,) = [k.decode() for k in bench.client.scan_iter(match=prefix.replace("{", "\\{") + "*")] or [""]
    tag = backlog.removeprefix(prefix)
    assert shard_of(tag, SHARDS) == shard, f"{written} became {tag!r}"
    found = json.loads(kept)["headers"]["identify_tag"]
    assert str(found) == tag


# Without a tag in the message, the app that decodes it says what the tag is. Not all processes have the same app.


def untagged(name: str) -> bytes:
    raw = json.loads(message(name))
    del raw["headers"]["identify_tag"]
    return json.dumps(raw).encode()


def test_a_message_whose_tag_only_the_intakes_app_knows_runs_in_no_other_shard(three: System) -> None:
    """The carrier's app did not know the task: so it came into the first shard."""
    first = three.parts[0]
    first.push(untagged(f"{TAGS[3]}-1"))
    intake = Intake(
        first.scripts, first.state, [first.pending], lambda message: TAGS[3], shard=0, shards=3
    )
    while intake.run(first.fence)[1]:
        pass
    assert first.backlog(TAGS[3]) == []
    (letter,) = three.affinity.dead_letters("q")
    assert "another shard" in letter.reason


@pytest.mark.parametrize("dies", [False, True])
def test_a_letter_that_gets_its_tag_when_it_is_requeued_runs_in_the_shard_of_that_tag(
    three: System, dies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    three.parts[0].push(untagged(f"{TAGS[3]}-1"))
    three.parts[0].admit_all()
    assert len(three.affinity.dead_letters("q")) == 1
    monkeypatch.setattr(
        Affinity, "_tag_of_message", lambda self, message: message["headers"]["id"].partition("-")[0]
    )
    if dies:
        with monkeypatch.context() as patch:
            patch.setattr(Scripts, "requeue_elsewhere", died)
            with pytest.raises(Died):
                three.affinity.requeue_dead("q")
    assert three.affinity.requeue_dead("q") == 1
    assert [part.backlog(TAGS[3]) for part in three.parts] == [[], [], []]
    assert three.affinity.dead_letters("q") == []
    found = [json.loads(raw) for raw in three.broker.lrange(three.pending, 0, -1)]
    assert {one["headers"]["identify_tag"] for one in found} == {TAGS[3]}
    assert len({one["properties"]["delivery_tag"] for one in found}) == 1, "a repeat is known as one"


def died(*args: object) -> None:
    raise Died
