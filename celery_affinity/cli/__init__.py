"""``celery -A app affinity ...``: prints what the methods of `Affinity` return, decides nothing.

Exit codes: 0 done; 1 not done, not found or not well (the text says what); 2 wrong usage.
"""

from celery_affinity.cli import exporter, flower, letters, reading, steering, watching
from celery_affinity.cli.group import affinity

__all__ = ("affinity", "exporter", "flower", "letters", "reading", "steering", "watching")
