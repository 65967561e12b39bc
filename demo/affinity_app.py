"""The first contestant: tasks of one tag run in one place, one at a time, in order."""

from __future__ import annotations

from typing import Any

from celery_affinity import Affinity, AffinityQueue, tag_released
from demo.contestant import QUEUE, add_file, close_tag, make_app

__all__ = ("affinity", "app", "index_file")

app = make_app("demo.affinity")
# A tag that changes hands is read back from disk, which takes as long as adding some ten files:
# a batch should be well above that.
affinity = Affinity(app, queues=[AffinityQueue(QUEUE, max_batch_size=25)])

index_file = affinity.task(name="demo.index_file", queue=QUEUE, tag_from="tag")(add_file)


@tag_released.connect
def forget(tag: str, **_: Any) -> None:
    """The tag goes elsewhere: what this process remembers of it will be out of date."""
    close_tag(tag)
