"""The table at the end: this library beside plain Celery."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.table import Table

from demo.contest import PROCESSES_PER_WORKER, WORKERS
from demo.figures import SMALLEST_TAGS, Figures

__all__ = ("report",)

Cell = Callable[[Figures], str]

_RESCUE = "kill to its tags running again"


def report(figures: Mapping[str, Figures], total_files: int, alone_seconds: float) -> Table:
    """Draw the figures of each contestant.

    Arguments:
        figures: By the contestants' titles.
        alone_seconds: What the single-process run took.
    """
    first = next(iter(figures.values()))
    table = Table(
        title=f"{total_files:,} files, {first.tags} tags, {len(WORKERS)} workers with "
        f"-c {PROCESSES_PER_WORKER}; one process alone: {alone_seconds:.1f} s",
        title_justify="left",
    )
    table.add_column()
    for title in figures:
        table.add_column(title, justify="right")
    rows = _rows(total_files)
    if all(f.rescue_seconds is None for f in figures.values()):
        rows.pop(_RESCUE)
    for name, cell in rows.items():
        table.add_row(name, *(cell(f) for f in figures.values()))
    return table


def _rows(total_files: int) -> dict[str, Cell]:
    return {
        "files in the index": lambda f: f"{f.files:,}/{total_files:,}",
        "digests equal to one process": lambda f: f"{f.equal_digests}/{f.tags}",
        "time spent reloading": lambda f: f"{f.reload_seconds:.2f} s in {f.reloads:,} reloads",
        f"p95 wait, {SMALLEST_TAGS} smallest tags": lambda f: f"{f.small_wait_seconds_p95:.2f} s",
        "owner switches": lambda f: f"{f.owner_switches:,}",
        "throughput": lambda f: f"{f.files_per_second:,.0f} files/s",
        _RESCUE: lambda f: "-" if f.rescue_seconds is None else f"{f.rescue_seconds:.1f} s",
    }
