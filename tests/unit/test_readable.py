"""Waiting for files to be readable."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

import pytest

from celery_affinity.readable import wait_readable


@pytest.fixture
def high() -> Iterator[tuple[int, int]]:
    """A pipe whose descriptors are above 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    low = os.pipe()
    ends = tuple(os.dup2(end, number) for end, number in zip(low, (1500, 1501), strict=True))
    yield ends  # type: ignore[misc]
    for end in (*low, *ends):
        os.close(end)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_descriptors_above_1024_are_waited_for(high: tuple[int, int]) -> None:
    reader, writer = high
    assert wait_readable([reader], 0) == []
    os.write(writer, b"!")
    assert wait_readable([reader], 10) == [reader]


def test_a_closed_file_is_an_error() -> None:
    with pytest.raises(ValueError):
        wait_readable([-1], 0)
