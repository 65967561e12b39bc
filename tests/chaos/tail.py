"""Reads a history while it grows, each line once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

Task = tuple[str, int]


class Tail:
    """What has started and what is done so far."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        #: Submitted, in order.
        self.sent: dict[Task, None] = {}
        #: Over for good, and when that was first so (seconds, CLOCK_MONOTONIC).
        self.done: dict[Task, float] = {}
        #: Each start: task, seconds, worker, pid, epoch.
        self.starts: list[tuple[Task, float, str, int, int | None]] = []
        #: Starts that have no end yet, by process.
        self.running: dict[int, Task] = {}

    def read(self) -> Tail:
        """Take in what is new."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._offset += len(whole)
            for line in whole.splitlines():
                self._take(line)
        return self

    def left(self, tasks: Iterable[Task]) -> list[Task]:
        """Which of these are not done."""
        self.read()
        return [task for task in tasks if task not in self.done]

    def wait_done(self, tasks: Iterable[Task], seconds: float) -> list[Task]:
        """Wait until they are done; which are not after so many seconds."""
        deadline = time.monotonic() + seconds
        left = list(tasks)
        while (left := self.left(left)) and time.monotonic() < deadline:
            time.sleep(0.01)
        return left

    def _take(self, line: bytes) -> None:
        event = json.loads(line)
        task = event["tag"], event["seq"]
        if event["event"] == "submit":
            self.sent[task] = None
        elif event["event"] == "start":
            self.starts.append(
                (task, event["t"] / 1e9, event["worker"], event["pid"], event.get("epoch"))
            )
            self.running[event["pid"]] = task
        else:
            self.running.pop(event["pid"], None)
            if event.get("outcome", "ok") in ("ok", "failed"):
                self.done.setdefault(task, event["t"] / 1e9)
