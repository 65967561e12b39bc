"""Laws of the simulation: lawful histories, planted bugs found, the same seed the same history."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .__main__ import find
from .bugs import BUGS, Bug
from .history import run_history
from .server import Ledger, all_scripts, ledger, virtual

#: Histories in `make test`: blocks of so many seeds, so that two processes share them.
BLOCKS, BLOCK = 10, 50
#: A planted bug is found in so many, or not.
PATIENCE = 1000
#: Scripts of periodic tasks' runs and of batch tasks, which nobody sends here, of operators, and of another
#: broker: tests/lua walks with those.
ELSEWHERE = {
    "bring_home", "carry", "claim_run", "confirm_run", "find", "forget_runs", "give", "limit", "move", "note", "pause", "pause_tag", "purge",
    "purge_tag", "requeue", "resume_tag", "reshape", "revoke_tag", "set_aside", "settle_batch", "take",
}

@pytest.fixture(scope="module")
def simulated(server_binary: Path) -> Iterator[Ledger]:
    with ledger() as one:
        yield one


@pytest.mark.proves(
    "7, 28: leaders, workers and producers crash before and after each call, replies are lost, nodes freeze (simulated)",
    "lawful histories",
)
@pytest.mark.parametrize("block", range(BLOCKS))
def test_a_history_with_crashes_lost_replies_and_frozen_nodes_is_lawful(simulated: Ledger, block: int) -> None:
    simulated.load()
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        history, violation = run_history(simulated, seed)
        assert violation is None, "\n".join([*history.world.log, f"replay: make sim N=1 SEED={seed}"])


#: Found after hundreds of histories.
RARE = ("grant-ageless", "grant-is-nothing", "discard-unasked", "vacated-once", "flush-forgets", "uncounted-copies")


@pytest.mark.parametrize("name", [pytest.param(one, marks=pytest.mark.long) if one in RARE else one for one in BUGS])
def test_a_planted_bug_is_found(simulated: Ledger, name: str) -> None:
    _, violation = find(simulated, BUGS[name], 0, PATIENCE)
    assert violation is not None, f"{name} was not found in {PATIENCE} histories"


def test_the_same_seed_gives_the_same_history(simulated: Ledger) -> None:
    simulated.load()
    digests = [run_history(simulated, seed)[0].world.digest() for seed in (1, 2, 3, 1, 2, 3)]
    assert digests[:3] == digests[3:]
    assert len(set(digests)) == 3


def test_the_same_seed_gives_the_same_history_in_another_process(simulated: Ledger) -> None:
    simulated.load()
    here = run_history(simulated, 7)[0].world.log
    there = subprocess.run(
        [sys.executable, "-m", "tests.sim", "--n", "1", "--seed", "7", "--show"],
        cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONHASHSEED": "17"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert there.stdout.splitlines()[: len(here)] == here


def test_histories_call_every_script(simulated: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    simulated.load()
    called: set[str] = set()
    run = simulated.run

    def noted(name: str, *args: object) -> object:
        called.add(name)
        return run(name, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(simulated, "run", noted)
    for seed in range(500):
        run_history(simulated, seed)
        if called == set(all_scripts()) - ELSEWHERE:
            return
    raise AssertionError(f"never called: {sorted(set(all_scripts()) - ELSEWHERE - called)}")


def test_a_bug_that_cannot_be_planted_any_more_is_an_error() -> None:
    with pytest.raises(AssertionError, match="plant the bug anew"):
        Bug("gone", "", {"start": [("no such line", "")]}).texts()


def test_a_script_that_reads_the_servers_clock_in_another_way_is_an_error() -> None:
    time = "local TIME = redis.call('TIME')\n"
    assert "SIM_TIME" in virtual(time, "one")
    with pytest.raises(AssertionError, match="virtual clock"):
        virtual(time + "redis.call('SET', KEYS[1], 'x', 'PXAT', 5)", "one")
