"""Pending queue -> ledger.

Usable messages are moved inside Redis by admit.lua. It stops at a message it cannot use as it is
(no tag header, irregular JSON, an unusual due time); this module reads that one message and has
it admitted in a normal shape or buried with the reason, in its place in the order.

A dispatched message can come back here: kombu puts what it has read for a queue that is consumed no
more where its producer had sent it (a stopping worker). It is dropped: its entry is in the ledger,
which recovers it, and admitted again it would run twice. So is the repeat of a message with the
header `affinity_once` (periodic.py), by resolve.lua; only messages with that header pay for it.

While Redis' memory is full no more is admitted than free slots can run at once: each message takes
a little more room in the ledger than in the pending queue, and gives it all back when it has run
(test_a_full_memory_is_worked_off).

Crash windows: between admit and resolve the message is still the oldest of its list
(test_a_bad_message_is_buried_with_its_reason_and_takes_no_neighbour_along); resolve compares
the message it was asked about, so a repeat or a second leader cannot touch its neighbour.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from redis.exceptions import OutOfMemoryError

from celery_affinity.exceptions import MissingTagError
from celery_affinity.message import (
    MAX_MESSAGE_BYTES,
    ONCE_HEADER,
    STAMP_HEADER,
    TAG_HEADER,
    Stamp,
    check_readable,
    due_ms,
    normalised,
    raw_body,
    spread_tag,
    tag_text,
)
from celery_affinity.scripts import Scripts
from celery_affinity.sharding import shard_of

__all__ = ("Intake", "TagOf", "no_tag", "shard_in")

logger = logging.getLogger(__name__)

#: Why a message is buried that came into another shard than that of its tag.
ELSEWHERE = (
    "its tag belongs to another shard: who took it from the broker derived another tag, or none "
    "(an older version of the app?). Requeue it: then it goes to its shard"
)
#: Asks the app for the tag of a message without one; raises TagError.
TagOf = Callable[[Mapping[str, Any]], object]


class Intake:
    """Moves messages of one affinity queue into its ledger.

    Arguments:
        spread: Whether each message without a tag is a tag of its own.
        shard: Which shard's ledger it is, of so many.

    Does not: know of terms; it is given the fence with each pass.
    """

    #: Messages that one script moves at most: about 10 ms of Redis.
    BATCH = 200

    def __init__(
        self,
        scripts: Scripts,
        state: str,
        lists: Sequence[str],
        tag_of: TagOf,
        spread: bool = False,
        shard: int = 0,
        shards: int = 1,
    ) -> None:
        self._scripts = scripts
        self._state = state
        self._lists = list(lists)
        self._tag_of = tag_of
        self._spread = spread
        self._shard = shard
        self._shards = shards
        self._full = False

    def run(self, fence: str) -> tuple[int, bool]:
        """One pass. Returns (admitted, more is waiting).

        Admitted is -1 if not the leader any more, -2 if the queue is evacuated.
        """
        try:
            answer = self._scripts.admit(self._state, fence, self._lists, self.BATCH)
        except OutOfMemoryError as error:
            return self._run_although_full(fence, error)
        self._note_full(None)
        return self._resolved(fence, *answer)

    def _run_although_full(self, fence: str, error: Exception) -> tuple[int, bool]:
        self._note_full(error)
        free = min(self._scripts.idle_slots(self._state), self.BATCH)
        if not free:
            return 0, False
        answer = self._scripts.admit(self._state, fence, self._lists, free, although_full=True)
        admitted, _ = self._resolved(fence, *answer)
        return admitted, admitted > 0

    def _note_full(self, error: Exception | None) -> None:
        if error and not self._full:
            logger.warning(
                "Redis' memory is full (%s). Producers are refused; of what waits in the "
                "pending queue of %r only as much is taken in as free slots can run. Raise "
                "maxmemory, or wait until tasks have ended.",
                error,
                self._state,
                extra={"action": "memory_full", "queue": self._state},
            )
        elif self._full and not error:
            logger.warning(
                "Redis has memory again: the intake of %r goes on.",
                self._state,
                extra={"action": "memory_back", "queue": self._state},
            )
        self._full = error is not None

    def _resolved(
        self, fence: str, admitted: int, more: bool, stop: int, raw: bytes
    ) -> tuple[int, bool]:
        if not stop:
            return admitted, more
        verdict = self.judge(raw)
        if verdict[0] == "elsewhere":
            verdict = ("bury", ELSEWHERE, verdict[2])
        answer = self._scripts.resolve(self._state, fence, self._lists[stop - 1], raw, verdict)
        return (-1, False) if answer == -1 else (admitted + answer, True)

    def judge(self, raw: bytes) -> tuple[object, ...]:
        """What is to be done with a message.

        "elsewhere" says that its tag, which only the app knows, is another shard's: the app that
        carried it here did not know the task, or another tag of it.
        """
        tag = ""
        try:
            if len(raw) > MAX_MESSAGE_BYTES:
                raise ValueError(
                    f"the message has {len(raw)} bytes, expected at most {MAX_MESSAGE_BYTES}: "
                    "send a reference to the data instead"
                )
            message = json.loads(raw)
            _check_usable(message)
            check_readable(raw)
            if self._is_stray(Stamp.parse(message["headers"].get(STAMP_HEADER))):
                return ("drop",)
            tag = tag_in(message, self._tag_of, self._spread)
            eta = due_ms(message["headers"].get("eta"))
            kept = normalised(message, tag).encode()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:1000]
            return ("bury", reason.encode("utf-8", "replace"), tag)
        if shard_of(tag, self._shards) != self._shard:
            return ("elsewhere", kept, tag)
        once = str(message["headers"].get(ONCE_HEADER) or "")[:200]
        return ("admit", kept, tag, "" if eta is None else eta, once)

    def _is_stray(self, stamp: Stamp | None) -> bool:
        """Whether the ledger gave this stamp: then it has the entry, or had it."""
        return (
            stamp is not None
            and stamp.state == self._state
            and int(stamp.entry) <= self._scripts.last_entry(self._state)
        )


def tag_in(message: Mapping[str, Any], tag_of: TagOf, spread: bool) -> str:
    """The tag of a message.

    Raises:
        TagError: If it has none, or what it has is not one.
    """
    for place in (message["headers"], message["properties"]):
        if place.get(TAG_HEADER) is not None:
            return tag_text(place[TAG_HEADER])
    try:
        return tag_text(tag_of(message))
    except MissingTagError:
        if not spread:
            raise
        return spread_tag(message["headers"]["id"])


def shard_in(raw: bytes, tag_of: TagOf, spread: bool, shards: int) -> int:
    """The shard that a message belongs to; of one without a tag, which intake buries, the first.

    Looks at nothing but the tag: a message that only seems unusable must not come to another shard
    than the rest of its tag.
    """
    try:
        return shard_of(tag_in(json.loads(raw), tag_of, spread), shards)
    except Exception:
        return 0


def _check_usable(message: Any) -> None:
    if not isinstance(message, dict):
        raise ValueError(f"not a message: found JSON {type(message).__name__}, expected an object")
    headers, properties = message.get("headers"), message.get("properties")
    if not isinstance(headers, dict):
        raise ValueError(f"headers are {headers!r:.80}, expected an object")
    if not isinstance(properties, dict):
        raise ValueError(f"properties are {properties!r:.80}, expected an object")
    for name in ("id", "task"):
        if not isinstance(headers.get(name), str) or not headers[name]:
            raise ValueError(
                f"header {name!r} is {headers.get(name)!r:.80}, expected text "
                "(Celery's message protocol 2)"
            )
    if not isinstance(message.get("body"), str):
        raise ValueError(f"body is {message.get('body')!r:.80}, expected text")
    if headers.get("compression") or properties.get("body_encoding") != "base64":
        raw_body(message)


def no_tag(message: Mapping[str, Any]) -> object:
    """The answer for an app that cannot derive tags."""
    raise MissingTagError(
        f"task {message['headers'].get('task')!r} came without the header {TAG_HEADER!r}, and no "
        "affinity task of that name is known here to derive it: declare it with @affinity_task "
        "where the scheduler runs, or send the header"
    )
