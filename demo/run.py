"""The demo: index what is installed in this venv, with this library and with plain Celery."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from celery_affinity.embedded import start_server
from demo.contest import Contest, Contestant
from demo.contestants import AffinityContestant, PlainContestant
from demo.corpus import Source, installed
from demo.figures import Figures, chains, measure
from demo.processes import ProcessEndedError
from demo.reference import index_alone
from demo.report import report
from demo.table import view_for

__all__ = ("VAR", "main")

#: All that the demo writes.
VAR = Path(os.environ.get("DEMO_VAR") or Path(__file__).resolve().parent / "var")


def main() -> int:
    """Run the demo.

    Returns:
        0 if this library lost, doubled and reordered nothing.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    console = Console()
    try:
        return _run(console, kill=os.environ.get("KILL", "") not in ("", "0"))
    except ProcessEndedError as error:
        console.print(str(error), markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("stopped")
        return 130


def _interrupted(number: int, frame: Any) -> NoReturn:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # what was started must be stopped now
    raise KeyboardInterrupt


def _run(console: Console, *, kill: bool) -> int:
    shutil.rmtree(VAR, ignore_errors=True)
    sources = installed()
    total = Counter(source.tag for source in sources)
    console.print(
        f"{len(sources):,} files of {len(total)} distributions, "
        f"{max(total.values())} of the largest, {min(total.values())} of the smallest"
    )
    alone_seconds = index_alone(sources, VAR / "alone" / "index")
    reference = {
        tag: chain[-1].digest for tag, chain in chains(VAR / "alone" / "index", total).items()
    }
    console.print(f"one process alone: {alone_seconds:.1f} s")
    figures: dict[str, Figures] = {}
    contestants: tuple[Contestant, ...] = (AffinityContestant(), PlainContestant())
    with start_server() as server:
        for database, contestant in enumerate(contestants):
            url = server.url(database)
            figures[contestant.title] = _contest(
                contestant, sources, url, console, total, reference, kill=kill
            )
    console.print(report(figures, len(sources), alone_seconds))
    console.print(
        "A digest is a hash chain over a tag's tasks: it equals that of one process alone only "
        "if nothing was lost, doubled or reordered.\nAn owner switch is a tag's move to another "
        "process, which then has to reload. One process alone is the yardstick for the digests: it "
        "pays for no queue, result or hand-over."
    )
    console.print("Query it: .venv/bin/python -m demo.search celery apply_async")
    first = figures[AffinityContestant.title]
    return 0 if first.equal_digests == first.tags and first.files == len(sources) else 1


def _contest(
    contestant: Contestant,
    sources: Sequence[Source],
    url: str,
    console: Console,
    total: Counter[str],
    reference: dict[str, str],
    *,
    kill: bool,
) -> Figures:
    directory = VAR / contestant.module.removeprefix("demo.").removesuffix("_app")
    contestant.app.conf.update(broker_url=url)
    console.print(f"{contestant.title}: starting workers, logs in {directory}", soft_wrap=True)
    with view_for(console) as view:
        outcome = Contest(contestant, sources, directory, url, view, kill=kill).run()
    return measure(directory / "index", total, reference, outcome)


if __name__ == "__main__":
    sys.exit(main())
