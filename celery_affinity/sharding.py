"""Which shard of a queue a tag belongs to, and what a node is called in each shard."""

from __future__ import annotations

from hashlib import sha1

__all__ = ("incarnation_in", "incarnations_of", "node_of", "shard_of")


def shard_of(tag: str, shards: int) -> int:
    """The shard of a tag: the same one in every process and version.

    Arguments:
        shards: How many the queue has.
    """
    if shards == 1:
        return 0
    digest = sha1(tag.encode("utf-8", "surrogatepass"), usedforsecurity=False).digest()
    return int.from_bytes(digest[:8], "big") % shards


def incarnation_in(incarnation: str, shard: int) -> str:
    """The name under which a shard's ledger has a node.

    Arguments:
        incarnation: The node's name in the first shard.
    """
    return f"{incarnation}-{shard}" if shard else incarnation


def node_of(incarnation: str, shard: int) -> str:
    """The reverse of `incarnation_in`."""
    return incarnation.removesuffix(f"-{shard}") if shard else incarnation


def incarnations_of(incarnation: str, shards: int) -> list[str]:
    """A node's name in each shard; in the first one it is its own."""
    return [incarnation_in(incarnation, shard) for shard in range(shards)]
