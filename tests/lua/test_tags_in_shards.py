"""Laws of tags over shards: whatever way a tag comes to the ledger, it is in its one shard."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from celery_affinity.embedded import Server
from celery_affinity.intake import no_tag, shard_in
from celery_affinity.keys import Keys
from celery_affinity.scripts import Scripts
from celery_affinity.sharding import shard_of

from .conftest import Bench
from .test_carrying import message
from .test_shards import SHARDS, Shards


@pytest.fixture
def shards(shared_server: Server, namespace: str) -> Iterator[Shards]:
    client = shared_server.client()
    yield Shards([Bench(client, Scripts(client, Keys(namespace, n))) for n in range(SHARDS)])
    for key in client.scan_iter(match="{affinity:" + namespace + "*", count=1000):
        client.delete(key)


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
