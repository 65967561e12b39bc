"""Laws of the console's speed: with 100,000 waiting tags every command answers within half a second.

What is judged is work, not time on the clock: what a command has Redis do and send is compared with
what it does for 1,000 tags, and CPU time of this process and of the server with half a second. So
these laws fail if a cost grows with the tags, and not when others take the machine's time. With -s they
print the table of docs/operations.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from celery import Celery
from click.testing import CliRunner
from redis import Redis

from celery_affinity import Affinity, AffinityQueue
from celery_affinity.cli import affinity as command
from celery_affinity.embedded import Server
from celery_affinity.explaining import FIND_BYTES, FIND_PAGE
from celery_affinity.keys import Keys
from celery_affinity.operator_scripts import OperatorScripts
from celery_affinity.scripts import Scripts
from harness import allowed

from .conftest import Bench

FEW, TAGS = 1_000, 100_000
SECONDS = 0.5
#: Of Redis, for what does not search: a walk over 100,000 tags takes more.
SERVER_SECONDS = 0.05
#: CPU time is measured again where it is above its bar, as caches are shared with others.
TRIES = 6
MESSAGE = (
    '{"headers": {"id": "id-%d", "task": "t", "identify_tag": "tag-%d"}, "body": "W10=", '
    '"content-type": "application/json", "content-encoding": "utf-8", '
    '"properties": {"delivery_tag": "d", "filler": "' + "x" * 600 + '"}}'
)


@dataclass
class Cost:
    """What one run of a command took: Redis commands (those in scripts too), bytes, seconds."""

    commands: int
    bytes: int
    server: float
    client: float
    clock: float


class Console:
    """Runs commands of an app, and measures them."""

    def __init__(self, server: Server, namespace: str) -> None:
        self.client = server.client()
        self.bench = Bench(self.client, Scripts(self.client, Keys(namespace)))
        self.app = Celery("speed", broker=server.url(), set_as_current=False)
        Affinity(self.app, queues=[AffinityQueue("q")], namespace=namespace)
        self.filled = 0

    def fill(self, tags: int) -> None:
        """Have so many tags with a task each, and two with more."""
        of = list(range(self.filled, tags))
        if not self.filled:
            self.bench.lead()
            of += [*[1] * 299, *[2] * 39]
        for at in range(0, len(of), 5000):
            with self.client.pipeline(transaction=False) as pipe:
                for number, tag in enumerate(of[at : at + 5000], at):
                    pipe.lpush(self.bench.pending, MESSAGE % (self.filled + number, tag))
                pipe.execute()
            self.bench.admit_all()
        self.bench.promote()
        self.filled = tags

    def run(self, *arguments: str) -> str:
        done = CliRunner().invoke(command, list(arguments), obj=SimpleNamespace(app=self.app))
        assert done.exit_code in (0, 1), (arguments, done.output, done.exception)
        unchanged = ("explain", "drain", "move", "resume")  # a second call has nothing to do
        assert done.exit_code == 0 or arguments[0] in unchanged, done.output
        return done.output

    def cost(self, *arguments: str) -> Cost:
        before, cpu, began = self._counts(), time.process_time(), time.perf_counter()
        self.run(*arguments)
        clock, client = time.perf_counter() - began, time.process_time() - cpu
        commands, sent, server = (b - a for a, b in zip(before, self._counts(), strict=True))
        return Cost(int(commands), int(sent), server, client, clock)

    def cheapest(self, *arguments: str, until: Callable[[Cost], bool]) -> Cost:
        """The first run that meets its bars, else the one that took the least CPU time."""
        costs: list[Cost] = []
        while len(costs) < TRIES and not (costs and until(costs[-1])):
            costs.append(self.cost(*arguments))
        return min(costs, key=lambda cost: (not until(cost), cost.server + cost.client))

    def _counts(self) -> tuple[float, float, float]:
        found = self.client.info()
        return (
            found["total_commands_processed"], found["total_net_output_bytes"],
            found["used_cpu_user"] + found["used_cpu_sys"],
        )  # fmt: skip

    def steps(self, *arguments: str) -> int:
        """How many scripts a command runs."""
        before = _script_calls(self.client)
        self.run(*arguments)
        return _script_calls(self.client) - before

    def forget(self) -> None:
        """Delete what was filled in."""
        match = self.bench.scripts.keys.prefix + "*"
        for keys in iter(lambda: list(self.client.scan_iter(match=match, count=5000)), []):
            for at in range(0, len(keys), 5000):
                self.client.delete(*keys[at : at + 5000])


def _commands(tags: int) -> list[list[str]]:
    """Each command, on tags that no call of this list for other `tags` has changed."""
    node, first = f"n{tags}", tags // 2
    return [
        ["status"], ["queues"], ["workers"], ["tags"], ["tags", "--skip", str(tags * 9 // 10)],
        ["tags", "--top", "20"], ["leader"], ["explain", f"tag-{first + 50}"], ["explain", "tag-0"],
        ["dead", "list"], ["top", "-n", "1"], ["pause", f"tag-{first}"], ["resume", f"tag-{first}"],
        ["move", f"tag-{first + 1}", "--to", node],
        ["limit", f"tag-{first + 2}", "--concurrency", "2"], ["purge", f"tag-{first + 3}", "--yes"],
        ["revoke", "--tag", f"tag-{first + 4}", "--yes"], ["pause", "--queue", "q"],
        ["resume", "--queue", "q"], ["drain", node],
    ]  # fmt: skip


def _cheap(cost: Cost) -> bool:
    return cost.server < SERVER_SECONDS and cost.server + cost.client < SECONDS


def _name(arguments: list[str]) -> str:
    return " ".join(arguments)


@pytest.fixture
def console(shared_server: Server, namespace: str) -> Console:
    return Console(shared_server, namespace)


@pytest.mark.timeout(180)
def test_every_command_answers_within_half_a_second_with_a_hundred_thousand_waiting_tags(
    console: Console,
) -> None:
    try:
        console.fill(FEW)
        console.bench.node(f"n{FEW}", slots=2).take().start()
        console.run("status")  # connects
        few = [console.cost(*arguments) for arguments in _commands(FEW)]
        console.fill(TAGS)
        console.bench.node(f"n{TAGS}", slots=2).take().start()
        took = {}
        for arguments, before in zip(_commands(TAGS), few, strict=True):
            cost = console.cheapest(*arguments, until=_cheap)
            took[_name(arguments)] = cost
            assert _cheap(cost), (arguments, cost)
            assert cost.commands <= before.commands * 1.5 + 20, (arguments, before, cost)
            assert cost.bytes <= before.bytes * 1.5 + 2000, (arguments, before, cost)
        # A task is searched for in all messages, in steps that hold nobody up
        for name in (f"id-{TAGS // 2}", "nobody"):
            took[f"explain {name}"] = cost = console.cheapest(
                "explain", name, until=lambda cost: cost.server + cost.client < SECONDS
            )
            # The same work takes more of a CPU's time where its neighbours are busy.
            assert cost.server + cost.client < allowed(SECONDS), cost
        steps = console.steps("explain", "nobody")
        assert TAGS / FIND_PAGE <= steps <= TAGS / FIND_PAGE * 1.2 + 5
        for name, cost in took.items():
            seconds = (cost.clock, cost.server, cost.client)
            print(f"| `{name}` |", " | ".join(f"{1000 * s:.1f}" for s in seconds), f"| {cost.commands:,} |")
        top = json.loads(console.run("tags", "--top", "2", "--json"))
        assert [(tag["tag"], tag["waiting"]) for tag in top] == [("tag-1", 299), ("tag-2", 40)]  # one is out
    finally:
        console.forget()


@pytest.mark.parametrize("kind", ["hash", "list"])
def test_a_step_of_the_search_for_a_task_is_short_whatever_the_messages_size(
    kind: str, shared_server: Server, namespace: str
) -> None:
    client = shared_server.client()
    scripts, size, many = OperatorScripts(client, Keys(namespace)), 200_000, 120
    key, filler = scripts.keys.prefix + "big", "x" * size
    try:
        for number in range(many):
            raw = f'{{"headers": {{"id": "id-{number}"}}, "body": "{filler}"}}'
            if kind == "hash":
                client.hset(key, str(number + 1), raw)
            else:
                client.lpush(key, raw)
        before = _script_calls(client)
        assert scripts.find(key, "nobody", FIND_PAGE, FIND_BYTES) is None
        assert _script_calls(client) - before >= many * size / (FIND_BYTES * 2)
        for number in (0, 57, 119):
            found = scripts.find(key, f"id-{number}", FIND_PAGE, FIND_BYTES)
            assert found == number + 1
    finally:
        client.delete(key)



def _script_calls(client: Redis) -> int:
    found = client.info("commandstats")
    return sum(found.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("eval", "evalsha"))
