"""What an operator may do to the dead letters, as methods of `Affinity`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any
from uuid import NAMESPACE_OID, uuid5

from celery_affinity.bound import Bound
from celery_affinity.dead import DeadLetters
from celery_affinity.intake import Intake
from celery_affinity.settings import ENTRIES_A_SHARD, AffinityQueue
from celery_affinity.types import DeadLetter
from celery_affinity.who import write_down

__all__ = ("DeadLetterCalls",)


class DeadLetterCalls(Bound):
    """Mixed into `Affinity`."""

    def dead_letters(
        self, queue: str, limit: int = 100, *, after: int = 0, tag: str | None = None
    ) -> list[DeadLetter]:
        """Messages that were buried, with the reason, by entry (the order of admission).

        Arguments:
            after: The last entry of the page before.
            tag: Only those of this tag; "" is for those that have none.
        """
        return self._ledger.dead_letters(self._reachable(queue), limit, after, tag)

    def requeue_dead(
        self,
        queue: str,
        entries: Iterable[int] | None = None,
        *,
        tag: str | None = None,
        by: str = "",
    ) -> int:
        """Let buried messages run: these entries, those of a tag, or all there are now.

        Each joins the end of its tag, in the order of their entries; one that halts its tag
        (``on_failure``) goes back to the tag's head, and a blocked tag goes on. Message and task id
        stay the same, so a result that is FAILURE is replaced.

        Returns:
            How many were requeued. What intake still cannot use (no tag) stays a dead letter.

        Raises:
            ValueError: If both entries and a tag are given.
        """
        chosen = self._chosen("requeue", queue, entries, tag, by)
        return sum(dead.requeue(mine, tag) for dead, mine in self._dead(queue, chosen))

    def purge_dead(
        self,
        queue: str,
        entries: Iterable[int] | None = None,
        *,
        tag: str | None = None,
        by: str = "",
    ) -> int:
        """Delete buried messages for good: these entries, those of a tag, or all there are now.

        A tag that is blocked by one (``on_failure``) goes on.

        Returns:
            How many were deleted. One whose caller was not told of its failure yet stays: the
            leader tells within seconds, if the result backend can be reached.

        Raises:
            ValueError: If both entries and a tag are given.
        """
        chosen = self._chosen("purge dead", queue, entries, tag, by)
        return sum(dead.purge(mine, tag) for dead, mine in self._dead(queue, chosen))

    def _chosen(
        self, what: str, queue: str, entries: Iterable[int] | None, tag: str | None, by: str
    ) -> list[int] | None:
        """The chosen entries, after they were written down."""
        chosen = None if entries is None else list(entries)
        self._reachable(queue)
        if chosen is not None and tag is not None:
            raise ValueError(
                f"found both entries and a tag ({tag!r}): pass one of them, or neither for all"
            )
        if chosen is None:
            target = "all letters" if tag is None else tag
        else:
            target = f"letter {chosen[0]}" if len(chosen) == 1 else f"{len(chosen)} letters"
        write_down(self._scripts, by, what, queue, target)
        return chosen

    def _dead(
        self, queue: str, chosen: list[int] | None
    ) -> Iterator[tuple[DeadLetters, list[int] | None]]:
        """Each shard's letters, with those of its own that are chosen; None: all of them."""
        for part in self._reachable(queue).parts:
            if chosen is None:
                yield self._dead_of(part), None
            elif mine := [entry for entry in chosen if entry // ENTRIES_A_SHARD == part.shard]:
                yield self._dead_of(part), mine

    def _dead_of(self, part: AffinityQueue) -> DeadLetters:
        scripts, ledger = self._shards.scripts(part.shard), self._shards.ledger(part.shard)
        spread = part.untagged == "spread"
        place = (part.shard, part.shards)
        intake = Intake(scripts, part.state, [], self._tag_of_message, spread, *place)
        return DeadLetters(
            scripts,
            part.state,
            intake.judge,
            partial(ledger.dead_entries, part),
            partial(self._give_back_one, part),
        )

    def _give_back_one(self, part: AffinityQueue, entry: int, raw: bytes) -> None:
        """Publish a letter's message; a repeat has the same identity: it is carried once."""
        broker: Any = self.delivery.broker  # queues with several shards have one
        source = broker.source(part.pending)
        try:
            name = f"{self.settings.namespace} {part.state} {entry}"
            source.give_back([raw], [uuid5(NAMESPACE_OID, name).hex])
        finally:
            source.close()
