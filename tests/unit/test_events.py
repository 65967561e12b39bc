"""Laws of the log: every line has an action, and docs/events.md lists them all as they are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import celery_affinity

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(celery_affinity.__file__).parent
LEVELS = {
    "debug": "DEBUG", "info": "INFO", "warning": "WARNING", "error": "ERROR", "exception": "ERROR",
    "critical": "CRITICAL",
}
#: Celery's own line, with Celery's own extra.
NOT_OURS = "celery_trace.LOG_RECEIVED"
ROW = re.compile(r"^\| `(\w+)` \| ([A-Z, ]+) \|.*\| ([^|]*) \|$", re.MULTILINE)


@dataclass
class Event:
    levels: set[str] = field(default_factory=set)
    fields: set[str] = field(default_factory=set)


def log_calls() -> Iterator[tuple[str, ast.Call, ast.Dict | None]]:
    """Each call of a logger: where it is, the call, and its `extra`."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        for function in functions:
            for node in ast.walk(function):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                if node.func.attr in LEVELS and ast.unparse(node.func.value).endswith("logger"):
                    yield f"{path.name}:{node.lineno}", node, _extra(function, node)


def _extra(function: ast.FunctionDef, call: ast.Call) -> ast.Dict | None:
    found = next((k.value for k in call.keywords if k.arg == "extra"), None)
    if isinstance(found, ast.Name):
        found = next(
            (
                n.value for n in ast.walk(function)
                if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == found.id
            ),
            None,
        )
    return found if isinstance(found, ast.Dict) else None


def events() -> dict[str, Event]:
    found: dict[str, Event] = {}
    for where, call, extra in log_calls():
        if ast.unparse(call.args[0]) == NOT_OURS:
            continue
        assert extra is not None, f"{where}: no extra={{'action': ...}}"
        pairs = {ast.literal_eval(k): v for k, v in zip(extra.keys, extra.values, strict=True) if k}
        assert "action" in pairs, f"{where}: no action"
        event = found.setdefault(ast.literal_eval(pairs.pop("action")), Event())
        assert isinstance(call.func, ast.Attribute)
        event.levels.add(LEVELS[call.func.attr])
        event.fields |= set(pairs)
    return found


def catalogue() -> dict[str, Event]:
    text = (ROOT / "docs" / "events.md").read_text()
    return {
        action: Event(set(levels.split(", ")), set(re.findall(r"`(\w+)`", fields)))
        for action, levels, fields in ROW.findall(text)
    }


def test_the_catalogue_lists_every_action_with_its_levels_and_fields() -> None:
    written, real = catalogue(), events()
    assert sorted(written) == sorted(real)
    assert {a: e for a, e in written.items() if e != real[a]} == {}


def test_each_row_says_what_happened_and_what_to_do() -> None:
    text = (ROOT / "docs" / "events.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `") and ROW.match(line)]
    assert len(rows) == len(catalogue())
    for row in rows:
        _, _, _, meaning, advice, _, _ = row.split("|")
        assert len(meaning.strip()) > 10 and len(advice.strip()) > 5, row


def test_a_line_is_one_sentence_or_a_few_without_a_break() -> None:
    for where, call, _ in log_calls():
        if isinstance(call.args[0], ast.Constant) and "banner" not in ast.unparse(call):
            text = str(call.args[0].value)
            assert "\n" not in text and not text.endswith(" "), where
