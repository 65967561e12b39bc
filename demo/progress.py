"""How far an index is, read from its files while workers write to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from demo.store import Link, Store, store_path

__all__ = ("Progress", "SlotState", "Snapshot")


@dataclass(frozen=True)
class SlotState:
    """What one pool process does."""

    worker: str
    slot: str
    #: The tag that it works on, or "".
    tag: str
    batch: str
    #: Whether nobody else may work on the tag.
    holds: bool = False


@dataclass(frozen=True)
class Snapshot:
    """What the table shows at one moment."""

    title: str
    seconds: float
    #: Files in the index, by tag.
    done: Mapping[str, int]
    #: Files of each tag, in the order of submission.
    total: Mapping[str, int]
    slots: tuple[SlotState, ...] = ()
    #: Other facts, such as who leads.
    notes: tuple[str, ...] = field(default=())

    @property
    def done_files(self) -> int:
        """Files in the index."""
        return sum(self.done.values())

    @property
    def total_files(self) -> int:
        """Files that were or will be submitted."""
        return sum(self.total.values())


class Progress:
    """Looks at the files of an index.

    Does not: create any.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stores: dict[str, Store] = {}

    def last_links(self, tags: Mapping[str, int]) -> dict[str, Link]:
        """The last link of each tag that has one."""
        for tag in tags:
            path = store_path(self._directory, tag)
            if tag not in self._stores and path.exists():
                self._stores[tag] = Store(path)
        found = {tag: store.last_link() for tag, store in self._stores.items()}
        return {tag: link for tag, link in found.items() if link is not None}

    def close(self) -> None:
        """Close the files."""
        for store in self._stores.values():
            store.close()
        self._stores.clear()
