"""The ledger's transitions: one typed method for each Lua script (lua_text.py)."""

from __future__ import annotations

from celery_affinity.carrying_scripts import CarryingScripts
from celery_affinity.leader_scripts import LeaderScripts
from celery_affinity.node_scripts import NodeScripts
from celery_affinity.script_calls import SCHEMA_VERSION

__all__ = ("SCHEMA_VERSION", "Scripts")


class Scripts(LeaderScripts, NodeScripts, CarryingScripts):
    """Calls of the ledger's scripts for one namespace.

    Does not: decide anything; what a script answers is handed on as it is.
    """
