"""The second contestant: the same task in Celery as it is. Any worker runs it, in any order."""

from __future__ import annotations

from demo.contestant import add_file, make_app

__all__ = ("app", "index_file")

app = make_app("demo.plain")

index_file = app.task(name="demo.index_file")(add_file)
