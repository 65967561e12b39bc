"""Laws of the how-tos: each block of Python in them is a file, or a part of one, that the tests run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOWTOS = {
    "django": "django_shop", "fastapi": "fastapi_shop", "batches": "batches_shop",
    "testing": "testing_shop",
}
BLOCK = re.compile(r"(?:`([^`\n]+)`:\n\n)?```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("name", HOWTOS)
def test_the_code_of_a_howto_is_the_code_that_the_tests_run(name: str) -> None:
    folder = ROOT / "tests" / "integration" / HOWTOS[name]
    files = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.py")}
    blocks = BLOCK.findall((ROOT / "docs" / f"howto_{name}.md").read_text())
    assert blocks
    for file, code in blocks:
        if file:
            assert code == files[file], f"{file} differs"
        else:
            assert any(code in text for text in files.values()), f"in no file: {code}"
