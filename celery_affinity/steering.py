"""What takes several steps of an operator's commands: purging and revoking all that a tag has.

Crash windows: each step is one script that does a part or has done it already, so whoever dies
between two has done some, and a repeat does the rest
(test_a_purge_cut_off_half_way_is_finished_by_a_repeat). A revoke's first step covers all but what
is due later; what becomes due while it is under way is revoked all the same
(test_a_task_that_becomes_due_while_its_tag_is_revoked_is_revoked).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from uuid import uuid4

from celery_affinity.operator_scripts import OperatorScripts

__all__ = ("purge", "revoke")

#: Entries that one script deletes at most, and messages that are read at a time.
BATCH = 200

_Thing = TypeVar("_Thing")


def purge(scripts: OperatorScripts, state: str, tag: str, due: Sequence[int]) -> int:
    """Delete what a tag has waiting now; returns how many entries.

    Arguments:
        due: Its entries that are due later.
    """
    last = scripts.last_entry(state)
    deleted, more = 0, True
    pages = _pages(due)
    while more:
        done, more = scripts.purge_tag(state, uuid4().hex, tag, last, BATCH, next(pages, []))
        deleted += done
    for page in pages:
        deleted += scripts.purge_tag(state, uuid4().hex, tag, last, BATCH, page)[0]
    return deleted


def revoke(
    scripts: OperatorScripts,
    state: str,
    tag: str,
    due: Callable[[], Sequence[int]],
    headers: Callable[[Sequence[int]], Mapping[int, Mapping[str, Any]]],
) -> int | None:
    """Revoke what a tag has waiting; returns how many tasks, None if too many tags are revoked.

    Arguments:
        due: Reads its entries that are due later.
        headers: Reads the headers of entries.
    """
    # What becomes due is a new entry: read before, or one that does so meanwhile would be missed.
    later = due()
    revoked = _ids(later, headers)
    answer = scripts.revoke_tag(state, tag)
    if answer is None:
        return None
    waiting, running = answer
    # A retry of what runs now would be a new entry, too.
    revoked += _ids(running, headers)
    for page in _pages(revoked):
        scripts.revoke([state], page)
    return waiting + len(later)


def _ids(
    entries: Sequence[int], headers: Callable[[Sequence[int]], Mapping[int, Mapping[str, Any]]]
) -> list[str]:
    found = [about for page in _pages(entries) for about in headers(page).values()]
    return [str(about["id"]) for about in found if "id" in about]


def _pages(things: Sequence[_Thing]) -> Iterator[Sequence[_Thing]]:
    for at in range(0, len(things), BATCH):
        yield things[at : at + BATCH]
