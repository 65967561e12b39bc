"""The worked example of docs/fencing.md does what it says."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from celery_affinity import context
from celery_affinity.context import AffinityContext

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def example() -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / "fencing.md").read_text(), re.DOTALL):
        exec(block, names)
    return names


def store(example: dict[str, Any], db: sqlite3.Connection, balance: int, epoch: int) -> None:
    here = context.enter(AffinityContext("acme", epoch, 1, 1, "q", "w1", 0, 1))
    try:
        example["store_balance"](db, "acme", balance)
    finally:
        context.leave(here)


def test_a_write_of_an_older_lease_changes_nothing(example: dict[str, Any]) -> None:
    db = sqlite3.connect(":memory:")
    db.execute(example["SCHEMA"])
    store(example, db, 1, 100)
    store(example, db, 2, 100)
    store(example, db, 3, 200)
    with pytest.raises(example["LeaseOver"], match="acme: epoch 100 is over"):
        store(example, db, 4, 100)
    assert db.execute("SELECT balance, epoch FROM account").fetchall() == [(3, 200)]
