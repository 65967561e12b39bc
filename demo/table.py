"""The live table; without a terminal, a line every second."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from demo.contest import View
from demo.progress import Snapshot

if TYPE_CHECKING:
    from typing import Self

__all__ = ("view_for",)

#: Rows of the table of tags.
_TAG_ROWS = 14
_LINE_SECONDS = 1.0


class _LiveTable:
    """Slots on the left, the tags with most to do on the right."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def show(self, snapshot: Snapshot) -> None:
        """Draw the table anew."""
        self._live.update(_drawn(snapshot), refresh=True)

    def say(self, text: str) -> None:
        """Print a line above the table."""
        self._live.console.print(text)


class _Lines:
    """A line every second."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._printed = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, snapshot: Snapshot) -> None:
        """Print a line, if the last one is old enough."""
        if time.monotonic() - self._printed < _LINE_SECONDS:
            return
        self._printed = time.monotonic()
        started = sum(done > 0 for done in snapshot.done.values())
        slots = ", ".join(f"{s.worker}/{s.slot} {s.tag or '-'}" for s in snapshot.slots)
        self.say(
            f"{snapshot.title} {snapshot.seconds:5.1f} s: {snapshot.done_files}/"
            f"{snapshot.total_files} files, {started}/{len(snapshot.total)} tags begun; {slots}"
        )

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, highlight=False, soft_wrap=True)


def view_for(console: Console) -> _LiveTable | _Lines:
    """The view that suits a console, as a context manager."""
    return _LiveTable(console) if console.is_terminal else _Lines(console)


def _drawn(snapshot: Snapshot) -> Group:
    bar = ProgressBar(snapshot.total_files, snapshot.done_files, width=60)
    count = Text(f"{snapshot.done_files:,} of {snapshot.total_files:,} files")
    head = Text(f"{snapshot.title}: {snapshot.seconds:.1f} s", style="bold")
    notes = [Text(note, style="dim") for note in snapshot.notes]
    return Group(head, Columns([bar, count]), Columns([_slots(snapshot), _tags(snapshot)]), *notes)


def _slots(snapshot: Snapshot) -> Table:
    table = Table("worker", "slot", "tag", "batch", title="slots", min_width=46)
    for slot in snapshot.slots:
        table.add_row(slot.worker, slot.slot, slot.tag or Text("idle", style="dim"), slot.batch)
    return table


def _tags(snapshot: Snapshot) -> Table:
    table = Table("tag", "files", "", title="tags with most to do")
    left = {tag: n - snapshot.done.get(tag, 0) for tag, n in snapshot.total.items()}
    ranked = sorted((tag for tag in left if left[tag]), key=lambda tag: -left[tag])
    for tag in ranked[:_TAG_ROWS]:
        done, total = snapshot.done.get(tag, 0), snapshot.total[tag]
        table.add_row(tag, f"{done}/{total}", ProgressBar(total, done, width=20))
    rest = len(ranked) - _TAG_ROWS
    more = f"{rest} more, " if rest > 0 else ""
    table.caption = f"{more}{len(left) - len(ranked)} of {len(left)} tags done"
    return table


if TYPE_CHECKING:
    _a_view: View = _Lines(Console())
