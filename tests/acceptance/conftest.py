"""What most acceptance laws begin with."""

from __future__ import annotations

import pytest

from acceptance.support import Producer
from harness import Cluster


@pytest.fixture
def producer(cluster: Cluster) -> Producer:
    """Sends tasks of the test app to the law's cluster."""
    return Producer(cluster.broker_url)
