"""Which shard of a queue a tag belongs to."""

from __future__ import annotations

from hashlib import sha1

__all__ = ("incarnations_of", "shard_of")


def shard_of(tag: str, shards: int) -> int:
    """The shard of a tag: the same one in every process and version.

    Arguments:
        shards: How many the queue has.
    """
    if shards == 1:
        return 0
    digest = sha1(tag.encode("utf-8", "surrogatepass"), usedforsecurity=False).digest()
    return int.from_bytes(digest[:8], "big") % shards


def incarnations_of(incarnation: str, shards: int) -> list[str]:
    """A node's name in each shard; in the first one it is its own."""
    return [incarnation, *(f"{incarnation}-{shard}" for shard in range(1, shards))]
