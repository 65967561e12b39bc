"""A node's calls where it serves several shards: each goes to the shard that it is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from celery_affinity.scripts import Scripts

__all__ = ("ShardedScripts",)


class ShardedScripts(Scripts):
    """The scripts of several ledgers as one.

    Arguments:
        by_word: For each incarnation of the node, and each queue's state name, the ledger that has
            it. Every call that a node makes about a task begins with one of the two. What is of
            neither goes to the first one, which refuses it: a stray message of another node.
    """

    def __init__(self, by_word: Mapping[str, Scripts]) -> None:
        self._first = first = next(iter(by_word.values()))
        super().__init__(first.client, first.keys)
        self._by_word = dict(by_word)

    def _call(self, name: str, *args: object, lists: Sequence[str] = ()) -> Any:
        scripts = self._by_word.get(str(args[0]), self._first)
        return scripts._call(name, *args, lists=lists)
