"""What a benchmark task writes down: 32 bytes with one `os.write`, alike for both contestants."""

from __future__ import annotations

import os
import struct
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = (
    "RECORDS_VARIABLE",
    "SIZE",
    "Record",
    "busiest_process_share",
    "lease_share",
    "load",
    "write",
)

#: Names the file that tasks append to.
RECORDS_VARIABLE = "BENCH_RECORDS"

_LAYOUT = struct.Struct("<QIIIIQ")
SIZE = _LAYOUT.size
_file: int | None = None


@dataclass(frozen=True)
class Record:
    """One execution: CLOCK_MONOTONIC in ns at the task's first line, and where it ran."""

    time_ns: int
    pid: int
    parent: int
    tag: int
    seq: int
    epoch: int


def write(time_ns: int, tag: str, seq: int, epoch: int = 0) -> None:
    """Append one record; O_APPEND keeps processes apart."""
    global _file
    if _file is None:
        _file = os.open(os.environ[RECORDS_VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(_file, _LAYOUT.pack(time_ns, os.getpid(), os.getppid(), int(tag[4:]), seq, epoch))


def load(path: Path) -> list[Record]:
    """All records, by time."""
    return sorted(
        (Record(*fields) for fields in _LAYOUT.iter_unpack(path.read_bytes())),
        key=lambda record: record.time_ns,
    )


def now_ns() -> int:
    """CLOCK_MONOTONIC, which all processes of a machine share."""
    return time.monotonic_ns()


def busiest_process_share(records: Sequence[Record]) -> float:
    """Mean over tags of the share of a tag's tasks that its busiest process ran."""
    return _largest_share(records, lambda record: record.tag)


def lease_share(records: Sequence[Record]) -> float:
    """Mean over leases of the share of a lease's tasks that its busiest process ran."""
    return _largest_share(records, lambda record: (record.tag, record.epoch))


def _largest_share(records: Sequence[Record], key: object) -> float:
    processes: dict[object, Counter[int]] = defaultdict(Counter)
    for record in records:
        processes[key(record)][record.pid] += 1  # type: ignore[operator]
    shares = [max(counts.values()) / counts.total() for counts in processes.values()]
    return sum(shares) / len(shares)
