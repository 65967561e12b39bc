"""Which slot of a node goes to which shard next."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from celery_affinity.node_scripts import Demand
from celery_affinity.slot_choice import PATIENCE_SECONDS, Standing


def demand(
    ready: int = 0, free: int = 0, held: int = 0, idle: tuple[int, ...] = (), leased: tuple[int, ...] = (),
    *, ordinary: tuple[int, ...] = (), waited: float = 0.0, away: tuple[int, ...] = (),
) -> Demand:  # fmt: skip
    sets = map(frozenset, (idle, leased, away, ordinary))
    return Demand(ready, free, held, *sets, waited=waited)  # type: ignore[arg-type]


def choose(demands: dict[int, Demand], owner: dict[int, int]) -> tuple[int, int] | None:
    """Without a history."""
    return Standing(demands, owner).next()


def test_nothing_moves_while_no_tag_waits() -> None:
    assert choose({0: demand(idle=(0,)), 1: demand(idle=(1,))}, {0: 0, 1: 1}) is None


def test_a_free_slot_moves_to_the_shard_whose_tags_wait() -> None:
    demands = {0: demand(idle=(0, 1), free=2), 1: demand(ready=3, held=1)}
    assert choose(demands, {0: 0, 1: 0}) == (0, 1)


def test_no_slot_moves_to_a_shard_where_the_node_has_a_free_one_or_that_has_declined_one() -> None:
    assert choose({0: demand(idle=(0,)), 1: demand(ready=1, free=1, idle=(1,))}, {0: 0, 1: 1}) is None
    waits = {0: demand(idle=(0,)), 1: demand(ready=1)}
    assert Standing(waits, {0: 0}, declined={1}).next() is None


def test_a_free_slot_moves_for_a_tag_that_those_of_other_nodes_do_not_take() -> None:
    assert choose({0: demand(idle=(0,)), 1: demand(ready=1, free=1)}, {0: 0}) == (0, 1)


def test_a_shard_with_more_slots_gives_one_up_but_never_so_that_it_then_has_fewer() -> None:
    busy = demand(ready=9, held=3, leased=(0, 1, 2))
    assert choose({0: busy, 1: demand(ready=9, held=1)}, {0: 0, 1: 0, 2: 0, 3: 1}) == (0, 1)
    assert choose({0: busy, 1: demand(ready=9, held=1)}, {0: 0, 1: 0, 3: 1}) is None


def test_a_shard_without_any_lease_gets_the_only_slot_there_is() -> None:
    assert choose({0: demand(ready=9, held=1, leased=(0,)), 1: demand(ready=1)}, {0: 0}) == (0, 1)
    assert choose({0: demand(ready=9, held=1, leased=(0,)), 1: demand(ready=1, held=1)}, {0: 0}) is None


def test_shards_that_are_equally_in_need_take_turns() -> None:
    waits = {0: demand(ready=9, held=1, leased=(0,)), 1: demand(ready=1), 2: demand(ready=1)}
    assert Standing(waits, {0: 0}, turns={0: 3, 1: 2, 2: 1}).next() == (0, 2)
    assert Standing(waits, {0: 0}, turns={0: 3, 1: 1, 2: 2}).next() == (0, 1)


def test_a_shard_that_does_not_answer_neither_gives_nor_gets() -> None:
    assert choose({1: demand(ready=1)}, {0: 0}) is None


def test_a_shard_whose_tags_have_waited_longer_gets_a_slot_and_keeps_it() -> None:
    busy = demand(ready=9, held=1, leased=(0,), waited=1.0)
    older = demand(ready=1, held=1, waited=1.1 + PATIENCE_SECONDS)
    assert choose({0: busy, 1: older}, {0: 0}) == (0, 1)
    assert choose({0: busy, 1: older._replace(waited=PATIENCE_SECONDS)}, {0: 0}) is None
    has_more = older._replace(leased=frozenset({0, 1, 2}))
    assert choose({0: busy, 1: has_more}, {0: 1, 1: 1, 2: 1, 3: 0}) == (3, 1)


def test_a_slot_with_an_ordinary_task_counts_nowhere_and_goes_nowhere() -> None:
    hot = demand(ready=9, held=2, leased=(0, 2))
    owner = {0: 0, 2: 0, 1: 1}
    assert choose({0: hot, 1: demand(ready=1, held=1, leased=(1,))}, owner) is None
    assert choose({0: hot, 1: demand(ready=1, held=1, ordinary=(1,))}, owner) == (0, 1)
    assert choose({0: hot._replace(ordinary=frozenset({0}), ready=0), 1: demand(ready=1)}, {0: 0}) is None


def test_a_lent_slot_goes_when_its_lease_is_over_and_its_shard_knows_of_it() -> None:
    def choice(**lent: tuple[int, ...]) -> tuple[int, int] | None:
        here = demand(ready=9, held=2, **{"leased": (0, 1), **lent})
        return Standing({0: here, 1: demand(ready=1)}, {0: 0, 1: 0}, lent={1}).next(begun={1})

    assert choice(leased=(0,), away=(1,)) == (1, 1)
    assert choice(leased=(0,)) is None, "it was given up, or its ledger is of an older copy"
    assert choice(away=(1,)) is None


@given(
    shards=st.integers(2, 4), slots=st.integers(1, 6), ready=st.lists(st.integers(0, 9), min_size=4, max_size=4), seed=st.randoms()
)
def test_moves_come_to_an_end_and_leave_no_shard_with_waiting_tags_without_a_slot_if_there_are_enough(
    shards: int, slots: int, ready: list[int], seed: object
) -> None:
    owner = {slot: seed.randrange(shards) for slot in range(slots)}  # type: ignore[attr-defined]
    for _ in range(100):
        has = Counter(owner.values())
        # Each slot of a shard whose tags wait has one of them.
        demands = {
            shard: demand(
                ready=max(0, ready[shard] - has[shard]),
                held=min(has[shard], ready[shard]),
                idle=tuple(slot for slot, at in owner.items() if at == shard and not ready[shard]),
                free=0 if ready[shard] else has[shard],
            )
            for shard in range(shards)
        }
        move = choose(demands, owner)
        if move is None:
            break
        slot, new = move
        assert owner[slot] != new
        owner[slot] = new
    else:
        # Fewer slots than shards that wait: they take turns.
        assert slots < sum(1 for n in ready[:shards] if n)
        return
    if slots >= shards:
        has = Counter(owner.values())
        assert all(has[shard] for shard in range(shards) if ready[shard])
