"""The judge: sees every call, its answer and what it wrote, and every run of user code.

It keeps its own account of who leads, who is registered, what ran where, and compares; it knows the
ledger's layout only where it reads a backlog. What is to hold at the end is in `recount`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .account import (
    FENCED,
    GIVE_BACK,
    NONCE,
    REFUSALS,
    REPEATABLE,
    SILENT_REPEAT,
    Limits,
    Message,
    Run,
    Violation,
)  # fmt: skip
from .server import KEYS, STATE, Ledger, Reply

if TYPE_CHECKING:
    from .world import Call

__all__ = ("Judge",)


@dataclass
class Judge:
    """The account of one history."""

    ledger: Ledger
    limits: Limits
    messages: dict[str, Message] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    beats: dict[str, int] = field(default_factory=dict)
    #: Incarnations that are being given up or drained in steps.
    leaving: set[str] = field(default_factory=set)
    #: Incarnations whose rescue or leave has begun: no heartbeat of theirs counts any more.
    given_up: set[str] = field(default_factory=set)
    ended: dict[int, str] = field(default_factory=dict)
    leader: tuple[str, int] = ("", 0)
    term: int = 0
    epoch: int = 0
    leases: dict[int, tuple[str, str, str]] = field(default_factory=dict)
    newest: dict[str, int] = field(default_factory=dict)
    nonces: dict[int, str] = field(default_factory=dict)
    dispatched: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    started: dict[int, str] = field(default_factory=dict)
    ring: tuple[str, ...] = ()
    #: The queue is evacuated: it takes nothing in and dispatches nothing.
    stopped: bool = False
    appended: int = 0
    evacuated: int = 0
    admitted: int = 0
    #: How often something happened that a history should contain.
    seen: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    # What producers and tasks do

    def pushed(self, nonce: str) -> None:
        """A message is in the pending queue (once more), or a part of an accepted settle."""
        self.messages[nonce].copies += 1

    def begins(self, token: str, inc: str, slot: str, entry: int, epoch: int) -> None:
        """User code begins."""
        run = self.runs.get(token)
        if run is None:  # the gate let it through although the ledger had refused it
            tag = self.messages[self.nonces[entry]].tag
            run = self.runs[token] = Run(token, inc, slot, entry, epoch, tag)
            if entry in self.ended:
                raise Violation("doubled", f"entry {entry} runs again after its {self.ended[entry]}")
        if run.granted:
            if run.excused:
                raise Violation("granted", f"entry {entry} begins in {inc}:{slot}, which had been given up")
            if entry in self.ended:
                raise Violation("doubled", f"entry {entry} begins after its {self.ended[entry]}")
            self.seen["begun without a question"] += 1
        run.active = True
        if run.excused:
            return
        same = [r for r in self.runs.values() if r.active and not r.excused and r.tag == run.tag]
        if len(same) > self.limits.of(run.tag):
            where = ", ".join(f"entry {r.entry} epoch {r.epoch} in {r.inc}:{r.slot}" for r in same)
            raise Violation("overlap", f"{len(same)} tasks of tag {run.tag!r} run: {where}")

    def ends(self, token: str, died: bool = False) -> None:
        """User code has ended, or its process died."""
        run = self.runs.get(token)
        if run is not None:
            run.active = False
            run.ended = True
            run.given_up = run.given_up or died

    # What the ledger does

    def called(self, now: int, redis_us: int, call: Call, reply: Reply, late: bool) -> None:
        """A script was called. `late`: the clock jumped after the caller looked at it, or not long ago."""
        name, answer = call.name, reply.answer
        refused = answer in REFUSALS.get(name, ())
        if refused:
            self.seen[f"{name} refused"] += 1
            if reply.writes:
                raise Violation("fencing", f"{name} was refused ({answer!r}) and wrote {reply.writes} times")
        if name in FENCED:
            self._fenced(name, str(call.args[1]), redis_us, refused)
        method = getattr(self, f"_{name}", None)
        if method is not None:
            method(now, redis_us, call.args, answer, late)
        self._sent(name, reply)
        # A node that is given up or drained in steps is brought together with others by the last one.
        if reply.idle and reply.ring and not (reply.bell or self.leaving or self.stopped):
            raise Violation("idle", f"after {name} {reply.idle} slots are free while {reply.ring} wait")
        self.ring = reply.ring

    def time_passed(self, redis_us: int) -> None:
        """It is so late by the server's clock, which is about to jump."""
        if redis_us >= self.leader[1]:
            self.leader = ("", 0)

    def repeated(self, name: str, args: Sequence[Any], first: Reply, again: Reply) -> None:
        """A call was repeated at once because its reply was lost."""
        self.seen[f"{name} repeated"] += 1
        both_refused = name == "start" and first.answer < 0 and again.answer < 0
        if name in REPEATABLE and first.answer != again.answer and not both_refused:
            raise Violation("repeat", f"{name}{tuple(args)!r} answered {first.answer!r}, then {again.answer!r}")
        if name in SILENT_REPEAT and again.writes:
            raise Violation("repeat", f"a repeated {name} wrote {again.writes} times")

    def _fenced(self, name: str, fence: str, redis_us: int, refused: bool) -> None:
        holds, until = self.leader
        in_force = fence == holds and redis_us < until
        if not in_force and not refused:
            raise Violation("fencing", f"{name} of the superseded term {fence!r} was obeyed")
        if in_force and refused and name != "resolve":
            raise Violation("fencing", f"{name} of the term in force, {fence!r}, was refused")

    def _claim(self, now: int, redis_us: int, args: Any, answer: Any, late: bool) -> None:
        if answer[0] != 1:
            return
        term = int(answer[1])
        fence = f"{args[1]} {term}"
        repeat = fence == self.leader[0] and redis_us < self.leader[1]
        if not repeat and (term <= self.term or redis_us < self.leader[1]):
            raise Violation("term", f"{fence!r} follows {self.leader[0]!r}")
        self.term = term
        self.leader = (fence, redis_us + int(args[2]) * 1000)

    def _renew(self, now: int, redis_us: int, args: Any, answer: Any, late: bool) -> None:
        if answer == 1:
            self.leader = (self.leader[0], redis_us + int(args[2]) * 1000)

    def _resign(self, now: int, redis_us: int, args: Any, answer: Any, late: bool) -> None:
        if answer == 1:
            self.leader = ("", 0)

    def _admit(self, now: int, redis_us: int, args: Any, answer: Any, late: bool) -> None:
        self.admitted += max(0, answer[0])

    def _resolve(self, now: int, redis_us: int, args: Any, answer: Any, late: bool) -> None:
        if answer == 1 and args[3] == "admit":
            self.admitted += 1

    def _evacuate(self, now: int, redis_us: int, args: Any, answer: Any, late: bool) -> None:
        self.stopped = True
        self.evacuated += answer[2]
        self.seen["evacuated"] += answer[3]

    def _resume(self, now: int, redis_us: int, args: Any, answer: Any, late: bool) -> None:
        self.stopped = self.stopped and answer == 0

    def _register(self, now: int, redis_us: int, args: Any, answer: Any, late: bool) -> None:
        if str(args[0]) not in self.given_up:
            self.beats[str(args[0])] = now

    def _heartbeat(self, now: int, redis_us: int, args: Any, answer: Any, late: bool) -> None:
        if answer[0] == 1:
            self.beats[str(args[0])] = now
            self.seen["sent again"] += answer[1]
            self.seen["taken back by a heartbeat"] += answer[2]

    def _rebase(self, now: int, redis_us: int, args: Any, answer: Any, late: bool) -> None:
        if answer[0] != -1 and len(args) < 4:  # else they get some time more
            self.beats = dict.fromkeys(self.beats, now)

    def _rescue(self, now: int, redis_us: int, args: Any, answer: Any, late: bool) -> None:
        if answer[0] != 1:
            return
        inc = answer[2].decode()
        # After jumps that nobody has seen a beat may be as little as three quarters of a timeout ago.
        since, timeout = now - self.beats.get(inc, now - 10**12), self.limits.timeout_us
        early = since < timeout - 1_000_000
        if early and (not late or since < timeout * 3 // 4):
            raise Violation("early", f"{inc} was given up {since / 1e6:.1f} s after its last beat")
        self.seen["rescued"] += 1
        self._gone(inc, answer[4])
        for run in self.runs.values():
            if run.inc == inc and not run.settled:
                self.seen["runs past its lease"] += run.active
                run.excused = run.given_up = True
                run.granted = run.granted and not early

    def _leave(self, now: int, redis_us: int, args: Any, answer: Any, late: bool) -> None:
        self._gone(str(args[0]), answer[1])

    def _drain(self, now: int, redis_us: int, args: Any, answer: Any, late: bool) -> None:
        self._step(str(args[0]), answer[1])

    def _serve(self, now: int, redis_us: int, args: Any, answer: Any, late: bool) -> None:
        if answer[0] == 1:
            self._step(str(args[0]), answer[2])

    def _step(self, inc: str, more: int) -> None:
        if more:
            self.leaving.add(inc)
        else:
            self.leaving.discard(inc)

    def _gone(self, inc: str, more: int) -> None:
        self._step(inc, more)
        (self.given_up.add if more else self.given_up.discard)(inc)
        self.beats.pop(inc, None)

    def _lost(self, now: int, redis_us: int, args: Any, answer: Any, late: bool) -> None:
        self.seen[f"lost: {answer.decode()}"] += 1

    def _finish(self, now: int, redis_us: int, args: Any, answer: Any, late: bool) -> None:
        if answer == 1:
            self.ended.setdefault(int(args[2]), "finish")
            for run in self.runs.values():
                if run.entry == int(args[2]):
                    run.given_up = True

    def _discard(self, now: int, redis_us: int, args: Any, answer: Any, late: bool) -> None:
        # A repeat is answered as before; what it must not be is sent again meanwhile (_sent).
        if answer == 1 and args[6] == "settle" and self.ended.get(int(args[2])) != "discard":
            self._end(int(args[2]), "discard")

    def _start(self, now: int, redis_us: int, args: Any, answer: Any, late: bool) -> None:
        inc, slot, entry, epoch, token = str(args[0]), str(args[1]), int(args[2]), int(args[3]), str(args[5])
        if answer != 1:
            return
        if token in self.runs:
            self.runs[token].granted = False
            return
        self._starts(token, inc, slot, entry, epoch)

    def _starts(self, token: str, inc: str, slot: str, entry: int, epoch: int) -> None:
        tag = self.messages[self.nonces[entry]].tag
        for run in self.runs.values():
            if run.entry == entry and run.epoch == epoch:
                raise Violation("doubled", f"entry {entry} of epoch {epoch} was started by {run.token} and {token}")
        if entry in self.ended:
            raise Violation("doubled", f"entry {entry} was started after its {self.ended[entry]}")
        if inc not in self.beats and inc not in self.leaving:
            raise Violation("fencing", f"{inc} started entry {entry}, and is not registered")
        self._newest(tag, epoch, "start")
        self._in_order(tag, entry)
        self.runs[token] = Run(token, inc, slot, entry, epoch, tag)
        self.started.setdefault(entry, token)

    def _settle(self, now: int, redis_us: int, args: Any, answer: Any, late: bool) -> None:
        token, grant, outcome = str(args[4]), str(args[5]), str(args[7])
        run = self.runs.get(token)
        if run is None:
            return
        if answer == b"stale":
            if not run.given_up and not run.settled:
                raise Violation("taken", f"entry {run.entry} ran in {run.inc}:{run.slot}, and could not settle")
            return
        if run.settled:
            return
        run.settled = answer.decode()
        self._newest(run.tag, run.epoch, "settle")
        if self.ended.get(run.entry) != "finish":
            self._end(run.entry, "settle")
        if outcome == "again":
            self.appended += 1
            self.pushed(self.nonces[run.entry])
        for raw in args[8::2]:
            self.appended += 1
            found = NONCE.search(raw if isinstance(raw, bytes) else str(raw).encode())
            assert found
            self.pushed(found.group(1).decode())
        if answer.startswith(b"held "):
            self.seen["granted"] += 1
            self._starts(grant, run.inc, run.slot, int(answer.split()[1]), run.epoch)
            self.runs[grant].granted = True

    def _decline(self, now: int, redis_us: int, args: Any, answer: Any, late: bool) -> None:
        if answer == 1:
            self.seen["declined"] += 1
            self.runs.pop(str(args[4]))

    def _end(self, entry: int, how: str) -> None:
        if entry in self.ended:
            raise Violation("doubled", f"entry {entry} ends by {how} after its {self.ended[entry]}")
        self.ended[entry] = how

    def _newest(self, tag: str, epoch: int, what: str) -> None:
        if self.limits.of(tag) == 1 and epoch < self.newest.get(tag, 0):
            raise Violation("fencing", f"{what} with epoch {epoch} of tag {tag!r}, whose newest is {self.newest[tag]}")

    def _in_order(self, tag: str, entry: int) -> None:
        backlog = [int(e) for e in self.ledger.command("LRANGE", KEYS.backlog(STATE, tag), 0, -1)]
        if backlog != sorted(backlog):
            raise Violation("order", f"the backlog of {tag!r} is {backlog}")
        before = [e for e in backlog if e < entry]
        for other in sorted(self.dispatched[tag]):
            if other < entry and other not in self.ended and other not in before:
                if self.ledger.command("HEXISTS", KEYS.queue(STATE, "m"), other):
                    before.append(other)
                else:
                    self.dispatched[tag].discard(other)  # buried
        if self.limits.of(tag) > 1:
            before = [e for e in before if e not in self.started] if entry not in self.started else []
        if before:
            raise Violation("order", f"entry {entry} of {tag!r} starts before {before}")

    def _sent(self, name: str, reply: Reply) -> None:
        fresh: list[str] = []
        for text, nonce in reply.sent:
            entry, epoch, send, inc, slot, place, _, _ = text.split(" ", 7)
            tag = self.messages[nonce].tag
            known = self.nonces.setdefault(int(entry), nonce)
            if known != nonce:
                raise Violation("entry", f"entry {entry} is message {known}, then {nonce}")
            if int(entry) in self.ended and self.ended[int(entry)] != "finish":
                raise Violation("doubled", f"entry {entry} is dispatched after its {self.ended[int(entry)]}")
            self.dispatched[tag].add(int(entry))
            if int(epoch) not in self.leases:
                if int(epoch) <= self.epoch:
                    raise Violation("epoch", f"lease {epoch} follows {self.epoch}")
                self.epoch = self.newest[tag] = int(epoch)
                self.leases[int(epoch)] = (inc, slot, tag)
                fresh.append(tag)
            elif self.leases[int(epoch)] != (inc, slot, tag):
                raise Violation("epoch", f"{(inc, slot, tag)} has the epoch of {self.leases[int(epoch)]}")
            others = [t for t in self.ring if t in reply.ring and t != tag]
            if int(place) > self.limits.batch and others and not send.endswith("r"):
                raise Violation("batch", f"task {place} of a batch of {tag!r} goes out while {others} wait")
        for at, tag in enumerate(fresh):
            if tag not in self.ring and name in GIVE_BACK:
                continue
            ahead = self.ring[: self.ring.index(tag)] if tag in self.ring else self.ring
            passed = [t for t in ahead if t in reply.ring and t not in fresh[:at]]
            if passed:
                raise Violation("fairness", f"{name} gives a lease to {tag!r}, which was behind {passed}")
