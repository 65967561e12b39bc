"""The acceptance app under faults.

Environment: as there, and CHAOS_VISIBILITY is the broker's visibility timeout in seconds.
"""

from __future__ import annotations

import os

from acceptance.apps.affinity_app import affinity, app
from acceptance.apps.newer import thrice

__all__ = ("affinity", "app", "thrice")

if seconds := os.environ.get("CHAOS_VISIBILITY"):
    # Kombu 5.7 sweeps about every 100 s; here every second, as a busy site's many workers do.
    app.conf.broker_transport_options = {
        "visibility_timeout": float(seconds), "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
    }
