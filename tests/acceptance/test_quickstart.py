"""README and quickstart: a reader who types each of their blocks gets what they say.

Blocks are taken in their order. The first writes app.py, shell blocks are typed in its folder, the
others are scripts that import it. The app's URLs give way to Celery's own variables.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from acceptance.support import LEAN
from celery_affinity.embedded import Server
from harness import Cluster, Node

pytestmark = pytest.mark.acceptance

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
#: How blocks begin that nobody types, and what they are.
SHOWN = {
    "producers -->": "a picture",
    "holds: w1@test": "what `explain` says: test_incident.py",
    "make demo": "test_demo.py",
}
#: This one is the body of a task.
IN_A_TASK = "from celery_affinity import current, tag_acquired, tag_released"
#: And this one is of another app, which has a search engine.
OF_ANOTHER_APP = '@affinity_task(queue="documents"'
SEARCH = """
from types import SimpleNamespace
from celery import Celery
from celery_affinity import Affinity, AffinityQueue, affinity_task
app = Celery("search")
app.conf.task_always_eager = True
Affinity(app, queues=[AffinityQueue("documents")])
search = SimpleNamespace(bulk=lambda texts: [print("indexed", text) for text in texts])
"""


class Reader:
    """Types a document's blocks in a folder, one after the other."""

    def __init__(self, cluster: Cluster, server: Server) -> None:
        self.folder = cluster.directory
        self.cluster = cluster
        cluster.environ |= {
            "CELERY_BROKER_URL": server.url(0), "CELERY_RESULT_BACKEND": server.url(1),
        }  # fmt: skip
        #: What each script and command printed.
        self.said: list[str] = []

    def type(self, language: str, text: str) -> None:
        if text.startswith(tuple(SHOWN)):
            return
        if text.startswith("# app.py"):
            (self.folder / "app.py").write_text(text)
        elif language == "python":
            self._script(text)
        else:
            assert language in ("", "console"), f"what kind of block is {language!r}?"
            self._commands(text)

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=self.folder, env=self.cluster.environ,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (arguments, done.stdout, done.stderr[-2000:])
        self.said.append(done.stdout)
        return done.stdout

    def _script(self, text: str) -> None:
        if text.startswith(IN_A_TASK):
            body = "".join(f"    {line}\n" for line in text.splitlines())
            text = f"from celery_affinity.testing import lease\nwith lease('acme', epoch=7):\n{body}"
        elif text.startswith(OF_ANOTHER_APP):
            text = SEARCH + text
        elif "from app import" not in text:
            text = f"from app import affinity, app, send_invoice\n{text}"
        (self.folder / "script.py").write_text(text)
        self.run("script.py")

    def _commands(self, text: str) -> None:
        started = []
        for line in text.splitlines():
            match shlex.split(line, comments=True):
                case []:
                    pass
                case ["celery", "-A", "app", "worker" | "beat" as kind, *options]:
                    started.append(self._service(kind, options))
                case ["celery", *arguments]:
                    self.run("-m", "celery", *arguments)
                case other:
                    raise AssertionError(f"nobody knows how to type {other}")
        for node in started:
            node.wait_ready()

    def _service(self, kind: str, options: list[str]) -> Node:
        lean = [*LEAN, "-l", "INFO"] if kind == "worker" else ["-l", "INFO", "--pidfile="]
        node = Node(
            f"{kind}{len(self.cluster.nodes)}", ["-A", "app", kind, *options, *lean],
            ready=" ready." if kind == "worker" else "beat: Starting",
            environ=self.cluster.environ, directory=self.folder,
        )  # fmt: skip
        self.cluster.nodes.append(node)
        return node


def blocks(path: str) -> Iterator[tuple[str, str]]:
    found = BLOCK.findall((ROOT / path).read_text())
    assert found
    yield from found


@pytest.fixture
def reader(cluster: Cluster, aof_server: Server) -> Reader:
    return Reader(cluster, aof_server)


def test_the_quickstart_does_what_it_says(reader: Reader) -> None:
    for language, text in blocks("docs/quickstart.md"):
        reader.type(language, text)
    invoices, refusal, status, workers, doctor = reader.said
    for company in ("acme", "globex", "initech", "umbrella", "hooli"):
        assert re.findall(rf"^{company} (\d) by", invoices, re.MULTILINE) == list("123456")
    # (The last tag goes on in its batch: nobody waits.)
    assert set(re.findall(r"place (\d)", invoices)) >= {"1", "2", "3"}
    assert "identify_tag" in refusal
    assert "invoices" in status and "w1@" in workers and "w2@" in workers
    assert "ok" in doctor


def test_readme_does_what_it_says(reader: Reader) -> None:
    for language, text in blocks("README.md"):
        if text.startswith("celery -A app affinity status"):
            reader.run("-c", BEFORE_THE_OPERATOR)
        reader.type(language, text)
    logs = "".join(node.log_text() for node in reader.cluster.nodes)
    assert "indexed one\n" in reader.said
    assert ("1", "1") in re.findall(r"acme (\d): lease \d+, place (\d)", logs)  # of whichever node


#: The three invoices are through, and acme has one that waits, so that there is something to see.
BEFORE_THE_OPERATOR = """
from harness import wait_until
from app import affinity, send_invoice
wait_until(lambda: affinity.stats("invoices").settled == 3, what="the end of three invoices")
affinity.pause("invoices", "acme")
send_invoice.delay("acme", 4)
wait_until(lambda: affinity.stats("invoices").entries == 1, what="one that waits")
"""
