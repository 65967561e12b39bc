"""Which shard each of a node's slots works for; free ones go to the shard that needs them.

A node that serves several shards is registered in each with all its slots, but each slot is offered
in one of them only: in the others it is noted as away. It moves in this order:

    lend (old shard) --its lease ends--> get_back (new shard)

So no slot has leases in two shards, whatever is lost in between
(test_a_slot_never_has_leases_in_two_shards): what a slot works for is this process' decision, and
each look compares it with what the ledgers have. The node's death ends it in all of them.

A shard that has tags ready and no free slot gets one that is free elsewhere. So it does if it has
free ones of other nodes only, which those tags may not take (`move`, a task that only some nodes
know). If none is free, the shard that has most gives one up after its lease's batch, unless it
would then have fewer than the other; and a shard without any lease in the whole system always gets
one, so that none starves, also on nodes with fewer slots than there are shards.

Crash windows:
- between lend and get_back: the slot works for nobody until the next look
  (test_a_move_cut_off_half_way_is_finished_by_the_next_look).
- a shard's ledger is away or was restored: the others go on; when it answers, the look finds which
  slots it has wrongly (test_a_ledger_that_forgot_who_has_a_slot_is_told).
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import count

from redis.exceptions import RedisError

from celery_affinity.connection import Reachability
from celery_affinity.node_scripts import Demand
from celery_affinity.scripts import Scripts

__all__ = ("SlotExchange", "choose")

logger = logging.getLogger(__name__)

#: Seconds between two looks; the time in which a free slot is with the shard that needs it.
LOOK_SECONDS = 0.2


def choose(
    demands: Mapping[int, Demand],
    owner: Mapping[int, int],
    coming: Mapping[int, int],
    turns: Mapping[int, int],
) -> tuple[int, int] | None:
    """The next slot to move and the shard that is to have it, or None.

    Arguments:
        owner: Slot -> shard, of those that are not on their way.
        coming: Shard -> slots that are on their way to it.
        turns: Shard -> when it got a slot last; shards that are equally in need take turns.
    """
    has = {shard: sum(one == shard for one in owner.values()) for shard in demands}
    # A free slot that a ready tag does not take is of no use to it: the tag is on its way to
    # another node, or waits for one that knows its task. This node's own may be.
    needy = [
        shard
        for shard, demand in demands.items()
        if demand.ready > coming.get(shard, 0) and not (demand.free and demand.idle)
    ]
    for shard in sorted(needy, key=lambda s: (demands[s].held, has[s], turns.get(s, 0))):
        spare = [
            slot
            for slot, at in owner.items()
            if at != shard and at in demands and not demands[at].ready and slot in demands[at].idle
        ]
        if spare:
            return spare[0], shard
        others = [at for at in demands if at != shard and has[at]]
        if not others or coming.get(shard):
            continue
        rich = max(others, key=lambda at: has[at])
        if has[rich] - 1 > has[shard] or (not has[shard] and not demands[shard].held):
            # A free one, else any: its lease ends with its batch.
            mine = [slot for slot, at in owner.items() if at == rich]
            return min(mine, key=lambda slot: slot not in demands[rich].idle), shard
    return None


class SlotExchange:
    """One node's slots.

    Arguments:
        incarnations: The node's name in each shard.
        connect: Makes a shard's scripts.
        served: The queues' state names that the node serves now, of each shard.
        size: How many slots the node has now.
    """

    def __init__(
        self,
        incarnations: Sequence[str],
        connect: Callable[[int], Scripts],
        served: Callable[[int], Sequence[str]],
        size: Callable[[], int],
    ) -> None:
        self._incarnations = incarnations
        self._scripts = [connect(shard) for shard in range(len(incarnations))]
        self._served = served
        self._size = size
        self._lock = threading.Lock()
        # Nodes begin with different shards, so that small ones do not all serve the same.
        self._offset = random.randrange(len(incarnations))
        self._owner: dict[int, int] = {}
        #: Slot -> (shard that it leaves, shard that is to have it).
        self._moving: dict[int, tuple[int, int]] = {}
        self._turns: dict[int, int] = {}
        self._numbers = count(1)
        self._stopping = threading.Event()
        self._reachability = [
            Reachability(logger, "slots", f"The Redis of shard {shard}")
            for shard in range(len(incarnations))
        ]

    def away(self, shard: int) -> list[int]:
        """Slots that do not work for this shard. Any thread may ask."""
        with self._lock:
            return [slot for slot in range(self._size()) if self._owner_of(slot) != shard]

    def _owner_of(self, slot: int) -> int | None:
        """The shard that has a slot; None while it moves."""
        if slot in self._moving:
            return None
        return self._owner.setdefault(slot, (slot + self._offset) % len(self._incarnations))

    def stop(self) -> None:
        """Move no more slots. Safe in a signal handler."""
        self._stopping.set()

    def run(self) -> None:
        """Look and move until `stop`."""
        # Not in step with other nodes, or all of them would give their slots to the same shard.
        while not self._stopping.wait(LOOK_SECONDS * random.uniform(0.7, 1.3)):
            try:
                self.look()
            except Exception:
                logger.exception("Slots could not be moved.", extra={"action": "exchange_failed"})

    def look(self) -> None:
        """Set right what a ledger has wrongly, end moves whose lease has ended, begin new ones."""
        demands = {}
        for shard in range(len(self._incarnations)):
            if (demand := self._ask(shard)) is not None:
                demands[shard] = demand
        for slot, (old, new) in list(self._moving.items()):
            if old in demands and slot in demands[old].away - demands[old].leased:
                self._arrive(slot, new, demands)
        while move := self._choose(demands):
            slot, new = move
            with self._lock:
                old = self._owner[slot]
                self._moving[slot] = old, new
                self._turns[old] = self._turns[new] = next(self._numbers)
            if not self._ask_again(old, demands):
                return
            if slot not in demands[old].leased:
                self._arrive(slot, new, demands)

    def _choose(self, demands: Mapping[int, Demand]) -> tuple[int, int] | None:
        with self._lock:
            slots = range(self._size())
            owner = {slot: at for slot in slots if (at := self._owner_of(slot)) is not None}
            coming: dict[int, int] = {}
            for _, new in self._moving.values():
                coming[new] = coming.get(new, 0) + 1
        return choose(demands, owner, coming, self._turns)

    def _ask(self, shard: int) -> Demand | None:
        """How a shard stands, after it was told which slots it has; None without an answer."""
        scripts, incarnation = self._scripts[shard], self._incarnations[shard]
        states = self._served(shard)
        try:
            demand = scripts.demand(incarnation, states)
            away = set(self.away(shard))
            wrong = away ^ demand.away
            for slot in wrong & away:
                scripts.lend(incarnation, slot)
            for slot in wrong - away:
                scripts.get_back(incarnation, slot)
            if wrong:
                demand = scripts.demand(incarnation, states)
        except RedisError as error:
            self._reachability[shard].unanswered(error)
            return None
        self._reachability[shard].answered()
        return demand

    def _ask_again(self, shard: int, demands: dict[int, Demand]) -> bool:
        """Whether it answered; if not, nothing moves from or to it before the next look."""
        demand = self._ask(shard)
        if demand is None:
            demands.pop(shard, None)
            return False
        demands[shard] = demand
        return True

    def _arrive(self, slot: int, shard: int, demands: dict[int, Demand]) -> None:
        with self._lock:
            del self._moving[slot]
            self._owner[slot] = shard
        self._ask_again(shard, demands)
