"""Planted bugs: each turns exactly one guard off. The simulation has to find every one of them.

A guard in a script is turned off by an edit of its text, which has to hit: a script that has changed
so that the edit finds nothing to change is an error here, not a bug that is never planted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from celery_affinity.gate import Gate
from celery_affinity.held import Held
from celery_affinity.lua_text import source
from celery_affinity.message import Stamp
from celery_affinity.reporter import Reporter
from celery_affinity.rescuer import Rescuer
from celery_affinity.starts import Starts

__all__ = ("BUGS", "NONE", "Bug")


class UngatedStarts(Starts):
    """Asks the ledger, and runs whatever it is given."""

    def _ask(self, stamp: Stamp, token: str, patiently: Callable[[Any], Any]) -> int:
        super()._ask(stamp, token, patiently)
        return 1


class AgelessStarts(Starts):
    """Uses a grant however old it is."""

    SHARE = float("inf")


class OnceOnlyGate(Gate):
    """Vacates a slot once, also if the ledger could not be reached."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        patience = self._occupancy._patience
        patience.patiently = patience.briefly  # type: ignore[method-assign,assignment]


class ClockBoundRescuer(Rescuer):
    """Believes Redis' clock alone, whatever it knows of the workers' deadlines."""

    def _silent(self) -> list[tuple[str, int]]:
        return [(incarnation, due) for incarnation, (due, _) in self._deadlines.items()]


class ForgetfulHeld(Held):
    """What the pool has thrown away is not held, whether a process had taken it or not."""

    def flushed(self) -> None:
        super().flushed()
        self._flushed.clear()


class UncountedHeld(Held):
    """The end of one copy is the end of all of them."""

    def arrived(self, stamp: Stamp, request: Any) -> None:
        super().arrived(stamp, request)
        self._copies[stamp.held] = self._copies[stamp.held][-1:]


class LonelyHeld(Held):
    """Every copy is the only one of its entry."""

    def copies(self, stamp: Stamp) -> int:
        return 0


def _past_limit(reporter: Reporter, stamp: Stamp, answered: Callable[[int], None]) -> None:
    reporter.past_limit(stamp, answered)


def _lost_by_word(reporter: Reporter, stamp: Stamp, answered: Callable[[int], None]) -> None:
    reporter.process_lost(stamp)
    answered(0)


@dataclass(frozen=True)
class Bug:
    """One guard that is off."""

    name: str
    #: What is wrong, in words.
    what: str
    #: Script -> (text, what it becomes), in order; every text has to be there.
    edits: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    gate: type[Gate] = Gate
    starts: type[Starts] = Starts
    rescuer: type[Rescuer] = Rescuer
    held: type[Held] = Held
    time_limit: Callable[[Reporter, Stamp, Callable[[int], None]], None] = _past_limit

    def make_gate(self, **options: Any) -> Gate:
        """A process' gate."""
        gate = self.gate(**options)
        gate._starts.__class__ = self.starts
        return gate

    def texts(self) -> dict[str, str]:
        """The edited scripts.

        Raises:
            AssertionError: If a guard is not where the edit expects it.
        """
        out: dict[str, Any] = {}
        for name, edits in self.edits.items():
            text = source(name)
            for old, new in edits:
                if text.count(old) != 1:
                    raise AssertionError(
                        f"planted bug {self.name!r}: {name}.lua has {old!r} {text.count(old)} times, "
                        "expected once. The script was changed: plant the bug anew in tests/sim/bugs.py"
                    )
                text = text.replace(old, new)
            out[name] = text
        return out


NONE = Bug("none", "the scripts and the gate as they are")
_FENCE = "if not in_term(q, fence) then"
_OFF = "if false then"

BUGS = {
    bug.name: bug
    for bug in (
        Bug(
            "no-term-check",
            "dispatch does not look whether the leader's term is in force",
            {name: [(_FENCE, _OFF)] for name in ("admit", "resolve", "promote")},
        ),
        Bug(
            "renew-any-owner",
            "a term is renewed without comparing its owner",
            {"renew": [("if not in_term(ARGV[1], ARGV[2]) then return 0 end", "")]},
        ),
        Bug(
            "parents-word",
            "a lease is released on the parent's word, while its process still lives",
            time_limit=_lost_by_word,
        ),
        Bug("no-start-gate", "a copy runs whatever the gate was answered", starts=UngatedStarts),
        Bug(
            "gate-without-token",
            "a started entry starts again for any token",
            {"start": [("return v[4] == token and 1 or -3", "return 1")]},
        ),
        Bug(
            "no-request-token",
            "a start that is repeated after a lost reply counts as somebody else's",
            {"start": [("return v[4] == token and 1 or -3", "return -3")]},
        ),
        Bug(
            "settle-not-idempotent",
            "a settle that is repeated after a lost reply is applied again",
            {
                "settle": [
                    ("if l.last_token == token then return l.last_answer end", ""),
                    (" or first.entry ~= entry or first.token ~= token then", " then"),
                ]
            },
        ),
        Bug(
            "rescue-appends",
            "what a lost worker held goes to the end of its tag instead of the head",
            {"rescue": [("if tonumber(other) > number then", "if false then")]},
        ),
        Bug(
            "start-writes-first",
            "start notes its token before it has looked whether the copy may run",
            {
                "start": [
                    ("if v[1] ~= epoch", "redis.call('HSET', slot_key(inc, i), 'k1', token)\nif v[1] ~= epoch")
                ]
            },
        ),
        Bug(
            "admit-takes-unread",
            "admit takes messages out of the pending queue before it has looked whether it can use them",
            {"admit": [("local read = {}", "local read = {}\n  redis.call('LTRIM', KEYS[k], 0, -#found - 1)"),
                       ("  if #read > 0 then redis.call('LTRIM', KEYS[k], 0, -#read - 1) end", "")]},
        ),
        # Starts that a settle grants.
        Bug("grant-ageless", "a granted start is used however old it is", starts=AgelessStarts),
        Bug(
            "grant-is-nothing",
            "a drain takes back a granted entry as if it had not started",
            {"drain": [("if o.token and not started then", "if o.token and not is_granted(l, o) and not started then"),
                       ("if out > 0 and not (out == 1 and l.out[1].token) then", "if out > 0 then")]},
        ),
        Bug("discard-unasked", "a granted entry is ended although another copy of it may run", held=LonelyHeld),
        Bug("clock-alone", "a worker is given up by Redis' clock alone, which may jump to and fro", rescuer=ClockBoundRescuer),
        # What the simulation found in celery_affinity itself, planted again.
        Bug("vacated-once", "an ordinary task that ended while Redis was away keeps its slot", gate=OnceOnlyGate),
        Bug("flush-forgets", "a reconnected node does not report what a process had just taken", held=ForgetfulHeld),
        Bug("uncounted-copies", "a refused second copy ends the report of the one that runs", held=UncountedHeld),
    )
}
