"""Picks verbs, by a seed: the same seed picks the same verbs in the same order."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from chaos.faults import Faults
from chaos.system import now


@dataclass
class Kind:
    """Verbs that take turns by chance."""

    #: Seconds between two of them, about.
    every: float
    #: Verb -> how often it is picked.
    weights: dict[str, int]
    due: float = field(default=0.0)


def kinds(rabbitmq: bool = False) -> list[Kind]:
    """A worker every few seconds, the leader every 20, Redis every 60, and what else there is.

    Arguments:
        rabbitmq: It is the broker, and killed every 60 s too.
    """
    of_the_broker = [Kind(60.0, {"kill_broker": 1}), Kind(45.0, {"close_broker_connections": 1})]
    return [
        Kind(3.5, {
            "kill_worker": 5, "kill_tree": 1, "kill_child": 4, "stop_warm": 2, "stop_cold": 2,
            "stop_twice": 1, "freeze_parent": 2, "freeze_tree": 2, "blackhole": 2,
            "drop_replies": 2, "delay": 1, "reset": 2,
        }),
        Kind(20.0, {"kill_leader": 3, "freeze_leader": 1}),
        Kind(60.0, {"kill_redis": 1}),
        Kind(45.0, {"client_kill": 2, "script_flush": 2, "busy_redis": 1, "pause_redis": 1}),
        Kind(120.0, {"rolling_restart": 1}),
        Kind(180.0, {"kill_all": 1}),
        *(of_the_broker if rabbitmq else ()),
    ]


def verbs(rabbitmq: bool = False) -> list[str]:
    """All verbs."""
    return list(dict.fromkeys(verb for kind in kinds(rabbitmq) for verb in kind.weights))


def brisk() -> list[Kind]:
    """For a mix of some seconds: each kind of fault at least once. (A RabbitMQ takes longer to start.)"""
    return [
        Kind(1.5, kinds()[0].weights), Kind(5.0, kinds()[1].weights), Kind(8.0, {"kill_redis": 1}),
        Kind(4.0, {"client_kill": 1, "script_flush": 1}),
    ]


class Nemesis:
    """Applies verbs when their time has come.

    Arguments:
        faults: The verbs.
        seed: The same picks again.
        kinds: What is picked from, and how often.
    """

    def __init__(self, faults: Faults, seed: str, kinds: list[Kind]) -> None:
        self._faults = faults
        self._kinds = kinds
        self._randoms = [random.Random(f"{seed}/{number}") for number in range(len(kinds))]

    def start(self) -> None:
        """Begin to count."""
        for kind, rng in zip(self._kinds, self._randoms, strict=True):
            kind.due = now() + kind.every * rng.uniform(0.3, 1)

    def step(self) -> None:
        """Apply what is due."""
        for kind, rng in zip(self._kinds, self._randoms, strict=True):
            if now() >= kind.due:
                kind.due = now() + kind.every * rng.uniform(0.5, 1.5)
                verbs = list(kind.weights)
                verb = rng.choices(verbs, [kind.weights[verb] for verb in verbs])[0]
                getattr(self._faults, verb)()
