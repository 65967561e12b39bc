"""Affinity against plain Celery, alternating in one run on one embedded server."""
