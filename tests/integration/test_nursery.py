"""A fork of the nursery is to `celery`, and to who watches it, what a process of its own is."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from harness import Node, wait_until

#: Tells what it finds, and then does as it is told.
APP = '''
import atexit, json, logging, os, pathlib, random, resource, signal, sys, threading, time, uuid
from celery import Celery, _state

main = sys.modules["__main__"]
state = {
    "apps": len(_state._get_active_apps()),
    "argv": sys.argv,
    "directory": os.getcwd(),
    "environ": dict(os.environ),
    "files": sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                    if os.path.exists(f"/proc/self/fd/{fd}")),
    "group": [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()],
    "limits": [resource.getrlimit(kind) for kind in range(16)],
    "loggers": [repr(handler) for handler in logging.getLogger().handlers],
    "main": [main.__name__, main.__file__, main.__spec__.name],
    "nice": os.nice(0),
    "path": sys.path,
    "signals": {number: str(signal.getsignal(number)) for number in signal.valid_signals()},
    "masked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "wakeup": signal.set_wakeup_fd(-1),
    "streams": [(s.fileno(), s.isatty(), s.encoding, s.errors, s.line_buffering, s.write_through)
                for s in (sys.stdout, sys.stderr)],
    "tests": sorted({"pytest", "xdist", "coverage", "hypothesis"} & set(sys.modules)),
    "threads": [thread.name for thread in threading.enumerate()],
    "zone": time.strftime("%Z"),
}
chance = [random.random(), uuid.uuid4().hex, uuid.uuid1().hex]
pathlib.Path("told.json").write_text(json.dumps([state, chance]))
app = Celery("told", broker="memory://")
app.set_current()
atexit.register(print, "the end")
end = os.environ["END"]
if end == "thread":
    threading.Thread(target=lambda: (time.sleep(0.2), print("its thread"))).start()
elif end == "error":
    raise RuntimeError("broken")
elif end == "status":
    sys.exit(7)
elif end == "sleep":
    print("asleep")
    time.sleep(60)
'''

#: How it ends, with which status, and what it says at last.
ENDS = {
    "thread": (0, ["its thread", "the end"]),
    "error": (2, ["RuntimeError: broken", "the end"]),
    "status": (7, ["the end"]),
    "bad option": (2, ["Error: No such option '--nonsense'."]),
    "sleep": (-signal.SIGKILL, ["asleep"]),
}


def start(tmp_path: Path, end: str, *, real: bool) -> Node:
    """`celery report`, in an environment and a directory of its own."""
    directory = tmp_path / ("real" if real else "forked")
    directory.mkdir(exist_ok=True)
    (directory / "told.py").write_text(APP)
    environ = {
        "PATH": "/bin", "LC_CTYPE": "C.UTF-8", "END": end, "TZ": "Asia/Tokyo", "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(tmp_path / "of its own"),
    }
    command = ["-A", "told", *(["--nonsense"] if end == "bad option" else []), "report"]
    return Node(end, command, ready="asleep", environ=environ, directory=directory, real=real)


def told(node: Node, directory: Path) -> tuple[Any, Any]:
    assert node.wait(40) == 7, node.log_tail()
    state, chance = json.loads((directory / "told.json").read_text())
    return json.loads(json.dumps(state).replace(str(directory), "DIRECTORY")), chance


def test_a_fork_finds_what_a_process_of_its_own_finds(tmp_path: Path) -> None:
    nodes = [start(tmp_path, "status", real=real) for real in (True, False)]
    (real, _), (forked, chance) = (
        told(node, tmp_path / name) for node, name in zip(nodes, ("real", "forked"), strict=True)
    )
    assert forked == real
    _, again = told(start(tmp_path, "status", real=False), tmp_path / "forked")
    assert not set(chance) & set(again), "each fork has its own chance"


@pytest.mark.parametrize("end", ENDS)
def test_a_fork_ends_as_a_process_of_its_own_ends(tmp_path: Path, end: str) -> None:
    status, last = ENDS[end]
    for real in (True, False):
        node = start(tmp_path, end, real=real)
        if end == "sleep":
            node.wait_ready()
            assert node.group() == [node.pid] and node.alive
            node.kill9()
        assert node.wait(40) == status, node.log_tail()
        lines = node.log_text().splitlines()
        assert [line for line in lines if line in last] == last, node.log_tail()
        assert not node.alive and not node.group()


def test_forks_that_start_and_end_at_once_are_told_apart(tmp_path: Path) -> None:
    """Tests start and watch nodes from threads too."""
    nodes: list[Node] = []
    for number in range(4):
        (tmp_path / str(number)).mkdir()
    threads = [
        threading.Thread(target=lambda n=number: nodes.append(  # type: ignore[misc]
            start(tmp_path / str(n), ("status", "error")[n % 2], real=False)
        ))
        for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: not any(node.alive for node in nodes), what="all ends")
    assert {(node.name, node.wait()) for node in nodes} == {("status", 7), ("error", 2)}
    assert len({node.pid for node in nodes}) == 4
