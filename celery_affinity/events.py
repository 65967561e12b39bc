"""Signals that tell user code when its process gets and loses a tag."""

from __future__ import annotations

from celery.utils.dispatch import Signal

__all__ = ("tag_acquired", "tag_released")

#: A process is about to run the first task of a lease.
#: Sender: the queue's name. Arguments: ``tag``, ``epoch``, ``queue``.
tag_acquired = Signal(name="tag_acquired", providing_args=["tag", "epoch", "queue"])

#: A process has run the last task of a lease. The ledger has passed the tag on by then, and it may
#: run elsewhere already: close and drop what is this process' own, write nothing of the tag's. With
#: threads and greenlets it may run in this process already: compare the epoch with what you opened.
#: Sender: the queue's name. Arguments: ``tag``, ``epoch``, ``queue``, ``reason``: "empty" (no more
#: work), "batch" (another tag's turn), "retry" (the tag waits for an ordered retry), "drained" (the
#: worker stops), "lost" (taken away while the process was cut off).
tag_released = Signal(name="tag_released", providing_args=["tag", "epoch", "queue", "reason"])
