"""A tag's SQLite file: its postings and the hash chain of the files that went in."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

__all__ = ("EMPTY_DIGEST", "Link", "Store", "chained", "store_path")

#: What the chain of a tag starts from.
EMPTY_DIGEST = hashlib.sha256(b"").hexdigest()

_SCHEMA = """
CREATE TABLE links (
    position INTEGER PRIMARY KEY, seq INTEGER NOT NULL UNIQUE, name TEXT NOT NULL,
    keywords TEXT NOT NULL, digest TEXT NOT NULL, owner TEXT NOT NULL, sent_at REAL NOT NULL,
    started_at REAL NOT NULL, finished_at REAL NOT NULL, reload_seconds REAL NOT NULL
);
CREATE TABLE postings (
    word TEXT NOT NULL, position INTEGER NOT NULL, count INTEGER NOT NULL,
    PRIMARY KEY (word, position)
) WITHOUT ROWID;
"""

#: Whoever waits longer for another process' transaction fails. SQLite's waiting is unfair,
#: which is kind to plain Celery: with a first-come lock (flock) a hot tag changed hands with every
#: file, three times as often, and plain Celery took four times as long.
_LOCK_SECONDS = 60.0


@dataclass(frozen=True)
class Link:
    """One file of a tag, as it stands in the tag's chain. Times are CLOCK_MONOTONIC's seconds."""

    #: Its place in the chain, from 1: the order in which tasks ran.
    position: int
    #: Its place in the order of submission, from 1.
    seq: int
    name: str
    keywords: str
    digest: str
    #: The process that added it.
    owner: str
    sent_at: float
    started_at: float
    finished_at: float
    #: Spent on reading the tag's postings back into memory before this file could be added.
    reload_seconds: float


def chained(digest: str, name: str, content: bytes, keywords: str) -> str:
    """The digest of a chain to which one more file is appended."""
    content_digest = hashlib.sha256(content).hexdigest()
    return hashlib.sha256("\0".join((digest, name, content_digest, keywords)).encode()).hexdigest()


def store_path(directory: Path, tag: str) -> Path:
    """Where a tag's file is in the directory of an index."""
    return directory / f"{tag}.sqlite"


class Store:
    """The open file of one tag.

    Does not: keep anything in memory. Each file goes in with its link in one transaction, so that
    a process killed at any moment leaves all of it or nothing.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            _create(path)
        self._database = _connect(path)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Keep other processes from writing until the end, then store all or, on error, nothing."""
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.rollback()
            raise
        self._database.commit()

    def last_link(self) -> Link | None:
        """The chain's last link, if it has any."""
        row = self._database.execute(
            "SELECT * FROM links ORDER BY position DESC LIMIT 1"
        ).fetchone()
        return Link(*row) if row else None

    def has(self, seq: int) -> bool:
        """Whether the file with this seq is in."""
        found = self._database.execute("SELECT 1 FROM links WHERE seq = ?", (seq,)).fetchone()
        return found is not None

    def append(self, link: Link, words: Mapping[str, int]) -> None:
        """Write a file's link and postings."""
        self._database.execute(
            "INSERT INTO links VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", astuple(link)
        )
        self._database.executemany(
            "INSERT INTO postings VALUES (?, ?, ?)",
            ((word, link.position, count) for word, count in words.items()),
        )

    def postings(self) -> Iterator[tuple[str, int, int]]:
        """All (word, position, count)."""
        return self._database.execute("SELECT word, position, count FROM postings")

    def links(self) -> list[Link]:
        """The chain, in order."""
        return [
            Link(*row) for row in self._database.execute("SELECT * FROM links ORDER BY position")
        ]

    def with_words(self, words: list[str]) -> list[tuple[Link, int]]:
        """The files that contain all of the words, with the sum of their counts."""
        places = ", ".join("?" * len(words))
        rows = self._database.execute(
            f"SELECT links.*, sum(count) FROM postings JOIN links USING (position) "
            f"WHERE word IN ({places}) GROUP BY position HAVING count(*) = ?",
            (*words, len(words)),
        )
        return [(Link(*row[:-1]), row[-1]) for row in rows]


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=_LOCK_SECONDS, isolation_level=None)
    # A killed process loses nothing that the kernel has. Only a power cut would need a sync.
    database.execute("PRAGMA synchronous = OFF")
    return database


def _create(path: Path) -> None:
    """Make the file aside, then give it its name: nobody sees half of it, two may try at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.draft")
    database = _connect(draft)
    database.execute("PRAGMA journal_mode = WAL")
    database.executescript(_SCHEMA)
    database.close()
    with contextlib.suppress(FileExistsError):
        os.link(draft, path)
    draft.unlink()
