"""What takes several steps of an operator's commands: purging and revoking all that a tag has.

Crash windows: each step is one script that does a part or has done it already, so whoever dies
between two has done some, and a repeat does the rest
(test_a_purge_cut_off_half_way_is_finished_by_a_repeat). A revoke's first step covers all but what
is due later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from uuid import uuid4

from celery_affinity.operator_scripts import OperatorScripts

__all__ = ("purge", "revoke")

#: Entries that one script deletes at most, and messages that are read at a time.
BATCH = 200


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
    answer = scripts.revoke_tag(state, tag)
    if answer is None:
        return None
    waiting, running = answer
    later = due()
    # A retry of what runs now would be a new entry, as is one that becomes due.
    for page in _pages([*running, *later]):
        if ids := [str(about["id"]) for about in headers(page).values() if "id" in about]:
            scripts.revoke([state], ids)
    return waiting + len(later)


def _pages(entries: Sequence[int]) -> Iterator[Sequence[int]]:
    for at in range(0, len(entries), BATCH):
        yield entries[at : at + BATCH]
