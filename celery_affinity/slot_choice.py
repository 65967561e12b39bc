"""Which slot of a node is to work for which shard next: the rules, without any I/O."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from celery_affinity.node_scripts import Demand

__all__ = ("PATIENCE_SECONDS", "Standing")

#: How much longer a shard's oldest tag may have waited than another's before it gets that one's
#: slots, however many it has. Two servers' clocks are not compared: each says how long it is.
PATIENCE_SECONDS = 2.0


class Standing(NamedTuple):
    """How a node's slots and its shards' tags stand at one moment."""

    #: By shard; one that did not answer is left out, and neither gives nor gets.
    demands: Mapping[int, Demand]
    #: Slot -> the shard that has it.
    owner: Mapping[int, int]
    #: Slots that their shard is to give up as soon as their lease ends.
    lent: Collection[int] = ()
    #: Shard -> when it got a slot last; shards that are equally in need take turns.
    turns: Mapping[int, int] = {}
    #: Shards whose tags did not take a slot of this node: they wait for another one.
    declined: Collection[int] = ()

    def has(self, shard: int) -> int:
        """How many slots it can use: not those with an ordinary task."""
        return sum(1 for _ in self._usable(shard))

    def _usable(self, shard: int) -> Iterator[int]:
        busy = self.demands[shard].ordinary
        return (slot for slot, at in self.owner.items() if at == shard and slot not in busy)

    def needy(self) -> list[int]:
        """Shards whose tags wait for a slot of this node, the one most in need first.

        A free slot that a ready tag does not take is of no use to it: the tag is on its way to
        another node, or waits for one that knows its task. This node's own may be.
        """
        found = [
            shard
            for shard, demand in self.demands.items()
            if demand.ready and not (demand.free and demand.idle) and shard not in self.declined
        ]
        return sorted(
            found, key=lambda s: (self.demands[s].held, self.has(s), self.turns.get(s, 0))
        )

    def gives(self, at: int, shard: int) -> bool:
        """Whether a shard gives a slot that is not free to another one.

        It does if it has more, or its tags have waited less; and in any case to one without a lease
        in the whole system, so that none starves.
        """
        here, there = self.demands[at], self.demands[shard]
        older = there.waited - here.waited
        if older > PATIENCE_SECONDS or not (self.has(shard) or there.held):
            return True
        return self.has(at) - 1 > self.has(shard) and -older <= PATIENCE_SECONDS

    def is_wanted(self, at: int) -> bool:
        """Whether another shard waits for a slot of this one."""
        return any(shard != at and self.gives(at, shard) for shard in self.needy())

    def is_over(self, slot: int) -> bool:
        """Whether its shard knows that it is lent, and its lease there has ended."""
        demand = self.demands[self.owner[slot]]
        return slot in demand.away - demand.leased and slot not in demand.ordinary

    def next(
        self, done: Collection[int] = (), begun: Collection[int] = ()
    ) -> tuple[int, int] | None:
        """A slot and the shard that is to have it, now or when its lease has ended; or None.

        Arguments:
            done: Slots that are not to be chosen any more.
            begun: Shards for which a slot with a lease has been chosen: not one more.
        """
        for shard in self.needy():
            others = [at for at in self.demands if at != shard]
            free = self._free(others, shard, done)
            if free:
                return min(free, key=lambda slot: self.demands[self.owner[slot]].ready), shard
            rich = [at for at in others if self.has(at) and self.gives(at, shard)]
            if shard in begun or not rich:
                continue
            # Which lease ends first nobody knows: one more is lent at each look.
            at = max(rich, key=self.has)
            mine = [slot for slot in self._usable(at) if slot not in {*self.lent, *done}]
            if mine:
                return mine[0], shard
        return None

    def _free(self, others: Collection[int], shard: int, done: Collection[int]) -> list[int]:
        """Slots that can go to a shard at once. A free one that its own shard's tags do not take
        is of more use in another.
        """
        return [
            slot
            for at in others
            for slot in self._usable(at)
            if slot not in done
            and (
                slot in self.demands[at].idle
                or (slot in self.lent and self.is_over(slot) and self.gives(at, shard))
            )
        ]
