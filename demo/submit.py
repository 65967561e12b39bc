"""Sends every installed source file to the workers that run, once: docker/compose.yaml."""

from __future__ import annotations

import time

from demo.affinity_app import app, index_file
from demo.corpus import installed

__all__ = ("main",)


def main() -> None:
    """Send, and say how much."""
    sources = installed()
    with app.producer_or_acquire() as producer:
        for source in sources:
            index_file.apply_async(
                (source.tag, source.seq, source.name, str(source.path), time.monotonic()),
                producer=producer,
            )
    print(f"{len(sources):,} files of {len({source.tag for source in sources})} distributions sent")


if __name__ == "__main__":
    main()
