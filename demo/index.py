"""The handler that all contestants share: add one source file to the index of its tag."""

from __future__ import annotations

import time
from pathlib import Path

from demo.postings import Postings, words_of
from demo.store import EMPTY_DIGEST, Link, Store, chained, store_path

__all__ = ("Index",)


class Index:
    """The part of the index that one process has in its memory.

    It may be used by any process at any time, and still be right: a process whose postings of a
    tag are not those on disk (another one added a file meanwhile, or it never had any) reads them
    back first. How often that happens is up to whoever decides where a tag's tasks run.

    Arguments:
        directory: Where the SQLite files are, one for each tag.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: dict[str, tuple[Store, Postings]] = {}

    def add(self, tag: str, seq: int, name: str, path: Path, sent_at: float, owner: str) -> str:
        """Add a file; nothing happens if it is in already.

        Arguments:
            seq: Its place among the files of its tag.
            name: What it is called in the index.
            sent_at: When its task was submitted, by CLOCK_MONOTONIC.
            owner: Name of this process.

        Returns:
            The digest of the tag's chain.
        """
        started_at = time.monotonic()
        content = path.read_bytes()
        words = words_of(content)
        store, postings = self._opened(tag)
        try:
            with store.transaction():
                last = store.last_link()
                position, digest = (last.position, last.digest) if last else (0, EMPTY_DIGEST)
                if store.has(seq):
                    return digest
                reload_seconds = 0.0
                if postings.files != position:
                    postings, reload_seconds = self._reloaded(tag, store, position)
                keywords = " ".join(postings.keywords(words))
                digest = chained(digest, name, content, keywords)
                store.append(
                    Link(
                        position + 1,
                        seq,
                        name,
                        keywords,
                        digest,
                        owner,
                        sent_at,
                        started_at,
                        time.monotonic(),
                        reload_seconds,
                    ),
                    words,
                )
        except BaseException:
            self.close(tag)  # what is in memory may not be what is on disk
            raise
        postings.add(position + 1, words)
        return digest

    def close(self, tag: str) -> None:
        """Close the tag's file and drop its postings from memory."""
        if held := self._open.pop(tag, None):
            held[0].close()

    def close_all(self) -> None:
        """Close all tags."""
        for tag in list(self._open):
            self.close(tag)

    def _opened(self, tag: str) -> tuple[Store, Postings]:
        if tag not in self._open:
            self._open[tag] = (Store(store_path(self._directory, tag)), Postings())
        return self._open[tag]

    def _reloaded(self, tag: str, store: Store, files: int) -> tuple[Postings, float]:
        began = time.monotonic()
        postings = Postings(store.postings(), files)
        self._open[tag] = (store, postings)
        return postings, time.monotonic() - began
