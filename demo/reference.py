"""The measure: one process adds all files, in order, with the same handler."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from demo.corpus import Source
from demo.index import Index

__all__ = ("index_alone",)


def index_alone(sources: Iterable[Source], directory: Path) -> float:
    """Build the index in this process.

    Returns:
        The seconds it took.
    """
    began = time.monotonic()
    index = Index(directory)
    for source in sources:
        index.add(source.tag, source.seq, source.name, source.path, time.monotonic(), "alone")
    index.close_all()
    return time.monotonic() - began
