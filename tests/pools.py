"""The pools that laws run on: `make test` has prefork and threads, `make test-all` has them all."""

from __future__ import annotations

import pytest

#: `make test` leaves the law, or the case, to `make test-all`, which CI runs too.
long = pytest.mark.long

SOLO = pytest.param("solo", marks=long)
GEVENT = pytest.param("gevent", marks=long)
POOLS = ["prefork", "threads", SOLO, GEVENT]
