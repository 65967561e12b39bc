"""An error of this package comes unharmed out of a pool's process and through a result backend."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from celery import Celery

from celery_affinity import exceptions

MADE_OF: dict[str, tuple[Any, ...]] = {
    "UndeclaredQueueError": ("slow", ["jobs"], "app.work"),
    "AmbiguousQueueError": (["jobs", "mails"],),
    "NoSuchWorkerError": ("w1", [("w1@a", "1"), ("w1@b", "2")]),
    "SchemaVersionError": ("1", "2"),
    "ShardsError": ("jobs", 2, 3),
    "BatchResultError": ("app.work", "a str", 2),
    "OwnTagWaitError": ("id", "acme", "jobs"),
}


@pytest.mark.parametrize("name", exceptions.__all__)
def test_an_error_survives_pickle_and_a_result_backend(name: str) -> None:
    kind = getattr(exceptions, name)
    error = kind(*MADE_OF.get(name, ("what was found",)))
    backend = Celery("errors", backend="cache+memory://", set_as_current=False).backend
    copies = [
        pickle.loads(pickle.dumps(error)),
        backend.exception_to_python(backend.prepare_exception(error, serializer="json")),
    ]
    for copy in copies:
        assert (type(copy), str(copy)) == (kind, str(error))
    assert "what was found" in str(error) or name in MADE_OF
