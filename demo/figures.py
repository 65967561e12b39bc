"""What an index says about the run that made it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from demo.contest import Outcome
from demo.store import Link, Store, store_path

__all__ = ("Figures", "chains", "measure")

SMALLEST_TAGS = 10


@dataclass(frozen=True)
class Figures:
    """The figures of one run."""

    files: int
    #: Tags whose chain ends in the digest of the single-process run.
    equal_digests: int
    tags: int
    reload_seconds: float
    reloads: int
    #: Of the files of the ten smallest tags, from submission to start.
    small_wait_seconds_p95: float
    #: How often a tag's next file was added by another process than the one before.
    owner_switches: int
    files_per_second: float
    #: From the kill to the start of the next file of the last of the tags that the killed worker
    #: held; None if nothing was killed or it held none.
    rescue_seconds: float | None


def chains(directory: Path, tags: Mapping[str, int]) -> dict[str, list[Link]]:
    """The chain of each tag in an index."""
    found: dict[str, list[Link]] = {}
    for tag in tags:
        path = store_path(directory, tag)
        if path.exists():
            store = Store(path)
            found[tag] = store.links()
            store.close()
        else:
            found[tag] = []
    return found


def measure(
    directory: Path, total: Mapping[str, int], reference: Mapping[str, str], outcome: Outcome
) -> Figures:
    """Read the figures of a run from its index.

    Arguments:
        total: Files of each tag that were submitted.
        reference: The digest of each tag after the single-process run.
    """
    by_tag = chains(directory, total)
    links = [link for chain in by_tag.values() for link in chain]
    smallest = sorted(total, key=lambda tag: (total[tag], tag))[:SMALLEST_TAGS]
    waits = [link.started_at - link.sent_at for tag in smallest for link in by_tag[tag]]
    began = min((link.sent_at for link in links), default=0.0)
    ended = max((link.finished_at for link in links), default=0.0)
    return Figures(
        files=len(links),
        equal_digests=sum(bool(c) and c[-1].digest == reference[tag] for tag, c in by_tag.items()),
        tags=len(total),
        reload_seconds=sum(link.reload_seconds for link in links),
        reloads=sum(link.reload_seconds > 0 for link in links),
        small_wait_seconds_p95=_percentile(waits, 0.95),
        owner_switches=sum(a.owner != b.owner for c in by_tag.values() for a, b in pairwise(c)),
        files_per_second=len(links) / (ended - began) if ended > began else 0.0,
        rescue_seconds=_rescue_seconds(by_tag, outcome),
    )


def _percentile(values: Sequence[float], share: float) -> float:
    if not values:
        return math.nan
    return sorted(values)[math.ceil(share * len(values)) - 1]


def _rescue_seconds(by_tag: Mapping[str, Sequence[Link]], outcome: Outcome) -> float | None:
    killed_at = outcome.killed_at
    if killed_at is None:
        return None
    nexts = [
        min((link.started_at for link in by_tag[tag] if link.started_at > killed_at), default=None)
        for tag in outcome.held_tags
    ]
    return max((start - killed_at for start in nexts if start is not None), default=None)
