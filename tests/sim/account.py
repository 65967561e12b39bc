"""What the judge keeps account of, and which answers of scripts mean what."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

#: Scripts that give back what somebody held, so that a tag may come to the front of the ring.
GIVE_BACK = {"rescue", "leave", "drain", "lost", "occupy", "heartbeat", "process_up", "serve"}
#: Scripts of the leader, with their fence as second argument.
FENCED = {"admit", "resolve", "promote", "rescue", "rebase", "renew", "resign", "configure", "told"}
#: Answers that say "not yours": such a call has to change nothing.
REFUSALS: dict[str, tuple[Any, ...]] = {
    "start": (-1, -2, -3, -5), "settle": (b"stale",), "heartbeat": ([0],), "renew": (0,), "resign": (0,),
    "admit": ([-1],), "promote": ([-1],), "resolve": (-1, 0), "rescue": ([-1],), "rebase": ([-1],),
    "configure": (-1,), "told": (-1,), "serve": ([-1, 0, 0], [0, 0, 0]), "discard": (0,), "finish": (0,), "lost": (b"settled",), "vacate": (0,),
    "process_up": (0,), "occupy": (0,), "decline": (0,), "known": (0,),
}  # fmt: skip
#: Scripts whose repeat, at once, gets the same answer; those in the second set write nothing then.
REPEATABLE = {"start", "settle", "claim", "register", "renew", "finish", "configure", "occupy", "process_up", "discard"}
SILENT_REPEAT = {"start", "settle", "discard"}
NONCE = re.compile(rb'"nonce": "([^"]+)"')


class Violation(Exception):
    """A promise is broken."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


@dataclass(frozen=True)
class Limits:
    """What the queue is set to."""

    batch: int
    concurrency: int
    own: dict[str, int]
    deliveries: int
    timeout_us: int

    def of(self, tag: str) -> int:
        """The concurrency of a tag."""
        return self.own.get(tag, self.concurrency)


@dataclass
class Message:
    """A message as its producer made it; it may have been sent more than once."""

    nonce: str
    tag: str
    #: Whether its place in the order is that of its sending.
    plain: bool
    usable: bool = True
    copies: int = 0


@dataclass
class Run:
    """One accepted start, and the user code that ran after it."""

    token: str
    inc: str
    slot: str
    entry: int
    epoch: int
    tag: str
    #: A settle granted this start, and the process has not asked for it.
    granted: bool = False
    active: bool = False
    ended: bool = False
    settled: str = ""
    #: Its lease may be taken from it: its worker was lost, its process or its time limit reported.
    excused: bool = False
    given_up: bool = False
