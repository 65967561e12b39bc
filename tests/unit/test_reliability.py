"""Laws of the table of faults: it cannot go stale, and is not written from half a run."""

from __future__ import annotations

from pathlib import Path

import pytest

import reliability
from reliability import ROOT, rows_of, shown, table_of, written

pytest_plugins = ["pytester"]

LAWS = """
    import pytest

    @pytest.mark.proves("2: a fault", "nothing is lost")
    @pytest.mark.proves("outcome: an end", "it is told")
    @pytest.mark.parametrize("pool", ["prefork", "threads"])
    def test_good(pool):
        pass

    @pytest.mark.proves("10: another fault", "it is noticed")
    def test_other():
        assert {passes}
"""
DOCUMENT = "before\n<!-- reliability: begin -->\n<!-- reliability: end -->\nafter\n"


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    # Of all plugins its own runs need only that of `-n`.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "xdist.plugin")
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    pytester.makeini("[pytest]\nmarkers = proves(fault, result): x")
    pytester.makeconftest('pytest_plugins = ["reliability"]')
    pytester.mkdir("tests")
    (pytester.path / "table.md").write_text(DOCUMENT)
    return pytester


def laws(suite: pytest.Pytester, passes: object = True) -> None:
    path = suite.makepyfile(test_laws=LAWS.format(passes=passes))
    path.rename(suite.path / "tests" / "test_laws.py")


def run(suite: pytest.Pytester, *arguments: str) -> str:
    suite.runpytest_subprocess("--reliability", "table.md", "-p", "no:cacheprovider", *arguments, "tests")
    return (suite.path / "table.md").read_text()


def test_the_documents_rows_are_those_of_the_laws(pytestconfig: pytest.Config) -> None:
    rows = rows_of(reliability.all_proofs(pytestconfig), {})
    text = (ROOT / "docs" / "reliability.md").read_text()
    assert table_of(text) == shown(rows), (
        "run: pytest -n 4 -m proves tests --reliability docs/reliability.md"
    )
    assert reliability.gaps() in text


def test_each_fault_of_the_plan_has_a_law_or_a_reason_why_not(pytestconfig: pytest.Config) -> None:
    proved = {n for row in rows_of(reliability.all_proofs(pytestconfig), {}) for n in row.numbers}
    assert not proved & set(reliability.NOT_COVERED), "covered by now: take them off NOT_COVERED"
    assert proved | set(reliability.NOT_COVERED) == set(range(1, reliability.FAULTS + 1))


@pytest.mark.parametrize("processes", ["0", "2"])
def test_a_run_writes_a_row_for_each_proof_in_the_order_of_the_plan(
    suite: pytest.Pytester, processes: str
) -> None:
    laws(suite)
    text = run(suite, "-n", processes)
    assert text.startswith("before\n") and text.endswith("after\n")
    assert [(row[0], row[1]) for row in table_of(text)] == [
        ("2: a fault", "prefork, threads"), ("10: another fault", ""),
        ("outcome: an end", "prefork, threads"),
    ]
    assert text.count("| passed |") == 3


def test_a_law_that_failed_is_told_as_failed(suite: pytest.Pytester) -> None:
    laws(suite, passes=False)
    assert "| **failed**" in run(suite, "-n", "0")


def test_nothing_is_written_if_a_law_did_not_run(suite: pytest.Pytester) -> None:
    laws(suite)
    assert run(suite, "-n", "0", "-k", "good") == DOCUMENT


def test_a_mark_that_is_no_line_of_a_table_is_refused(suite: pytest.Pytester) -> None:
    suite.makepyfile(test_odd="import pytest\n@pytest.mark.proves('a | b', 'c')\ndef test_x(): pass")
    suite.runpytest_subprocess().stderr.fnmatch_lines(["*is not proves(fault, result)*"])


def test_a_document_without_the_two_comments_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reliability: begin"):
        written("nothing", [])
