"""Runs `celery` on an app of a few lines, for laws of a start that is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from nursery import nursery

APP = """
from celery import Celery
from celery_affinity import Affinity, AffinityQueue, affinity_task
app = Celery("refused", broker={broker!r})
{body}
"""


def start(
    tmp_path: Path, broker: str, body: str, *command: str, real: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run `celery`, in a fork of the nursery or in an interpreter of its own."""
    (tmp_path / "refused.py").write_text(APP.format(broker=broker, body=textwrap.dedent(body)))
    arguments = ["-A", "refused", *command]
    if real:
        return subprocess.run(
            [sys.executable, "-m", "celery", *arguments], cwd=tmp_path, capture_output=True, text=True,
            timeout=30, check=False,
        )
    out, errors = tmp_path / "stdout", tmp_path / "stderr"
    process = nursery().fork(arguments, out, tmp_path, os.environ, errors)
    try:
        status = process.wait(30)
    finally:
        process.kill()
    return subprocess.CompletedProcess(arguments, status, out.read_text(), errors.read_text())
