"""Which shard each of a node's slots works for; free ones go to the shard that needs them.

A node that serves several shards is registered in each with all its slots, but each slot is offered
in one of them only: in the others it is noted as away. It moves in this order:

    lend (old shard) --its lease ends--> get_back (new shard)

So no slot has leases in two shards, whatever is lost in between
(test_a_slot_never_has_leases_in_two_shards): what a slot works for is this process' decision, and
each look compares it with what the ledgers have. The node's death ends it in all of them.

A shard that has tags ready and no free slot gets one that is free elsewhere (slot_choice.py). So it
does if it has free ones of other nodes only, which those tags may not take (`move`, a task that
only some nodes know). If none is free, the shard that has most gives one up after its lease's
batch, unless it would then have fewer than the other; and a shard without any lease in the whole
system always gets one, so that none starves, also on nodes with fewer slots than there are shards.
So does one whose tags have waited for longer, for all nodes with one slot or a long task.

Which lease ends first nobody knows. So each look lends one more slot, until one has come: the
others stay where they are (test_a_shard_does_not_wait_for_one_long_task_...). A shard whose tags do
not take the slot that came for them (all of them wait for another node) is left alone for a while.

Crash windows:
- between lend and get_back: the slot works for nobody until the next look
  (test_a_move_cut_off_half_way_is_finished_by_the_next_look).
- an ordinary task ends while a further shard does not answer: two looks on it is vacated there
  (test_a_slot_whose_ordinary_task_ended_unheard_is_vacated).
- a shard's ledger is away or was restored: the others go on; when it answers, the look finds which
  slots it has wrongly (test_a_ledger_that_forgot_who_has_a_slot_is_told).
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count

from redis.exceptions import RedisError

from celery_affinity.connection import Reachability
from celery_affinity.node_scripts import Demand
from celery_affinity.scripts import Scripts
from celery_affinity.slot_choice import Standing

__all__ = ("ANSWER_SECONDS", "SlotExchange")

logger = logging.getLogger(__name__)

#: Seconds between two looks; the time in which a free slot is with the shard that needs it.
LOOK_SECONDS = 0.2
#: Seconds after which a shard counts as one that does not answer, at each try of its client; the
#: slots of the others stand still as long.
ANSWER_SECONDS = 1.0
#: Seconds in which one that hung so is not asked again.
QUIET_SECONDS = 5.0
#: Seconds in which a shard whose tags did not take a slot gets no more, unless it has others ready.
DECLINED_SECONDS = 1.0


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
        #: Those that leave their shard when their lease ends.
        self._lent: set[int] = set()
        #: Shard -> how many tags did not take a slot, and until when that counts (monotonic).
        self._declined: dict[int, tuple[int, float]] = {}
        self._turns: dict[int, int] = {}
        #: Shard -> tokens of ordinary tasks that the first one had no more at the last look.
        self._late: dict[int, frozenset[str]] = {}
        self._numbers = count(1)
        self._stopping = threading.Event()
        #: Shard that hung -> until when it is not asked (monotonic).
        self._quiet: dict[int, float] = {}
        self._reachability = [
            Reachability(logger, "slots", f"The Redis of shard {shard}")
            for shard in range(len(incarnations))
        ]

    def away(self, shard: int) -> list[int]:
        """Slots that do not work for this shard. Any thread may ask."""
        with self._lock:
            return [slot for slot in range(self._size()) if self._owner_of(slot) != shard]

    def _owner_of(self, slot: int) -> int | None:
        """The shard that a slot works for; None while it leaves one."""
        return None if slot in self._lent else self._shard_of(slot)

    def _shard_of(self, slot: int) -> int:
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
        self._free(demands)
        done: set[int] = set()
        begun: set[int] = set()
        while move := self._standing(demands).next(done, begun):
            slot, new = move
            done.add(slot)
            if not self._lend(slot, demands):
                return
            if self._standing(demands).is_over(slot):
                self._arrive(slot, new, demands)
            else:
                begun.add(new)
        self._call_back(demands)

    def _free(self, demands: dict[int, Demand]) -> None:
        """End ordinary tasks of which a shard was not told, as the first was, that they have."""
        if 0 not in demands:
            return
        running = demands[0].tokens
        for shard, demand in list(demands.items()):
            late = demand.tokens - running
            for token in late & self._late.get(shard, frozenset()):
                self._vacate(shard, token, demands)
            self._late[shard] = late

    def _vacate(self, shard: int, token: str, demands: dict[int, Demand]) -> None:
        try:
            self._scripts[shard].vacate(self._incarnations[shard], token)
        except RedisError:
            return  # the next look does
        self._ask_again(shard, demands)

    def _standing(self, demands: Mapping[int, Demand]) -> Standing:
        now = time.monotonic()
        declined = [
            shard
            for shard, (ready, until) in self._declined.items()
            if now < until and shard in demands and demands[shard].ready == ready
        ]
        with self._lock:
            owner = {slot: self._shard_of(slot) for slot in range(self._size())}
            self._lent &= owner.keys()  # the pool may have shrunk
            return Standing(demands, owner, set(self._lent), dict(self._turns), declined)

    def _lend(self, slot: int, demands: dict[int, Demand]) -> bool:
        """False without an answer: nothing moves before the next look."""
        with self._lock:
            if slot in self._lent:
                return True
            self._lent.add(slot)
            old = self._shard_of(slot)
        return self._ask_again(old, demands)

    def _call_back(self, demands: dict[int, Demand]) -> None:
        """Leave slots that no other shard waits for any more where they are."""
        standing = self._standing(demands)
        for slot in standing.lent:
            old = standing.owner[slot]
            if old in demands and not standing.is_wanted(old):
                with self._lock:
                    self._lent.discard(slot)
                self._ask_again(old, demands)

    def _ask(self, shard: int) -> Demand | None:
        """How a shard stands, after it was told which slots it has; None without an answer."""
        asked = time.monotonic()
        if asked < self._quiet.get(shard, 0.0):
            return None
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
            if time.monotonic() - asked >= ANSWER_SECONDS:  # it hangs: the others' slots waited
                self._quiet[shard] = time.monotonic() + QUIET_SECONDS
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
            old, self._owner[slot] = self._owner[slot], shard
            self._lent.discard(slot)
            self._turns[old] = self._turns[shard] = next(self._numbers)
        if self._ask_again(shard, demands):
            found = demands[shard]
            if found.ready and slot in found.idle:
                self._declined[shard] = found.ready, time.monotonic() + DECLINED_SECONDS
