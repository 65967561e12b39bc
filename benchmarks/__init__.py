"""Affinity against plain Celery and what one would build instead, in turn on one embedded server.

One module a benchmark: throughput, warmth, fairness, latency, ledger, growth. Each runs by
`python -m benchmarks.<name>` and writes its section of docs/performance.md.
"""
