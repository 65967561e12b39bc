"""What has to hold once a history has come to rest, and after its nodes have left."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from .account import NONCE, Violation
from .judge import Judge
from .server import KEYS, STATE

__all__ = ("at_rest", "nobody_left")


def at_rest(judge: Judge, slots: int, bad: int) -> None:
    """Everything was run to its end: nothing is lost, counted twice or left behind."""
    dead: dict[str, int] = defaultdict(int)
    queue = KEYS.queue
    found = judge.ledger.command("HGETALL", queue(STATE, "deadm"))
    for raw in found[1::2]:
        match = NONCE.search(raw)
        dead[match.group(1).decode() if match else "?"] += 1
    ended: dict[str, int] = defaultdict(int)
    for entry in judge.ended:
        ended[judge.nonces[entry]] += 1
    for message in judge.messages.values():
        got = ended[message.nonce] + dead[message.nonce]
        if got != message.copies:
            raise Violation(
                "loss" if got < message.copies else "doubled",
                f"message {message.nonce} of {message.tag!r}: {message.copies} in, "
                f"{ended[message.nonce]} settled, {dead[message.nonce]} dead",
            )
        if not message.usable and ended[message.nonce]:
            raise Violation("doubled", f"unusable message {message.nonce} was run")
    if dead["?"] != bad:
        raise Violation("loss", f"{bad} unreadable messages in, {dead['?']} dead")
    _counters(judge, sum(dead.values()), sum(dead[m.nonce] for m in judge.messages.values() if not m.usable) + bad)
    _sending_order(judge)
    left = [n for n in ("m", "att", "held", "eta", "ring", "unst", "stage", "untold", "telling", "hold", "retrying") if judge.ledger.command("EXISTS", queue(STATE, n))]
    left += [k.decode() for k in judge.ledger.command("KEYS", KEYS.prefix + "b:*")]
    if left:
        raise Violation("leak", f"at rest there are {left}")
    idle = judge.ledger.command("ZCARD", queue(STATE, "idle"))
    if idle != slots:
        raise Violation("leak", f"{idle} of {slots} slots are free at rest")


def _counters(judge: Judge, dead: int, dead_at_intake: int) -> None:
    flat = judge.ledger.command("HGETALL", KEYS.queue(STATE, "c"))
    total = {k.decode(): int(float(v)) for k, v in zip(flat[::2], flat[1::2], strict=True)}
    wanted = {"admitted": judge.admitted, "settled": len(judge.ended), "buried": dead}
    for name, number in wanted.items():
        if total.get(name, 0) != number:
            raise Violation("counters", f"{name} is {total.get(name, 0)}, the recount says {number}")
    buried = dead - dead_at_intake
    if judge.admitted + judge.appended != len(judge.ended) + buried + judge.evacuated:
        raise Violation(
            "counters", f"{judge.admitted} admitted and {judge.appended} retried, but "
            f"{len(judge.ended)} settled, {buried} buried and {judge.evacuated} evacuated",
        )  # fmt: skip


def _sending_order(judge: Judge) -> None:
    last: dict[str, int] = {}
    number = {n: e for e, n in sorted(judge.nonces.items(), reverse=True)}
    for message in judge.messages.values():
        entry = number.get(message.nonce)
        if not message.plain or message.copies != 1 or entry is None:
            continue
        if entry < last.get(message.tag, 0):
            raise Violation("order", f"message {message.nonce} of {message.tag!r} was admitted out of its order")
        last[message.tag] = entry


def nobody_left(judge: Judge, gone: Sequence[str]) -> None:
    """All workers have left: no key of any of them is there."""
    keys = [k.decode() for k in judge.ledger.command("KEYS", KEYS.prefix + "*")]
    left = [k for k in keys if any(f":{inc}:" in k or k.endswith(f"wq-{inc}") for inc in gone)]
    if left or judge.ledger.command("ZCARD", KEYS.workers):
        raise Violation("leak", f"of stopped workers there is {left}")
