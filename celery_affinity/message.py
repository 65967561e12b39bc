"""A Celery message as the ledger keeps it: tags, stamps, and Redis' envelope of a task.

The ledger stores the message of a producer byte for byte. Its envelope is kombu's for virtual
transports: a JSON object with body, content-type, content-encoding, headers, properties.
"""

from __future__ import annotations

import bz2
import json
import lzma
import re
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu.compression import compress, decompress
from kombu.serialization import dumps, loads, prepare_accept_content
from kombu.utils import json as kombu_json

from celery_affinity.exceptions import TagError

__all__ = (
    "MAX_BODY_BYTES",
    "MAX_MESSAGE_BYTES",
    "DUE_HEADER",
    "MAX_TAG_BYTES",
    "ONCE_HEADER",
    "REVOKED_HEADER",
    "ROUTE_HEADER",
    "STAMP_HEADER",
    "TAG_HEADER",
    "Stamp",
    "check_readable",
    "decoded_body",
    "due_ms",
    "envelope",
    "normalised",
    "raw_body",
    "spread_tag",
    "stamp_of",
    "tag_text",
)

#: Header (and `apply_async` option) with the tag of a task.
TAG_HEADER = "identify_tag"
#: Header that the ledger puts into a message when it dispatches it.
STAMP_HEADER = "affinity_stamp"
#: Header that a dispatched message has whose task is revoked.
REVOKED_HEADER = "affinity_revoked"
#: Header of a dispatched message on RabbitMQ: the exchange and key with which it was sent first.
ROUTE_HEADER = "affinity_route"
#: Header of a message that the ledger admits once, whatever its key is; the ledger takes it off.
ONCE_HEADER = "affinity_once"
#: Header of a periodic task: the moment for which it was due, ISO 8601 in UTC.
DUE_HEADER = "affinity_due"
#: Longest tag, in bytes of UTF-8.
MAX_TAG_BYTES = 512
#: Largest message that is admitted, as it is in the queue (lua/include/read_message.lua).
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
#: Levels that lists and objects of a message may have, outside of its body.
MAX_DEPTH = 100
#: Largest body that a compressed one may become.
MAX_BODY_BYTES = 64 * 1024 * 1024


def tag_text(value: object) -> str:
    """The text of a tag.

    Arguments:
        value: A str, int or UUID; 1 and "1" are one tag.

    Raises:
        TagError: For anything else, an empty text, more than 512 bytes of UTF-8, and text that
            UTF-8 cannot hold (lone surrogates).
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, UUID)):
        raise TagError(
            f"identify_tag must be a str, an int or a UUID, found {type(value).__name__} "
            f"{value!r:.80}: pass the tenant's id itself"
        )
    text = _plain(value)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise TagError(
            f"identify_tag {text!r:.80} has a lone surrogate, which UTF-8 cannot hold: "
            "decode the text properly before it becomes a tag"
        ) from None
    if not size:
        raise TagError("identify_tag is empty: every affinity task needs a tag")
    if size > MAX_TAG_BYTES:
        raise TagError(
            f"identify_tag has {size} bytes, expected at most {MAX_TAG_BYTES}: "
            "use an id or a hash of it"
        )
    return text


def _plain(value: str | int | UUID) -> str:
    """What a serializer makes of it: an enum's member that is a str or int is its value."""
    if isinstance(value, str):
        return str.__str__(value)
    return int.__repr__(value) if isinstance(value, int) else str(value)


def spread_tag(task_id: str) -> str:
    """The tag that a task without one gets: it has it for itself (``untagged="spread"``).

    The prefix is known to the ledger (include/lease.lua), which remembers no slot for such a tag.
    """
    return tag_text(f"untagged:{task_id}")


@dataclass(frozen=True)
class Stamp:
    """What the ledger wrote into a dispatched message; its fields fence every later step."""

    entry: str
    epoch: str
    send: str
    incarnation: str
    slot: int
    place: int
    attempt: int
    state: str

    @classmethod
    def parse(cls, text: object) -> Stamp | None:
        """The stamp in a header, or None if there is none or it is not one of ours."""
        if not isinstance(text, str):
            return None
        parts = text.split(" ", 7)
        if len(parts) != 8:
            return None
        entry, epoch, send, incarnation, slot, place, attempt, state = parts
        if not (entry.isdecimal() and epoch.isdecimal()):
            return None
        try:
            return cls(entry, epoch, send, incarnation, int(slot), int(place), int(attempt), state)
        except ValueError:
            return None

    @property
    def resent(self) -> bool:
        """Whether an earlier copy was sent under the same lease."""
        return self.send.endswith("r")

    @property
    def held(self) -> str:
        """How a heartbeat names this message."""
        return f"{self.slot}:{self.entry}:{self.epoch}:{self.send}"


_STAMP = re.compile(rb'"' + STAMP_HEADER.encode() + rb'": "([^"]*)"')


def stamp_of(raw: bytes) -> Stamp | None:
    """The stamp of a dispatched message: the ledger puts it in front of all other headers."""
    found = _STAMP.search(raw)
    return Stamp.parse(found.group(1).decode("utf-8", "replace")) if found else None


def envelope(
    body: object,
    headers: Mapping[str, Any],
    properties: Mapping[str, Any],
    *,
    serializer: str,
    compression: str | None,
    routing_key: str,
) -> str:
    """A task message as kombu's Redis transport would have stored it in a queue.

    Raises:
        ValueError: If it would be one that kombu cannot read.
        TypeError: If a header is of a type that JSON cannot hold.
    """
    content_type, content_encoding, payload = dumps(body, serializer=serializer)
    headers = dict(headers)
    raw: bytes = payload.encode() if isinstance(payload, str) else payload
    if compression:
        raw, headers["compression"] = compress(raw, compression)
    priority = properties.get("priority") or 0
    text: str = kombu_json.dumps(
        {
            "headers": headers,
            "body": b64encode(raw).decode(),
            "content-type": content_type,
            "content-encoding": content_encoding,
            "properties": {
                "delivery_mode": 2,
                **properties,
                "priority": priority,
                "delivery_info": {"exchange": "", "routing_key": routing_key},
                "body_encoding": "base64",
                "delivery_tag": str(uuid4()),
            },
        },
    )
    check_readable(text)
    return text


def check_readable(raw: str | bytes) -> None:
    """See that kombu can read an envelope: one that it cannot ends the worker that gets it.

    Raises:
        ValueError: If it has a value with a mark of its type (a header that is a UUID, say) that no
            such value has.
    """
    try:
        found = kombu_json.loads(raw)
    except Exception as error:
        raise ValueError(f"cannot be read by kombu: {type(error).__name__}: {error}") from None
    if _is_deep(found):
        raise ValueError(f"cannot be read by kombu: it has more than {MAX_DEPTH} levels")


def _is_deep(value: object) -> bool:
    """Whether a value has so many levels that it depends on the reader's stack who can read it."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def normalised(message: Mapping[str, Any], tag: str) -> str:
    """The same message in the shape that the ledger can stamp: headers first, tag in them; and
    with the delivery tag without which kombu does not make a message of it.
    """
    # What is evacuated comes back: without the header it is not taken for a repeat.
    own = (STAMP_HEADER, ONCE_HEADER)
    headers = {key: value for key, value in message["headers"].items() if key not in own}
    headers[TAG_HEADER] = tag
    rest = {key: value for key, value in message.items() if key != "headers"}
    rest["properties"] = {"delivery_tag": str(uuid4()), **rest["properties"]}
    return json.dumps({"headers": headers, **rest})


def due_ms(eta: object) -> int | None:
    """Milliseconds since the epoch of an ISO 8601 text; None without one.

    Read as a worker of Celery reads it: without an offset it is UTC, whatever the machine's zone
    or the app's is (celery.worker.request.Request, Celery 5.4 to 5.7).

    Raises:
        ValueError: If the text is not a time.
    """
    if eta is None:
        return None
    if not isinstance(eta, str) or not eta:
        raise ValueError(f"eta is {eta!r:.80}, expected ISO 8601 text")
    try:
        moment: Any = maybe_make_aware(maybe_iso8601(eta))  # type: ignore[arg-type]
    except Exception:
        raise ValueError(f"eta is {eta!r:.80}, expected ISO 8601 text") from None
    return int(moment.timestamp() * 1000)


def raw_body(message: Mapping[str, Any]) -> str | bytes:
    """The serialized body of a task message.

    Raises:
        ValueError: If it is not base64 or not compressed as it says, or larger than 64 MiB.
    """
    raw: str | bytes = message["body"]
    encoding = message["properties"].get("body_encoding")
    if encoding == "base64":
        raw = b64decode(raw)
    elif encoding is not None and str(encoding).lower() != "utf-8":
        raise ValueError(f"body_encoding is {encoding!r:.80}, expected 'base64'")
    if compression := message["headers"].get("compression"):
        raw = _decompressed(raw.encode() if isinstance(raw, str) else raw, compression)
    return raw


#: Decompressors that can be told where to stop, by kombu's names for them.
_BOUNDED: dict[str, Callable[[], Any]] = {
    **dict.fromkeys(("application/x-gzip", "gzip", "zlib"), zlib.decompressobj),
    **dict.fromkeys(("application/x-bz2", "bzip2", "bzip"), bz2.BZ2Decompressor),
    **dict.fromkeys(("application/x-lzma", "lzma", "xz"), lzma.LZMADecompressor),
}


def _decompressed(raw: bytes, compression: Any) -> bytes:
    make = _BOUNDED.get(compression) if isinstance(compression, str) else None
    try:
        if make is None:
            found: bytes = decompress(raw, compression)
        else:
            found = make().decompress(raw, MAX_BODY_BYTES + 1)
    except Exception as error:
        raise ValueError(
            f"body cannot be decompressed ({compression!r:.80}): {type(error).__name__}: {error}"
        ) from None
    if len(found) > MAX_BODY_BYTES:
        raise ValueError(
            f"body has more than {MAX_BODY_BYTES} bytes when it is decompressed: "
            "send a reference to the data instead"
        )
    return found


def decoded_body(message: Mapping[str, Any], accept: Any) -> tuple[Any, Any, Any]:
    """Arguments, keyword arguments and embedded signatures of a task message.

    Arguments:
        accept: Content types that may be decoded (``app.conf.accept_content``).

    Raises:
        kombu.exceptions.ContentDisallowed: If it has another content type.
        ValueError: If the body is not that of a task.
    """
    raw = raw_body(message)
    body = loads(
        raw,
        message["content-type"],
        message.get("content-encoding") or "utf-8",
        accept=prepare_accept_content(accept),
    )
    if not isinstance(body, (list, tuple)) or len(body) != 3:
        raise ValueError(f"body is {body!r:.80}, expected (args, kwargs, embed)")
    return body[0], body[1], body[2]
