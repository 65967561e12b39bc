"""The demo's input: the Python source files of every distribution installed in this venv."""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

__all__ = ("Source", "by_tag", "installed")

#: No distribution gives more files than this.
MAX_FILES = int(os.environ.get("FILES") or 500)


@dataclass(frozen=True)
class Source:
    """One source file: one task."""

    #: Name of its distribution.
    tag: str
    #: Its place among the files of its tag, from 1.
    seq: int
    #: As the distribution lists it.
    name: str
    #: Where it is.
    path: Path


def installed() -> list[Source]:
    """All source files, those of the largest distribution first.

    That is the worst case for the small ones: they stand behind everything else.
    """
    places = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    tags: dict[str, list[Source]] = {}
    for distribution in distributions(path=places):
        tag = re.sub(r"[-_.]+", "-", distribution.name).lower()
        if found := _sources(tag, distribution):
            tags.setdefault(tag, found)
    hottest_first = sorted(tags.items(), key=lambda item: (-len(item[1]), item[0]))
    return [source for _, sources in hottest_first for source in sources]


def by_tag(sources: Iterable[Source]) -> dict[str, list[Source]]:
    """The sources of each tag, in order."""
    tags: dict[str, list[Source]] = {}
    for source in sources:
        tags.setdefault(source.tag, []).append(source)
    return tags


def _sources(tag: str, distribution: Distribution) -> list[Source]:
    files = sorted(
        (str(file), Path(str(file.locate())))
        for file in distribution.files or ()
        if file.suffix == ".py"
    )
    present = [(name, path.resolve()) for name, path in files if path.is_file()][:MAX_FILES]
    return [Source(tag, seq, name, path) for seq, (name, path) in enumerate(present, start=1)]
