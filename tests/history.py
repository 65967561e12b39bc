"""The judge is the library's own, which users have too."""

from celery_affinity.history import (
    HISTORY_VARIABLE,
    Expected,
    History,
    Kind,
    Place,
    Run,
    Violation,
    count_kinds,
    record,
)

__all__ = (
    "HISTORY_VARIABLE", "Expected", "History", "Kind", "Place", "Run", "Violation", "count_kinds",
    "record",
)
