"""Messages that are no good: task messages spoiled as structures, as text and as bytes, and rubbish."""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Any
from uuid import uuid4

from hypothesis import strategies as st

BASE: dict[str, Any] = {
    "body": b64encode(b'[["fuzz", 0], {}, {}]').decode(),
    "content-encoding": "utf-8",
    "content-type": "application/json",
    "headers": {
        "id": "fuzzed", "task": "jobs.work", "identify_tag": "fuzz", "eta": None, "expires": None,
        "retries": 0, "timelimit": [None, None], "compression": None, "affinity_stamp": None,
    },
    "properties": {
        "delivery_tag": "d", "body_encoding": "base64", "priority": 0,
        "delivery_info": {"exchange": "", "routing_key": "q"},
    },
}
PATHS = [(k,) for k in BASE] + [(k, n) for k in ("headers", "properties") for n in BASE[k]]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(
        ["2026-01-01T00:00:00+00:00", "9999-12-31T23:59:59+00:00", "1 1 1 n 0 1 1 q",
         "1 -1 1 n 0 1 1 q", "gzip", "base64", "\ud800", "\x00", "{", '"headers": {"']
    ),
    lambda inner: st.fixed_dictionaries(
        {"__type__": st.sampled_from(["uuid", "datetime", "nobody knows"]), "__value__": inner}
    )
    | st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def spoiled(draw: st.DrawFn) -> bytes:
    """A task message with some values replaced or removed, perhaps cut or with bytes changed."""
    message = json.loads(json.dumps(BASE))
    message["headers"]["id"] = f"fuzzed-{uuid4()}"
    if draw(st.integers(0, 3)) == 0:
        content = draw(st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()))
        message["body"] = b64encode(content).decode()
    for path in draw(st.lists(st.sampled_from(PATHS), max_size=3, unique=True)):
        place = message
        for step in path[:-1]:
            place = place.get(step) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            continue
        if draw(st.booleans()):
            place.pop(path[-1], None)
        else:
            place[path[-1]] = draw(json_values)
    keys = draw(st.permutations(list(message)))
    separators = draw(st.sampled_from([(", ", ": "), (",", ":")]))
    raw = json.dumps({k: message[k] for k in keys}, separators=separators).encode()
    if draw(st.integers(0, 3)) == 0:
        start, end = sorted(draw(st.tuples(st.integers(0, len(raw)), st.integers(0, len(raw)))))
        raw = raw[:start] + draw(st.binary(max_size=6)) + raw[end:]
    return raw


rubbish = st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode())

#: What may be pushed into a pending queue.
anything = spoiled() | rubbish
