"""The dead letters of a queue: requeue and purge what was buried, in bounded steps.

What is requeued need not pass the pending queue: a message that was admitted once is admitted again
inside Redis, any other is judged here as intake judges it, and stays buried if it still cannot be
used. One whose tag turns out to be another shard's goes there by the broker.

Crash windows: each step is one script that moves a letter or leaves it where it is, so a caller who
dies between two of them has moved some (test_two_callers_requeue_each_letter_once). After a lost
reply the same token is sent again (test_a_repeated_request_moves_nothing_and_answers_the_same).
Between publishing and requeue_elsewhere a letter is in both; the repeat publishes it with the same
identity, by which the carrier knows it
(test_a_letter_that_gets_its_tag_when_it_is_requeued_runs_in_the_shard_of_that_tag).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from uuid import uuid4

from celery_affinity.scripts import Scripts

__all__ = ("DeadLetters", "Judge", "Letters", "Publish")

#: Says of a message what intake would do: ("admit", message, tag, due time) or anything else.
Judge = Callable[[bytes], tuple[object, ...]]
#: Publishes an entry's message, for its shard.
Publish = Callable[[int, bytes], None]
#: Yields the entries that are buried now, oldest first, of one tag or of all.
Letters = Callable[[str | None], Iterable[int]]


class DeadLetters:
    """One queue's dead letters.

    Does not: read them (ledger.py) or bury (the scripts do).
    """

    #: Letters that one script moves or deletes at most: a few milliseconds of Redis.
    BATCH = 100

    def __init__(
        self,
        scripts: Scripts,
        state: str,
        judge: Judge,
        letters: Letters,
        publish: Publish | None = None,
    ) -> None:
        self._scripts = scripts
        self._state = state
        self._judge = judge
        self._letters = letters
        self._publish = publish

    def requeue(self, entries: Iterable[int] | None, tag: str | None) -> int:
        """Requeue these entries, those of a tag, or all; returns how many went."""
        done = 0
        for batch in self._batches(entries, tag):
            count, unread = self._scripts.requeue(self._state, _token(), batch)
            done += count
            for entry in unread:
                done += self._requeue_judged(entry)
        return done

    def _requeue_judged(self, entry: int) -> int:
        raw = self._scripts.buried_message(self._state, entry)
        if raw is None:
            return 0
        verdict, *kept = self._judge(raw)
        if verdict == "elsewhere" and self._publish is not None:
            self._publish(entry, bytes(kept[0]))  # type: ignore[call-overload]
            return self._scripts.requeue_elsewhere(self._state, _token(), entry)
        if verdict != "admit":
            return 0
        return self._scripts.requeue(self._state, _token(), [entry], kept[:3])[0]

    def purge(self, entries: Iterable[int] | None, tag: str | None) -> int:
        """Delete these entries, those of a tag, or all; returns how many are gone."""
        return sum(
            self._scripts.purge(self._state, _token(), batch)
            for batch in self._batches(entries, tag)
        )

    def _batches(self, entries: Iterable[int] | None, tag: str | None) -> Iterator[list[int]]:
        """The chosen letters in order. What is buried meanwhile is not among them."""
        if entries is not None and tag is not None:
            raise ValueError(
                f"found both entries and a tag ({tag!r}): pass one of them, or neither for all"
            )
        chosen: Sequence[int] = sorted(set(self._letters(tag) if entries is None else entries))
        rest = iter(chosen)
        while batch := list(islice(rest, self.BATCH)):
            yield batch


def _token() -> str:
    return uuid4().hex
