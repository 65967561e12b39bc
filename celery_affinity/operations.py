"""What an operator may do to the dead letters and to halted tags, as methods of `Affinity`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from celery_affinity.dead import DeadLetters
from celery_affinity.intake import Intake
from celery_affinity.ledger import Ledger
from celery_affinity.message import tag_text
from celery_affinity.scripts import Scripts
from celery_affinity.settings import AffinityQueue
from celery_affinity.types import DeadLetter

__all__ = ("DeadLetterCalls",)


class DeadLetterCalls:
    """Mixed into `Affinity`, which has what these methods need."""

    @cached_property
    def _ledger(self) -> Ledger:
        raise NotImplementedError

    @cached_property
    def _scripts(self) -> Scripts:
        raise NotImplementedError

    def _declared(self, queue: str) -> AffinityQueue:
        raise NotImplementedError

    def _tag_of_message(self, message: Mapping[str, Any]) -> object:
        raise NotImplementedError

    def dead_letters(
        self, queue: str, limit: int = 100, *, after: int = 0, tag: str | None = None
    ) -> list[DeadLetter]:
        """Messages that were buried, with the reason, by entry (the order of admission).

        Arguments:
            after: The last entry of the page before.
            tag: Only those of this tag; "" is for those that have none.
        """
        return self._ledger.dead_letters(self._declared(queue), limit, after, tag)

    def requeue_dead(
        self, queue: str, entries: Iterable[int] | None = None, *, tag: str | None = None
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
        return self._dead(queue).requeue(entries, tag)

    def purge_dead(
        self, queue: str, entries: Iterable[int] | None = None, *, tag: str | None = None
    ) -> int:
        """Delete buried messages for good: these entries, those of a tag, or all there are now.

        A tag that is blocked by one (``on_failure``) goes on.

        Returns:
            How many were deleted. One whose caller was not told of its failure yet stays: the
            leader tells within seconds, if the result backend can be reached.

        Raises:
            ValueError: If both entries and a tag are given.
        """
        return self._dead(queue).purge(entries, tag)

    def resume_tag(self, queue: str, tag: str) -> None:
        """Let a tag that was halted by ``on_failure`` go on with what it has."""
        self._scripts.resume_tag(self._declared(queue).state, tag_text(tag))

    def _dead(self, queue: str) -> DeadLetters:
        declared = self._declared(queue)
        intake = Intake(
            self._scripts, declared.state, [], self._tag_of_message, declared.untagged == "spread"
        )
        return DeadLetters(
            self._scripts,
            declared.state,
            intake.judge,
            lambda tag: self._ledger.dead_entries(declared, tag),
        )
