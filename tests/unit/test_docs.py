"""Laws of the documentation: what it lists is what there is, and its links lead somewhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import celery_affinity
from celery_affinity import AffinityQueue, AffinitySettings, exceptions
from celery_affinity.cli import affinity

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text()


def sections(text: str, mark: str) -> dict[str, str]:
    """The sections under headings of that level, by heading."""
    parts = re.split(rf"^{mark} (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def commands(group: click.Group = affinity, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def test_each_command_has_its_section_and_there_is_no_other() -> None:
    described = {heading.strip("`") for heading in sections(page("operations"), "###")}
    assert described == {name for name, _ in commands()}


@pytest.mark.parametrize("name, command", list(commands()), ids=lambda value: value if isinstance(value, str) else "")
def test_a_commands_section_names_each_of_its_options_and_no_other(name: str, command: click.Command) -> None:
    text = sections(page("operations"), "###")[f"`{name}`"].split("\n## ")[0]
    options = [param.opts for param in command.params if isinstance(param, click.Option)]
    spoken = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text))
    assert spoken <= {opt for opts in options for opt in opts} | {"--help"}, "no such option"
    assert not [opts for opts in options if not spoken & set(opts)], "not described"
    for argument in (param for param in command.params if isinstance(param, click.Argument)):
        assert str(argument.human_readable_name).upper() in text


def test_the_help_of_no_command_has_an_exit_code_that_its_section_has_not() -> None:
    for name, command in commands():
        text = sections(page("operations"), "###")[f"`{name}`"]
        assert ("Exit code 1" in (command.help or "")) <= ("xit" in text), name


@pytest.mark.parametrize("model, heading", [(AffinityQueue, "Of a queue"), (AffinitySettings, "Of the app")])
def test_each_setting_is_described_with_its_default_and_there_is_no_other(
    model: type[BaseModel], heading: str
) -> None:
    rows = re.findall(r"^\| `(\w+)` \| *([^|]*?) *\| *([^|]*?) *\|", sections(page("settings"), "##")[heading], re.MULTILINE)
    assert {name for name, _, _ in rows} == set(model.model_fields)
    for name, default, unit in rows:
        found = model.model_fields[name].default
        assert default == written(found), name
        timed = name.endswith(("_seconds", "_timeout", "_ttl", "_interval", "_wait"))
        assert not timed or unit == "seconds", name


def written(default: object) -> str:
    if default is PydanticUndefined:
        return "required"
    if default is None or default == ():
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return f'`"{default}"`' if isinstance(default, str) else f"{default:g}"


def test_readme_names_each_setting() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in {*AffinityQueue.model_fields, *AffinitySettings.model_fields} - {"name", "queues"}:
        assert f"`{name}`" in readme, name


def test_each_public_name_is_in_the_reference_and_no_other() -> None:
    found = re.findall(r"^\.\. (?:autoclass|autofunction|autoexception|data):: celery_affinity\.(\w+)$", page("reference"), re.MULTILINE)
    assert sorted(found) == sorted(celery_affinity.__all__)
    methods = set(re.findall(r"^   \.\. auto(?:method|property):: (\w+)$", page("reference"), re.MULTILINE))
    assert methods == {name for name in dir(celery_affinity.Affinity) if not name.startswith("_")} - PLUMBING


#: What the worker, the beat and the command line call on an `Affinity`.
PLUMBING = {
    "check_scheduling", "consumer_started", "delivery", "raise_startup_error", "start_scheduling", "stop_scheduling",
    "worker_started", "worker_stopped", "worker_stopping",
}  # fmt: skip


#: The public exceptions.
ERRORS = {name for name in celery_affinity.__all__ if name.endswith("Error")}


def test_each_exception_is_public_has_its_section_and_names_its_parent() -> None:
    assert set(exceptions.__all__) == ERRORS
    described = sections(page("errors"), "##")
    assert set(described) - {"Errors that are Celery's"} == ERRORS
    for name in ERRORS:
        parent = getattr(exceptions, name).__bases__[0].__name__
        own = parent not in ("AffinityError", "Exception")
        assert not own or f"`{parent}`" in described[name], name


def refusals() -> Iterator[tuple[str, str]]:
    """Where the library refuses something, and the first words of the text that do not change."""
    ours = ERRORS - {"AffinityError", "BuriedError"}
    for path in sorted((ROOT / "celery_affinity").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
                continue
            name = getattr(node.exc.func, "id", getattr(node.exc.func, "attr", ""))
            if name in ours or (path.name, name) in (("settings.py", "ValueError"), ("task.py", "TypeError")):
                pieces = [
                    re.sub(r"^(?:s\)|\W+)(?=\s)", "", part.value.strip()).split() for part in ast.walk(node.exc.args[0])
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                ]
                if said := next((words for words in pieces if len(words) >= 3), None):
                    yield f"{path.name}:{node.lineno}", " ".join(said[:4]).strip(" :;,.(")


def test_each_refusal_is_on_the_page_of_errors() -> None:
    text = " ".join(page("errors").split())
    found = list(refusals())
    assert len(found) > 30
    assert [(where, said) for where, said in found if said not in text] == []


LINK = re.compile(r"\]\(([^)\s]+)\)")


def documents() -> list[Path]:
    return [*ROOT.glob("*.md"), *DOCS.glob("*.md"), *(ROOT / "docker").rglob("*.md")]


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_each_link_to_a_file_leads_to_one(path: Path) -> None:
    for target in LINK.findall(path.read_text()):
        if "://" not in target and not target.startswith("#"):
            assert (path.parent / target.partition("#")[0]).exists(), target


def test_each_page_is_in_the_table_of_contents() -> None:
    listed = set(re.findall(r"^([\w]+)$", page("index"), re.MULTILINE))
    assert listed == {path.stem for path in DOCS.glob("*.md")} - {"index", "plan"}
