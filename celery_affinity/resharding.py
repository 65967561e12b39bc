"""Another number of shards than before: refused while anything is left, else begun with.

Which shard a tag is in follows from the number. So everybody who goes by another one is refused,
leaders, carriers and operators alike, as long as the ledger has anything of the queue. When it has
nothing, the first shard's leader takes the new number; what operators had set of single tags
goes then, as their shards are others, and all that is left in shards that are no more.

Crash windows: until the leader writes its settings the number is the old one, so after a crash
between two shards the next leader does it again
(test_a_change_of_shards_that_dies_half_way_is_done_by_the_next_leader).
"""

from __future__ import annotations

from collections.abc import Callable

from celery_affinity.exceptions import ShardsError
from celery_affinity.scripts import Scripts
from celery_affinity.settings import AffinityQueue

__all__ = ("begin_with_shards", "refuse_other_shards")

ScriptsOf = Callable[[int], Scripts]


def refuse_other_shards(queue: AffinityQueue, scripts_of: ScriptsOf) -> int | None:
    """Returns how many shards the queue had before, if that is another number; else None.

    Arguments:
        scripts_of: The scripts of a shard's ledger.

    Raises:
        ShardsError: If the ledger has another number and is not empty.
    """
    before = scripts_of(0).shards(queue.state)
    if before in (None, queue.shards):
        return None
    for part in _all_parts(queue, before):
        if not scripts_of(part.shard).is_empty(part.state):
            raise ShardsError(queue.name, before, queue.shards)
    return before


def begin_with_shards(queue: AffinityQueue, scripts_of: ScriptsOf) -> None:
    """What the first shard's leader does before it writes its settings.

    Raises:
        ShardsError: If the ledger has another number of shards and is not empty.
    """
    before = refuse_other_shards(queue, scripts_of)
    if before is None:
        return
    for part in _all_parts(queue, before):
        if not scripts_of(part.shard).reshape(part.state, goes=part.shard >= queue.shards):
            raise ShardsError(queue.name, before, queue.shards)


def _all_parts(queue: AffinityQueue, before: int) -> tuple[AffinityQueue, ...]:
    return queue.model_copy(update={"shards": max(before, queue.shards)}).parts
