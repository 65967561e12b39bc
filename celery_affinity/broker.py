"""What a broker that does not hold the ledger has to be able to do; one module for each kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

__all__ = ("Broker", "OutOfSight", "Outlet", "Sight", "Source", "Taken", "UnusableMessage")


class UnusableMessage(Exception):
    """A message that the broker's client cannot send; none of its call was sent.

    Arguments:
        at: Its place in the call.
    """

    def __init__(self, at: int, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {error}"[:1000])
        self.at = at


class OutOfSight(Exception):
    """What waits on the broker cannot be seen; the text says why, for people."""


class Taken(NamedTuple):
    """A message that the broker has handed out and keeps until it is told `done`."""

    #: The message as the ledger keeps it.
    raw: bytes
    #: The same for each delivery of one published message.
    identity: str
    #: Whether it may have been handed out before.
    again: bool
    #: What the source knows it by.
    handle: Any


class Source(Protocol):
    """A connection that takes from one pending queue. Its owner is one thread.

    All methods raise whatever the broker's client does; the caller closes it then.
    """

    def take(self, most: int, seconds: float) -> list[Taken]:
        """The next messages, oldest first; waits for the first one, at most so long."""
        ...

    def done(self, taken: Sequence[Taken]) -> None:
        """Take all these off the broker; they are all that were handed out."""
        ...

    def give_back(self, raws: Sequence[bytes], identities: Sequence[str]) -> None:
        """Publish these as plain Celery messages; the broker has them when it returns.

        Arguments:
            identities: What `take` tells two copies of one message by: each is a message of its own
                with another identity than it had, and has the same one if it is given back again.
        """
        ...

    def delete(self, worker_queues: Sequence[str]) -> None:
        """Delete worker queues with what is in them; some may be gone."""
        ...

    def close(self) -> None:
        """Hang up; what is not done goes back to its place. Does not raise."""
        ...


class Outlet(Protocol):
    """A connection that publishes into worker queues. Its owner is one thread."""

    def publish(self, messages: Sequence[tuple[str, bytes]]) -> list[bool]:
        """Publish (worker queue, message) in this order.

        Returns:
            For each whether the broker has it; False: there is no such queue now.

        Raises:
            UnusableMessage: If one of them cannot be sent.
        """
        ...

    def delete(self, worker_queues: Sequence[str]) -> None:
        """Delete worker queues with what is in them; some may be gone."""
        ...

    def close(self) -> None:
        """Hang up. Does not raise."""
        ...


class Sight(Protocol):
    """A connection that looks at pending queues and changes nothing. One thread at a time.

    Its answers take a few seconds at most. All methods but `close` raise whatever the broker's
    client does; the caller closes it then.
    """

    def waiting(self, pending: str) -> int:
        """Messages of a pending queue that are handed out to nobody; 0 if it is not there."""
        ...

    def find(self, pending: str, task_id: str) -> int | None:
        """Place of a task's message in its list, the oldest being 1; None if it is not there.

        Raises:
            OutOfSight: If the broker shows nobody what waits.
        """
        ...

    def close(self) -> None:
        """Hang up. Does not raise."""
        ...


class Broker(Protocol):
    """Where producers publish and workers consume, if that is not the ledger's Redis."""

    def source(self, pending: str) -> Source:
        """Connect to take from a pending queue."""
        ...

    def outlet(self) -> Outlet:
        """Connect to publish into worker queues."""
        ...

    def sight(self) -> Sight:
        """Connect to look at pending queues."""
        ...

    def worker_queue(self, name: str, before_declare: Callable[[], None] | None) -> Any:
        """The kombu queue that an incarnation consumes."""
        ...
