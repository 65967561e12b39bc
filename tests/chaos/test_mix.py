"""A short seeded mix of faults over real processes; `make chaos` is the long one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.nemesis import brisk
from chaos.run import Chaos
from chaos.workload import Workload
from harness import BROKER_VARIABLE
from history import HISTORY_VARIABLE

pytestmark = pytest.mark.acceptance

CHAOS_SECONDS = 12
SEED = "short"


@pytest.fixture
def chaos(server_binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Chaos]:
    for variable in (HISTORY_VARIABLE, BROKER_VARIABLE):  # given back when the test is over
        monkeypatch.setenv(variable, "")
    made = Chaos(tmp_path, SEED, brisk())
    try:
        yield made
    finally:
        made.close()


@pytest.mark.proves(
    "5, 52: a seeded mix of kills, freezes, stops, cut connections and Redis' end under load, 12 s",
    "no promise is broken",
)
def test_a_seeded_mix_of_faults_breaks_no_promise(chaos: Chaos) -> None:
    chaos.workload = Workload(chaos.system.producer, chaos.tail, SEED, backlog=60)
    chaos.system.wait_until_whole()

    def enough() -> bool:
        verbs = chaos.verbs_so_far()
        return "kill_redis" in verbs and verbs.total() >= 6 and len(chaos.tail.starts) > 100

    rate = chaos.load(CHAOS_SECONDS, chaos=True, enough=enough)

    found = chaos.settle()

    verbs = chaos.verbs()
    print(f"{rate:.0f} tasks/s; {dict(chaos.totals)}; {dict(verbs)}")
    assert not found, "\n".join([*found, f"faults: {chaos.faults.log}"])
    assert {"kill_redis"} <= set(verbs)
    assert verbs.total() >= 6
    assert chaos.totals["runs"] > 100
