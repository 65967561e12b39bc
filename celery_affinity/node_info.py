"""What a node tells of its slots when it is asked itself: ``inspect affinity``, ``inspect stats``.

It is what has arrived here and has not ended, from this process' memory: the answer asks no Redis,
so that a hundred nodes may be asked by Flower every few seconds. The ledger's view, which includes
what is on its way, is `Affinity.workers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery_affinity.held import Held
from celery_affinity.message import TAG_HEADER

__all__ = ("slots_of",)


def slots_of(held: Held, count: int, queues: Mapping[str, str]) -> list[dict[str, Any]]:
    """A node's slots, by index; the names are those of `SlotRecord`.

    Arguments:
        count: How many slots the node has.
        queues: The name of each affinity queue by its state's name.
    """
    slots: dict[int, dict[str, Any]] = {i: {"index": i, "status": "idle"} for i in range(count)}
    for stamp, request, runs in held.content():
        known = slots.get(stamp.slot)
        if known is not None and known["status"] == "running" and not runs:
            continue  # the next task of a slot that works on one
        slots[stamp.slot] = {
            "index": stamp.slot,
            "status": "running",
            "queue": queues.get(stamp.state, stamp.state),
            "current_identify_tag": request.request_dict.get(TAG_HEADER),
            "current_batch_size": stamp.place,
            "epoch": int(stamp.epoch),
            "task": request.name,
            "task_id": request.id,
        }
    return [slots[i] for i in sorted(slots)]
