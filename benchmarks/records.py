"""What a benchmark task writes down: 48 bytes with one `os.write`, alike for all contestants."""

from __future__ import annotations

import os
import struct
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = (
    "RECORDS_VARIABLE",
    "SIZE",
    "Record",
    "busiest_process_share",
    "lease_share",
    "load",
    "now_ns",
    "write",
)

#: Names the file that tasks append to.
RECORDS_VARIABLE = "BENCH_RECORDS"

_LAYOUT = struct.Struct("<QQIIIIQQ")
SIZE = _LAYOUT.size
_file: int | None = None


class Record(NamedTuple):
    """One execution, and where it ran."""

    #: CLOCK_MONOTONIC in ns at the task's first line, and at its last one.
    began: int
    ended: int
    pid: int
    parent: int
    tag: int
    seq: int
    #: The lease's epoch; 0 where there is none.
    epoch: int
    #: Whether it had to set its tag up.
    cold: int


def write(began: int, tag: str, seq: int, epoch: int, cold: bool) -> None:
    """Append one record; O_APPEND keeps processes apart."""
    global _file
    if _file is None:
        _file = os.open(os.environ[RECORDS_VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    number = int(tag.partition("-")[2])
    pids = os.getpid(), os.getppid()
    os.write(_file, _LAYOUT.pack(began, now_ns(), *pids, number, seq, epoch, cold))


def load(path: Path) -> list[Record]:
    """All records, by the time of their beginning."""
    whole = path.read_bytes() if path.exists() else b""
    return sorted(map(Record._make, _LAYOUT.iter_unpack(whole[: len(whole) // SIZE * SIZE])))


def now_ns() -> int:
    """CLOCK_MONOTONIC, which all processes of a machine share."""
    return time.monotonic_ns()


def busiest_process_share(records: Sequence[Record]) -> float:
    """Mean over tags of the share of a tag's tasks that its busiest process ran."""
    return _largest_share(records, lambda record: record.tag)


def lease_share(records: Sequence[Record]) -> float:
    """Mean over leases of the share of a lease's tasks that its busiest process ran."""
    return _largest_share(records, lambda record: (record.tag, record.epoch))


def _largest_share(records: Sequence[Record], key: Callable[[Record], Hashable]) -> float:
    processes: dict[Hashable, Counter[int]] = defaultdict(Counter)
    for record in records:
        processes[key(record)][record.pid] += 1
    shares = [max(counts.values()) / counts.total() for counts in processes.values()]
    return sum(shares) / len(shares)
