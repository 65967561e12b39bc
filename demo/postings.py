"""A tag's postings in memory: which word stands in which of its files, and how often."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

__all__ = ("Postings", "words_of")

_WORD = re.compile(r"[a-z_][a-z0-9_]+")
#: Longer ones are data, not words.
_MAX_LETTERS = 60
_KEYWORDS = 5


def words_of(content: bytes) -> Counter[str]:
    """The words of a source file with their counts."""
    text = content.decode("utf-8", errors="replace").lower()
    return Counter(word for word in _WORD.findall(text) if len(word) <= _MAX_LETTERS)


class Postings:
    """What a process keeps while it holds a tag.

    Does not: know of the disk. Build it from rows that were stored, or from files one by one.

    Arguments:
        rows: (word, file, count) of the files that are in it already.
        files: How many those are.
    """

    def __init__(self, rows: Iterable[tuple[str, int, int]] = (), files: int = 0) -> None:
        #: Files that are in here.
        self.files = files
        self._files_of: dict[str, dict[int, int]] = {}
        for word, file, count in rows:
            self._files_of.setdefault(word, {})[file] = count

    def add(self, file: int, words: Mapping[str, int]) -> None:
        """Take in a file."""
        self.files += 1
        for word, count in words.items():
            self._files_of.setdefault(word, {})[file] = count

    def keywords(self, words: Mapping[str, int]) -> list[str]:
        """The words that set a file apart from those already in here.

        They depend on all files before it, so they come out wrong if one of those is missing,
        doubled or out of its place.
        """

        def weight(word: str) -> float:
            in_files = len(self._files_of.get(word, ()))
            return words[word] * math.log((self.files + 2) / (in_files + 1))

        return sorted(words, key=lambda word: (-weight(word), word))[:_KEYWORDS]
