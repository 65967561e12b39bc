"""The ledgers of a namespace: one, or one for each shard, maybe on several servers."""

from __future__ import annotations

from celery_affinity.connection import connect
from celery_affinity.delivery import Delivery
from celery_affinity.keys import Keys
from celery_affinity.ledger import Ledger
from celery_affinity.operator_scripts import OperatorScripts

__all__ = ("Shards",)


class Shards:
    """What operators read and run, by shard; each is connected when it is first needed.

    Arguments:
        url: The ledger's.
    """

    def __init__(self, url: str, namespace: str, delivery: Delivery) -> None:
        self._url = url
        self._namespace = namespace
        self.delivery = delivery
        self._scripts: dict[int, OperatorScripts] = {}
        self._ledgers: dict[int, Ledger] = {}

    def scripts(self, shard: int = 0) -> OperatorScripts:
        """The scripts of a shard's ledger."""
        if shard not in self._scripts:
            keys = Keys(self._namespace, shard)
            self._scripts[shard] = OperatorScripts(connect(self._url, keys.prefix), keys)
        return self._scripts[shard]

    def ledger(self, shard: int = 0) -> Ledger:
        """The reads of a shard's ledger."""
        if shard not in self._ledgers:
            scripts = self.scripts(shard)
            self._ledgers[shard] = Ledger(scripts.client, scripts.keys, self.delivery)
        return self._ledgers[shard]
