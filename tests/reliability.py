"""The table of docs/reliability.md: which fault or outcome each law proves, and what came of it.

A law says what it proves with ``@pytest.mark.proves(fault, result)``, once for each row; a fault that
has a number in the plan begins with it: "14: Redis killed". ``pytest --reliability docs/reliability.md``
writes the table between two comments of that file, from this run, and refuses if a law with a mark
did not run. tests/unit/test_reliability.py fails when rows and marks differ.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- reliability: begin -->", "<!-- reliability: end -->"
HEAD = "| fault or outcome | pool or setting | what happens | law | |\n| --- | --- | --- | --- | --- |"
#: Faults of the plan that no law proves: number -> name, and why.
NOT_COVERED: dict[int, tuple[str, str]] = {
    13: ("C code holds the GIL for longer than a lease", "A declared limit, as a frozen process is"),
    33: ("Two masters after a partition", "What the old one took is lost (howto_redis.md); no law cuts a network in two"),
    41: ("A host is suspended", "A frozen process tree stands in for it"),
    51: ("Two versions of the library during a deploy", "There is one version"),
}
#: The plan's last number.
FAULTS = 52

Key = tuple[str, str, str]


@dataclass
class Row:
    """One line of the table: the cases of one law that prove the same of the same fault."""

    fault: str
    result: str
    #: Its file and name, from the tests' directory.
    law: str
    #: Parametrisation -> "passed", "failed", "known fault" or "" for what did not run.
    cases: dict[str, str] = field(default_factory=dict)

    @property
    def numbers(self) -> list[int]:
        """The plan's numbers that it is about."""
        head = re.match(r"\d+(, \d+)*(?=: )", self.fault)
        return [int(number) for number in head.group().split(", ")] if head else []

    @property
    def place(self) -> tuple[object, ...]:
        """Where it stands: by number, then by name."""
        numbers = self.numbers
        return (not numbers, numbers, self.fault, self.law, self.result)

    def line(self) -> str:
        """Its line."""
        path, name = self.law.split("::")
        link = f"[{name.removeprefix('test_').replace('_', ' ')}](../tests/{path})"
        verdicts = sorted(set(self.cases.values()))
        bad = [case for case, verdict in self.cases.items() if verdict == "failed"]
        named = f" ({', '.join(filter(None, bad))})" if any(bad) else ""
        verdict = f"**failed**{named}" if bad else ", ".join(verdicts)
        cases = ", ".join(case for case in self.cases if case)
        return f"| {self.fault} | {cases} | {self.result} | {link} | {verdict} |"


def proofs_of(item: pytest.Item) -> list[tuple[str, str]]:
    """What a law proves, as (fault, result).

    Raises:
        UsageError: For a mark that is no two texts for a line of a table.
    """
    found = []
    for mark in reversed(list(item.iter_markers("proves"))):
        good = len(mark.args) == 2 and not mark.kwargs and all(
            isinstance(text, str) and text.strip() and not re.search(r"[|\n]", text)
            for text in mark.args
        )
        if not good:
            raise pytest.UsageError(
                f"{item.nodeid}: proves{mark.args} is not proves(fault, result), two texts of one "
                "line without '|'"
            )
        found.append((mark.args[0], mark.args[1]))
    return found


def rows_of(proofs: Iterable[tuple[str, str, str]], verdicts: dict[str, str]) -> list[Row]:
    """Rows in their order, from (node id, fault, result)."""
    rows: dict[Key, Row] = {}
    for nodeid, fault, result in proofs:
        law, _, case = nodeid.partition("[")
        law = law.removeprefix("tests/")
        row = rows.setdefault((fault, result, law), Row(fault, result, law))
        row.cases[case.removesuffix("]")] = verdicts.get(nodeid, "")
    return sorted(rows.values(), key=lambda row: row.place)


def declared(root: Path = ROOT) -> list[tuple[str, str, str]]:
    """What all laws below a directory declare: (node id, fault, result). Runs none of them."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "proves",
               "-p", "no:cacheprovider", "-n", "0", "--proofs", "tests"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100)
    lines = [line for line in done.stdout.splitlines() if line.startswith("proof: ")]
    if done.returncode or not lines:
        raise RuntimeError(f"could not collect the laws:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return [tuple(json.loads(line.removeprefix("proof: "))) for line in lines]


def gaps() -> str:
    """The faults without a law, as a list."""
    return "\n".join(f"- {number}: {name}. {why}." for number, (name, why) in NOT_COVERED.items())


def written(text: str, rows: Sequence[Row]) -> str:
    """The document with these rows between its two comments.

    Raises:
        ValueError: If it does not have both.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"expected a line {BEGIN!r} and a line {END!r} behind it")
    table = "\n".join([HEAD, *(row.line() for row in rows)])
    return f"{before}{BEGIN}\n{table}\n\nFaults of the plan without a law:\n\n{gaps()}\n{END}{after}"


def table_of(text: str) -> list[tuple[str, ...]]:
    """The rows of a document, without what came of them."""
    between = text.partition(BEGIN)[2].partition(END)[0]
    lines = [line for line in between.splitlines() if line.startswith("| ")]
    return [tuple(cell.strip() for cell in line.split("|")[1:5]) for line in lines[2:]]


def shown(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """What `table_of` has of these rows."""
    return [tuple(cell.strip() for cell in row.line().split("|")[1:5]) for row in rows]


class Writer:
    """Collects verdicts of this run, and writes the table at its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._verdicts: dict[str, str] = {}
        self._message = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what came of a law; reports of all of xdist's processes arrive here."""
        if report.failed:
            self._verdicts[report.nodeid] = "failed"
        elif report.when == "call":
            known = report.skipped and hasattr(report, "wasxfail")
            verdict = "known fault" if known else "passed" if report.passed else ""
            self._verdicts.setdefault(report.nodeid, verdict)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write, or refuse."""
        rows = rows_of(declared(session.config.rootpath), self._verdicts)
        missing = [f"{row.law}[{case}]" for row in rows for case, verdict in row.cases.items() if not verdict]
        if missing:
            self._message = f"{self._path} is as it was: {len(missing)} laws did not run: " + ", ".join(
                sorted(set(missing))[:10]
            )
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            return
        self._path.write_text(written(self._path.read_text(), rows))
        self._message = f"wrote {len(rows)} rows to {self._path}"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say which."""
        terminalreporter.write_line(f"reliability: {self._message}")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Two options."""
    group = parser.getgroup("reliability")
    group.addoption("--reliability", metavar="FILE", type=Path, help="write FILE's table of faults")
    group.addoption("--proofs", action="store_true", help="with --collect-only: list what laws prove")


def pytest_configure(config: pytest.Config) -> None:
    """Only the process that all reports come to writes."""
    path = config.getoption("--reliability")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Writer(path))


def all_proofs(config: pytest.Config) -> list[tuple[str, str, str]]:
    """What all laws declare: as this run has collected them, if it was asked for all."""
    asked = {(config.invocation_params.dir / argument).resolve() for argument in config.args}
    return config.stash[_proofs] if asked == {ROOT / "tests"} else declared()


_proofs = pytest.StashKey[list[tuple[str, str, str]]]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Check the marks of all, before some are left out, and list them if that was asked for."""
    proofs = [(item.nodeid, *proof) for item in items for proof in proofs_of(item)]
    config.stash[_proofs] = proofs
    if config.getoption("--proofs"):
        for proof in proofs:
            print(f"proof: {json.dumps(proof)}")
