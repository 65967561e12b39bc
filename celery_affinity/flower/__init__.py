"""Flower with an *Affinity* page: ``celery -A app affinity flower``.

Does not: import Flower here; `host` does, when the command runs.
"""

__all__ = ()
