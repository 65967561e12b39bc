"""What is sent while faults happen: bursts over Zipf tags, retries, due times, failures."""

from __future__ import annotations

import random
from itertools import count

import acceptance.apps.newer  # noqa: F401  (registers its tasks)
from acceptance.support import Producer
from chaos.tail import Tail

TAGS = 40
#: Kinds of tasks and how many of a hundred they are.
MIX = {"work": 85, "flaky": 6, "thrice": 2, "boom": 6, "long": 1}
#: At once: a broker that confirms each task may be slower than the workers, and faults have their times.
BURSTS = 20


class Workload:
    """Keeps a backlog of some hundred tasks waiting.

    Arguments:
        producer: Sends.
        tail: Knows what is done.
        seed: The same bursts again, as long as as much is done.
        backlog: It sends when fewer than so many are not done.
        ms: Median duration of a task.
    """

    def __init__(
        self, producer: Producer, tail: Tail, seed: str, backlog: int = 300, ms: float = 25
    ) -> None:
        self._producer = producer
        self._tail = tail
        self._random = random.Random(seed)
        self._backlog = backlog
        self._ms = ms
        self._due_tags = count()
        # Steep enough for a hot tag, flat enough that its one slot keeps up.
        self._weights = [(rank + 1) ** -0.6 for rank in range(TAGS)]

    def step(self) -> None:
        """Send a few bursts if little waits."""
        for _ in range(BURSTS):
            self._tail.read()
            if len(self._tail.sent) - len(self._tail.done) >= self._backlog:
                break
            self._burst()

    def _burst(self) -> None:
        tag = f"tag-{self._random.choices(range(TAGS), self._weights)[0]}"
        for _ in range(self._random.randint(1, 15)):
            kind = self._random.choices(list(MIX), list(MIX.values()))[0]
            ms = self._random.lognormvariate(0, 0.6) * self._ms
            if kind == "long":
                ms = self._random.uniform(500, 3000)
            self._producer.send(tag, ms=ms, task=kind)
        if self._random.random() < 0.2:
            # A tag of its own for each: it joins its tag when it is due, wherever that is then.
            self._producer.send(
                f"due-{next(self._due_tags)}", ms=self._ms, countdown=self._random.uniform(0, 5)
            )
