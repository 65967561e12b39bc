"""How Sphinx builds these pages: `make docs`. Warnings are errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from celery_affinity import __version__

DOCS = Path(__file__).resolve().parent

project = "celery_affinity"
author = "the authors of celery_affinity"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
#: The plan is for whoever works on the project, and changes with each piece of work.
exclude_patterns = ["plan.md"]
# Texts are searched for as they are printed: --queue stays --queue.
smartquotes = False
html_theme = "furo"
html_title = f"celery_affinity {release}"

myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]

napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# model_config is pydantic's, and of no concern to a user.
autodoc_default_options = {"exclude-members": "model_config, model_post_init"}

_LINK = re.compile(r"\[([^\]\n]+)\]\((\.\./[^)#\s]+)\)")


def _files_outside(app: Any, name: str, text: list[str]) -> None:
    """Links that leave this folder lead to files of the repository, which are no pages."""

    def shown(link: re.Match[str]) -> str:
        label, target = link.groups()
        path = (DOCS / name).parent / target
        if not path.exists():
            return link[0]  # Sphinx says that it leads nowhere
        return f"{label} (`{target.removeprefix('../')}`)" if label not in target else f"`{label}`"

    text[0] = _LINK.sub(shown, text[0])


def _plain_colons(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Napoleon takes what stands before a colon for a type; here types are annotations."""
    if what in ("attribute", "data", "property"):
        lines.insert(0, "\\")  # it looks at the first line only; alone this is nothing in reST
    for number, line in enumerate(lines[:-1]):
        if line.strip() == "Returns:":
            lines[number] = ""
            lines[number + 1] = f":returns: {lines[number + 1].strip()}"


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _files_outside)
    app.connect("autodoc-process-docstring", _plain_colons, priority=100)  # before Napoleon
