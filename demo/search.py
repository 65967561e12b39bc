"""Query the index that the demo made: ``python -m demo.search celery apply_async``."""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from demo.run import VAR
from demo.store import Store

__all__ = ("Hit", "main", "search")

MAX_HITS = 20


@dataclass(frozen=True)
class Hit:
    """A file that contains all words of a query."""

    tag: str
    name: str
    #: How often the words stand in it, together.
    count: int
    keywords: str


def search(directory: Path, words: list[str]) -> list[Hit]:
    """The files that contain all of the words, those with most of them first."""
    wanted = sorted({word.lower() for word in words})
    hits: list[Hit] = []
    for path in directory.glob("*.sqlite"):
        store = Store(path)
        hits += [
            Hit(path.stem, link.name, count, link.keywords)
            for link, count in store.with_words(wanted)
        ]
        store.close()
    return sorted(hits, key=lambda hit: (-hit.count, hit.tag, hit.name))


def main(words: list[str]) -> int:
    """Print what is found.

    Returns:
        1 if nothing is.
    """
    directory = VAR / "affinity" / "index"
    if not words or not directory.is_dir():
        print("usage: python -m demo.search WORD..., after make demo", file=sys.stderr)
        return 2
    hits = search(directory, words)
    of_tag: dict[str, int] = defaultdict(int)
    for hit in hits:
        of_tag[hit.tag] += hit.count
    ranked = sorted(of_tag.items(), key=lambda item: -item[1])
    console = Console()
    console.print(f"{len(hits)} files: " + ", ".join(f"{tag} {count}" for tag, count in ranked))
    table = Table("count", "distribution", "file", "what sets it apart")
    for hit in hits[:MAX_HITS]:
        table.add_row(str(hit.count), hit.tag, hit.name, hit.keywords)
    if hits:
        console.print(table)
    return 0 if hits else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
