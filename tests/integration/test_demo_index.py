"""Laws of the demo's handler: without them its last digest would prove nothing."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from demo.corpus import Source
from demo.index import Index
from demo.postings import Postings
from demo.reference import index_alone
from demo.search import search
from demo.store import Link, Store, store_path

TAG = "some-distribution"
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["pytest", "demo.index", "demo.reference", "demo.search"])


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    """Twelve small files of one tag."""
    words = random.Random(7)
    made = []
    for seq in range(1, 13):
        path = tmp_path / f"module_{seq}.py"
        path.write_text("\n".join(f"name_{words.randrange(40)} = {seq}" for _ in range(60)))
        made.append(Source(TAG, seq, path.name, path))
    return made


def add(index: Index, source: Source) -> str:
    return index.add(source.tag, source.seq, source.name, source.path, time.monotonic(), "test")


def links(directory: Path) -> list[Link]:
    store = Store(store_path(directory, TAG))
    try:
        return store.links()
    finally:
        store.close()


def content(directory: Path) -> tuple[list[tuple[int, str]], list[tuple[str, int, int]]]:
    """The chain and the postings, without what depends on the run."""
    store = Store(store_path(directory, TAG))
    try:
        return [(link.seq, link.digest) for link in store.links()], sorted(store.postings())
    finally:
        store.close()


def reference(sources: list[Source], directory: Path) -> str:
    index_alone(sources, directory)
    return links(directory)[-1].digest


def test_a_rerun_of_a_seq_changes_nothing(sources: list[Source], tmp_path: Path) -> None:
    index = Index(tmp_path / "index")
    digests = [add(index, source) for source in sources]
    before = content(tmp_path / "index")
    for again in (index, Index(tmp_path / "index")):
        assert [add(again, source) for source in sources] == [digests[-1]] * len(sources)
        assert content(tmp_path / "index") == before


def test_a_reload_gives_the_digest_of_never_having_been_cold(
    sources: list[Source], tmp_path: Path
) -> None:
    index = Index(tmp_path / "cold")
    for source in sources:
        add(index, source)
        index.close(TAG)
    assert links(tmp_path / "cold")[-1].digest == reference(sources, tmp_path / "warm")
    assert [link.reload_seconds > 0 for link in links(tmp_path / "cold")] == [False] + [True] * 11
    assert not any(link.reload_seconds for link in links(tmp_path / "warm"))


def test_processes_that_take_turns_find_out_that_they_are_stale(
    sources: list[Source], tmp_path: Path
) -> None:
    two = Index(tmp_path / "two"), Index(tmp_path / "two")
    for source in sources:
        add(two[source.seq % 2], source)
    assert links(tmp_path / "two")[-1].digest == reference(sources, tmp_path / "one")


def test_the_digest_depends_on_the_order(sources: list[Source], tmp_path: Path) -> None:
    swapped = [*sources[:4], sources[5], sources[4], *sources[6:]]
    assert reference(swapped, tmp_path / "swapped") != reference(sources, tmp_path / "straight")


def test_the_digest_tells_of_a_file_that_is_missing(sources: list[Source], tmp_path: Path) -> None:
    straight = reference(sources, tmp_path / "straight")
    for left_out in range(len(sources)):
        fewer = [source for source in sources if source is not sources[left_out]]
        assert reference(fewer, tmp_path / f"without-{left_out}") != straight


def test_keywords_depend_on_the_postings_before_them(sources: list[Source], tmp_path: Path) -> None:
    *before, last = sources
    index_alone(sources, tmp_path / "all")
    index_alone([*before[:3], last], tmp_path / "few")
    assert links(tmp_path / "all")[-1].keywords != links(tmp_path / "few")[-1].keywords


def _add_all(sources: list[Source], directory: Path) -> None:
    index = Index(directory)
    for source in sources:
        add(index, source)


def _add_all_but_die(sources: list[Source], directory: Path, victim: int, point: Any) -> None:
    """SIGKILL oneself when `point`, a method, is through with the victim."""
    owner, name = point
    original = getattr(owner, name)

    def deadly(self: Any, file: Any, words: Any) -> None:
        original(self, file, words)
        if getattr(file, "position", file) == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, deadly)
    _add_all(sources, directory)


@pytest.mark.parametrize(
    "point",
    [(Store, "append"), (Postings, "add")],
    ids=["before the commit", "after the commit"],
)
def test_a_kill_leaves_no_half_of_a_file_and_a_rerun_completes_it(
    sources: list[Source], tmp_path: Path, point: Any
) -> None:
    directory = tmp_path / "killed"
    for victim in range(1, len(sources) + 1):
        process = FORK.Process(target=_add_all_but_die, args=(sources, directory, victim, point))
        process.start()
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
        assert len(links(directory)) == (victim - 1 if point[0] is Store else victim)
    _add_all(sources, directory)
    index_alone(sources, tmp_path / "alone")
    assert content(directory) == content(tmp_path / "alone")


def test_processes_at_once_lose_and_double_nothing(sources: list[Source], tmp_path: Path) -> None:
    directory = tmp_path / "shared"
    shares = [sources[start::3] for start in range(3)]
    processes = [FORK.Process(target=_add_all, args=(share, directory)) for share in shares]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(link.seq for link in links(directory)) == [source.seq for source in sources]


def test_a_search_finds_the_files_with_all_words_most_first(tmp_path: Path) -> None:
    texts = {"one.py": "celery celery retry", "two.py": "celery", "three.py": "Retry celery retry"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    index = Index(tmp_path / "index")
    for seq, name in enumerate(texts, start=1):
        add(index, Source(TAG, seq, name, tmp_path / name))
    index.close_all()
    hits = search(tmp_path / "index", ["retry", "CELERY"])
    assert [(hit.name, hit.count) for hit in hits] == [("one.py", 3), ("three.py", 3)]
    assert search(tmp_path / "index", ["missing"]) == []
