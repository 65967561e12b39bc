"""What all benchmarks share: their command line, and their section of docs/performance.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.processes import ROOT
from celery_affinity.embedded import Server, start_server

__all__ = ("Options", "Section", "main", "spread", "table")

PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    #: How often the contestants take turns.
    pairs: int
    #: A smoke run: little work, and nothing is written down.
    quick: bool


@dataclass(frozen=True)
class Section:
    """What one benchmark found."""

    title: str
    #: Markdown below the title.
    text: str
    #: Every single run, as JSON.
    raw: Any


def main(
    name: str, measure: Callable[[Server, Options], Section], hard_seconds: int, about: str | None
) -> None:
    """Entry point of a benchmark: measure on a server of its own, print, write down.

    Arguments:
        name: The module's name.
        measure: Runs the contestants.
        hard_seconds: Nothing here may take longer, whatever hangs.
        about: The module's docstring.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about)
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing down")
    parser.add_argument("--pairs", type=int, help="rounds of all contestants (default 5)")
    given = parser.parse_args()
    options = Options(given.pairs or (1 if given.quick else 5), given.quick)
    if not options.quick and options.pairs < 5:
        parser.error("a median needs at least 5 pairs")

    def give_up(*_: object) -> None:
        raise TimeoutError(f"{name} took longer than {hard_seconds} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.alarm(hard_seconds)
    began = time.monotonic()
    with start_server() as server:
        where = _machine(server)
        section = measure(server, options)
    signal.alarm(0)
    seconds = time.monotonic() - began
    when = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    print(f"\n## {section.title}\n\n{section.text}\n\n{name}: {seconds:.0f} s", flush=True)
    if not options.quick:
        _keep(name, section, f"`python -m benchmarks.{name}`, {seconds:.0f} s, {when}", where)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def spread(ratios: Sequence[float]) -> str:
    """Median of the pairs' ratios, with the smallest and the largest."""
    return f"**{median(ratios):.2f}** ({min(ratios):.2f} - {max(ratios):.2f})"


def _keep(name: str, section: Section, command: str, where: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    raw = {"command": command, "machine": where, "found": section.raw}
    # A line for each run: small, and a new measurement shows what changed.
    text = json.dumps(raw, separators=(",", ":")).replace("},{", "},\n{")
    (RESULTS / f"{name}.json").write_text(text + "\n")
    begin, end = f"<!-- {name}: written by the benchmark -->", f"<!-- {name}: end -->"
    block = (
        f"{begin}\n## {section.title}\n\n{section.text}\n\n"
        f"{command}. {where}. Every run: benchmarks/results/{name}.json.\n{end}"
    )
    page = PAGE.read_text()
    found = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not found.search(page):
        raise RuntimeError(f"{PAGE} has no place for {name}: put {begin!r} and {end!r} there")
    PAGE.write_text(found.sub(lambda _: block, page))
    print(f"written: docs/performance.md, benchmarks/results/{name}.json")


def _machine(server: Server) -> str:
    with server.client() as client:
        info = client.info("server")
    names = {"celery": "celery", "kombu": "kombu", "redis": "redis-py", "gevent": "gevent"}
    packages = ", ".join(f"{shown} {version(name)}" for name, shown in names.items())
    return (
        f"{os.cpu_count()} cores of {_processor()}, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, {packages}, celery-affinity "
        f"{version('celery-affinity')}, {server.binary.name} "
        f"{info.get('valkey_version') or info['redis_version']}"
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
