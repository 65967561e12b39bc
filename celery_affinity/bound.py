"""What the public methods of `Affinity` stand on, so that they can be kept in files by role."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from celery_affinity.delivery import Delivery
from celery_affinity.exceptions import AmbiguousQueueError, NoSuchWorkerError, UndeclaredQueueError
from celery_affinity.operator_scripts import OperatorScripts
from celery_affinity.resharding import refuse_other_shards
from celery_affinity.settings import AffinityQueue, AffinitySettings
from celery_affinity.sharding import shard_of
from celery_affinity.shards import Shards
from celery_affinity.types import WorkerRecord
from celery_affinity.whole import WholeLedger

__all__ = ("Bound",)


class Bound:
    """An app's queues and its ledgers, connected when they are first needed."""

    if TYPE_CHECKING:
        app: Any

        @property
        def settings(self) -> AffinitySettings:
            """The settings in force."""
            ...

        @property
        def redis_url(self) -> str:
            """URL of the ledger's Redis."""
            ...

        @property
        def delivery(self) -> Delivery:
            """How messages get into the ledger and out of it."""
            ...

        def _tag_of_message(self, message: Mapping[str, Any]) -> object: ...

    @cached_property
    def _shards(self) -> Shards:
        return Shards(self.redis_url, self.settings.namespace, self.delivery)

    @cached_property
    def _ledger(self) -> WholeLedger:
        return WholeLedger(self._shards)

    @property
    def _scripts(self) -> OperatorScripts:
        """Those of the first shard, which has what is the whole namespace's."""
        return self._shards.scripts()

    def _declared(self, queue: str) -> AffinityQueue:
        found = self.settings.queue(queue)
        if found is None:
            raise UndeclaredQueueError(queue, self.settings.queue_names)
        return found

    def _reachable(self, queue: str) -> AffinityQueue:
        """The declared queue, whose tags the ledger has in the same shards.

        Raises:
            UndeclaredQueueError: If it is not declared.
            ShardsError: If the ledger has them elsewhere: nothing is found there, or reached.
        """
        declared = self._declared(queue)
        refuse_other_shards(declared, self._shards.scripts)
        return declared

    def _part(self, queue: str, tag: str) -> tuple[OperatorScripts, AffinityQueue]:
        """The part of a declared queue that a tag belongs to, and the scripts of its ledger."""
        declared = self._reachable(queue)
        part = declared.parts[shard_of(tag, declared.shards)]
        return self._shards.scripts(part.shard), part

    def queue_named(self, queue: str | None) -> AffinityQueue:
        """The declared queue of that name, or without a name the only one.

        Raises:
            UndeclaredQueueError: If it is not declared.
            AmbiguousQueueError: If none is named, and not exactly one is declared.
        """
        if queue is not None:
            return self._declared(queue)
        if len(self.settings.queues) != 1:
            raise AmbiguousQueueError(self.settings.queue_names)
        return self.settings.queues[0]

    def _worker(self, name: str) -> WorkerRecord:
        """The registered worker of that name, part of a name before its "@", or incarnation."""
        workers = self._ledger.workers(self.settings.queues)
        found = [w for w in workers if name in (w.worker_id, w.name, w.name.split("@")[0])]
        if len(found) != 1:
            raise NoSuchWorkerError(name, [(w.name, w.worker_id) for w in found or workers])
        return found[0]
