"""Run histories: ``python -m tests.sim --n 1000``, or ``make sim N=1000``."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from pathlib import Path

from .account import Violation
from .bugs import BUGS, NONE, Bug
from .history import History, run_history
from .server import Ledger, ledger

#: Where the table of planted bugs goes in a document.
TABLE = re.compile(r"(?<=<!-- planted bugs -->\n).*?(?=<!-- end -->)", re.DOTALL)
#: A planted bug that is not found in so many histories is not found.
PATIENCE = 3000


def show(history: History, violation: Violation, bug: str) -> None:
    """The whole history, what is wrong with it, and how to see it again."""
    print("\n".join(history.world.log))
    print(f"\nseed {history.world.seed}: {violation}")
    print(f"replay: make sim N=1 SEED={history.world.seed}" + (f" BUG={bug}" if bug else ""))


def find(one: Ledger, bug: Bug, seed: int, patience: int) -> tuple[int, Violation | None]:
    """Histories until a planted bug is found, and as what."""
    one.load(bug.texts())
    for count in range(1, patience + 1):
        _, violation = run_history(one, seed + count - 1, bug)
        if violation:
            return count, violation
    return patience, None


def table(one: Ledger, seed: int) -> tuple[str, bool]:
    """All planted bugs in turn, as Markdown; whether each was found."""
    lines = ["| planted bug | what is wrong | found after | as |", "| --- | --- | --- | --- |"]
    missed = False
    for bug in BUGS.values():
        count, violation = find(one, bug, seed, PATIENCE)
        missed = missed or violation is None
        found = f"{count} histories" if count > 1 else "1 history"
        kind = violation.kind if violation else "NOT FOUND"
        lines.append(f"| `{bug.name}` | {bug.what} | {found} | {kind} |")
        print(lines[-1], f"{violation}", flush=True)
    return "\n".join(lines) + "\n", not missed


def run(one: Ledger, options: argparse.Namespace) -> int:
    """So many histories; the number of violations."""
    bug = BUGS[options.bug] if options.bug else NONE
    one.load(bug.texts())
    began, calls, kinds, seen = time.monotonic(), 0, Counter[str](), Counter[str]()
    for done, seed in enumerate(range(options.seed, options.seed + options.n), 1):
        history, violation = run_history(one, seed, bug)
        calls += history.world.calls
        seen.update(history.judge.seen)
        if violation and not options.go_on:
            show(history, violation, options.bug)
            return 1
        if violation:
            kinds[violation.kind] += 1
            print(f"seed {seed}: {violation}", flush=True)
        elif options.show:
            print("\n".join(history.world.log))
        if done % 1000 == 0:
            print(f"{done} histories, {sum(kinds.values())} violations", flush=True)
    took = time.monotonic() - began
    print(f"{options.n} histories, {calls} calls, {took:.1f} s: {sum(kinds.values())} violations")
    print("of these:", ", ".join(f"{n} {what}" for what, n in sorted(seen.items())))
    return sum(kinds.values())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--n", type=int, default=1000, help="histories to run")
    parser.add_argument("--seed", type=int, default=0, help="the first one's seed")
    parser.add_argument("--bug", default="", help=f"plant one: {', '.join(BUGS)}; or 'all' in turn")
    parser.add_argument("--write", type=Path, help="with --bug all: the document with the table")
    parser.add_argument("--go-on", action="store_true", help="name violations, and go on")
    parser.add_argument("--show", action="store_true", help="print lawful histories too")
    options = parser.parse_args()
    if options.bug not in ("", "all", *BUGS):
        parser.error(f"no planted bug is named {options.bug!r}; there are {', '.join(BUGS)}")
    with ledger() as one:
        if options.bug != "all":
            return 1 if run(one, options) else 0
        text, found = table(one, options.seed)
    if options.write:
        options.write.write_text(TABLE.sub(lambda _: text, options.write.read_text()))
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
