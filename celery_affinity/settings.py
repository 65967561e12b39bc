"""Settings: frozen and validated."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from celery_affinity.exceptions import ConfigurationError
from celery_affinity.types import Role

__all__ = ("AffinityQueue", "AffinitySettings", "explain_problems")

#: A name must survive in Redis keys, in AMQP (255 bytes) and inside a JSON string as it is.
_BAD_IN_NAME = re.compile(r'[\x00-\x1f\x7f"\\]')

#: How long a retry may hold its tag with ``ordered_retries=True``.
ORDERED_RETRY_SECONDS = 300.0

#: Most parts that one queue may have.
MAX_SHARDS = 64
#: Numbers of entries that one part has for itself: they are unique over all parts.
ENTRIES_A_SHARD = 10**12

Count = Annotated[int, Field(strict=True, ge=1, le=1_000_000)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


def _check_name(value: str | None) -> str | None:
    if value is None:
        return None
    if not value or len(value.encode()) > 200 or _BAD_IN_NAME.search(value):
        raise ValueError(
            f"{value!r} cannot be a name: expected 1 to 200 bytes without control characters, "
            "double quotes or backslashes"
        )
    return value


def explain_problems(
    model: type[BaseModel],
    what: str,
    error: ValidationError,
    origins: Mapping[str, str] | None = None,
) -> str:
    """What pydantic found, in sentences: what was found, what was expected, where it is from."""
    lines = []
    origins = origins or {}
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        top = str(problem["loc"][0]) if problem["loc"] else ""
        origin = f" (from {origins[top]})" if top in origins else ""
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            near = get_close_matches(name, model.model_fields, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            known = ", ".join(sorted(model.model_fields))
            message = f"there is no such setting; {hint}correct or remove it (known: {known})"
        elif name:
            message += f"; found {_shown(name, problem['input'])}"
        else:
            message += _mentioned(message, origins)
        lines.append(f"{name}{origin}: {message}" if name else message)
    return f"{what} cannot be used:\n  " + "\n  ".join(lines)


def _shown(name: str, found: object) -> str:
    """What was found, unless that has a password in it."""
    if name == "redis_url":
        return f"a {type(found).__name__} (not shown: it may have a password in it)"
    return f"{found!r:.80}"


def _mentioned(message: str, origins: Mapping[str, str]) -> str:
    """Where the settings that a message names come from."""
    named = [f"{name} is from {origin}" for name, origin in origins.items() if name in message]
    return f" ({', '.join(named)})" if named else ""


class AffinityQueue(BaseModel):
    """One affinity queue: an isolated domain with its own pending queue, ledger and limits.

    Arguments:
        name: The Celery queue that producers send to and workers name in ``-Q``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    #: Tasks of one tag before the slot passes on, while another tag waits.
    max_batch_size: Count = 10
    #: Tasks of one tag that may run at once; a mapping gives single tags their own number,
    #: its "default" the others'.
    tag_concurrency: Count | dict[str, Count] = 1
    #: Slots of a node that may serve this queue; None: all of its pool.
    slots: Count | None = None
    #: Seconds after which a lease passes on, while another tag waits; None: tasks alone count.
    max_batch_seconds: Seconds | None = None
    #: What becomes of a task that had started when its process was lost: it runs again, or, if it
    #: must not, goes to the dead letters and its result is FAILURE.
    on_lost: Literal["requeue", "bury"] = "requeue"
    #: What follows when a task has failed for good. "skip": the tag goes on. "block": the task goes
    #: to the dead letters and its tag waits until it is requeued (it then runs first) or purged.
    #: "park": the same, but the tag waits until `Affinity.resume`, whatever becomes of the
    #: task.
    on_failure: Literal["skip", "block", "park"] = "skip"
    #: Starts after which a task whose process was lost each time is buried.
    max_deliveries: Count = 3
    #: Whether a retry keeps its place at the head of its tag, whose other tasks wait for it. A
    #: number is for how many seconds at most, from the first retry on; True: 300. A retry that is
    #: due later goes to the end, as without this setting.
    ordered_retries: bool | Seconds = False
    #: What becomes of a task without a tag: an error, or each such task is a tag of its own.
    untagged: Literal["error", "spread"] = "error"
    #: The scheduler's longest sleep in seconds. Not a latency: arrivals wake it.
    scheduler_interval: Seconds = 1.0
    #: Seconds that a tag waits for the slot that had it last, while another one is free.
    warm_wait: Annotated[float, Field(ge=0, le=3600)] = 0.0
    #: Tags of which the queue remembers the slot that had them last; warm_wait needs some.
    warm_tags: Annotated[int, Field(strict=True, ge=0, le=1_000_000)] = 1000
    #: Celery queue that producers publish to; default: the queue's name.
    pending_queue_name: str | None = None
    #: Worker queues are named "<prefix>.<node>.<incarnation>"; default: "<name>.worker".
    worker_queue_prefix: str | None = None
    #: Name of this queue's part of the ledger; default: the queue's name.
    state_prefix: str | None = None
    #: Over how many parts, each in a hash slot of its own, the tags of this queue are spread. More
    #: than one is for a Redis Cluster whose one master does not suffice.
    shards: Annotated[int, Field(strict=True, ge=1, le=MAX_SHARDS)] = 1
    _shard: int = PrivateAttr(default=0)

    def __init__(self, name: str, **settings: Any) -> None:
        try:
            super().__init__(name=name, **settings)
        except ValidationError as error:
            raise ConfigurationError(
                explain_problems(AffinityQueue, f"AffinityQueue({name!r})", error)
            ) from None

    @model_validator(mode="after")
    def _check_warmth(self) -> AffinityQueue:
        if self.warm_wait and not self.warm_tags:
            raise ValueError(
                f"warm_wait ({self.warm_wait:g} s) needs warm_tags above 0: no slot is remembered "
                "that a tag could wait for"
            )
        return self

    @model_validator(mode="after")
    def _check_shards(self) -> AffinityQueue:
        if self.shards > 1 and self.slots is not None:
            raise ValueError(
                f"slots ({self.slots}) and shards ({self.shards}) do not go together: each slot of "
                "a node works for one shard at a time. Leave slots out, or give the queue workers "
                "of its own with as many slots"
            )
        return self

    _names = field_validator("name", "pending_queue_name", "worker_queue_prefix", "state_prefix")(
        _check_name
    )

    @property
    def pending(self) -> str:
        """The Celery queue that producers publish to."""
        return self.pending_queue_name or self.name

    @property
    def state(self) -> str:
        """The name under which the ledger keeps this queue, or this part of it."""
        name = self.state_prefix or self.name
        return f"{name}#{self._shard}" if self._shard else name

    @property
    def shard(self) -> int:
        """Which part of the queue this is; the first one is 0."""
        return self._shard

    @property
    def parts(self) -> tuple[AffinityQueue, ...]:
        """The same queue once for each of its shards; only `state` and `shard` differ."""
        found = [self.model_copy() for _ in range(self.shards)]
        for shard, part in enumerate(found):
            part._shard = shard
        return tuple(found)

    @property
    def default_concurrency(self) -> int:
        """The concurrency of tags without one of their own."""
        if isinstance(self.tag_concurrency, dict):
            return self.tag_concurrency.get("default", 1)
        return self.tag_concurrency

    @property
    def limits(self) -> dict[str, int]:
        """What the ledger's scripts go by."""
        return {
            "shards": self.shards,
            "first_entry": self._shard * ENTRIES_A_SHARD,
            "max_batch_size": self.max_batch_size,
            "batch_ms": int((self.max_batch_seconds or 0) * 1000),
            "tag_concurrency": self.default_concurrency,
            "failure": ("skip", "block", "park").index(self.on_failure),
            "bury_lost": int(self.on_lost == "bury"),
            "max_deliveries": self.max_deliveries,
            "ordered": int(self._ordered_seconds * 1000),
            "warm_wait": int(self.warm_wait * 1000),
            "warm_tags": self.warm_tags,
        }

    @property
    def _ordered_seconds(self) -> float:
        if isinstance(self.ordered_retries, bool):
            return ORDERED_RETRY_SECONDS if self.ordered_retries else 0.0
        return self.ordered_retries

    @property
    def own_concurrencies(self) -> dict[str, int]:
        """Tags with a concurrency of their own."""
        if isinstance(self.tag_concurrency, dict):
            return {tag: n for tag, n in self.tag_concurrency.items() if tag != "default"}
        return {}


class AffinitySettings(BaseModel):
    """Settings of an app. All times are in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    queues: tuple[AffinityQueue, ...] = ()
    #: Redis of the ledger; default: the broker's.
    redis_url: str | None = Field(default=None, repr=False)
    #: Keeps apps on one Redis apart.
    namespace: str = "default"
    #: What a worker node does besides its ordinary queues.
    role: Role = "both"
    #: A leader that does not renew for so long is replaced.
    leader_ttl: Seconds = 5.0
    #: How often a worker reports.
    heartbeat_interval: Seconds = 2.0
    #: A worker that did not report for so long is lost, and what it held runs elsewhere.
    heartbeat_timeout: Seconds = 10.0
    #: What becomes of running tasks when a worker's heartbeats do not get through: they finish, or
    #: their process is killed before the lease passes on (without processes: the worker).
    on_ledger_lost: Literal["finish", "stop"] = "finish"
    #: On prefork, run all tasks of a lease in one pool process.
    slot_is_process: bool = True
    #: Port on which whoever schedules serves metrics to Prometheus; none unless asked for.
    metrics_port: int | None = Field(default=None, ge=1, le=65535)

    @field_validator("namespace")
    @classmethod
    def _check_namespace(cls, value: str) -> str:
        _check_name(value)
        if "{" in value or "}" in value:
            raise ValueError(f"{value!r} must not contain braces: they would change the hash slot")
        if re.search(r"#\d+$", value):
            raise ValueError(f"{value!r} must not end with # and a number: so shards are named")
        return value

    @model_validator(mode="after")
    def _check_relations(self) -> AffinitySettings:
        if self.heartbeat_timeout < 3 * self.heartbeat_interval:
            raise ValueError(
                f"heartbeat_timeout ({self.heartbeat_timeout:g} s) must be at least three times "
                f"heartbeat_interval ({self.heartbeat_interval:g} s), or one late beat costs a "
                "worker its leases: raise the former or lower the latter"
            )
        for what in ("name", "pending", "state"):
            values = [getattr(queue, what) for queue in self.queues]
            if twice := sorted({v for v in values if values.count(v) > 1}):
                label = "name" if what == "name" else f"{what} name"
                raise ValueError(
                    f"two affinity queues share the {label} {twice[0]!r}: give each its own"
                )
        states = [part.state for queue in self.queues for part in queue.parts]
        if twice := sorted({state for state in states if states.count(state) > 1}):
            raise ValueError(
                f"two affinity queues, or shards of them, share the state name {twice[0]!r}: "
                "rename one of them"
            )
        for queue in self.queues:
            if queue.scheduler_interval > self.leader_ttl:
                raise ValueError(
                    f"scheduler_interval of {queue.name!r} ({queue.scheduler_interval:g} s) must "
                    f"not exceed leader_ttl ({self.leader_ttl:g} s), or a leader oversleeps"
                )
        return self

    def queue(self, name: str) -> AffinityQueue | None:
        """The declared queue of that name, or None."""
        return next((queue for queue in self.queues if queue.name == name), None)

    @property
    def parts(self) -> list[AffinityQueue]:
        """All shards of all queues."""
        return [part for queue in self.queues for part in queue.parts]

    @property
    def shards(self) -> int:
        """How many ledgers the queues are spread over: the most shards that one of them has."""
        return max((queue.shards for queue in self.queues), default=1)

    @property
    def queue_names(self) -> list[str]:
        """Names of the declared queues."""
        return [queue.name for queue in self.queues]
