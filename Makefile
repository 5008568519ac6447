# Every target calls the `propensity` command or a tool from .venv; `make` alone lists them.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup setup-dev run test faults identities rules hysteresis-proof drift-proof lint format examples load bench bench-audiences bench-features bench-ingest bench-memory bench-members bench-training bench-batch bench-tracing fresh-run dashboards observe traffic preview sync-kills bench-sync image clean again lock system

# Where this is set, each of the hundreds of processes that tests start compiles every module again: a second each.
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
PORT ?= 8000
SHOP := .run/shop/events.parquet
SPEC := examples/shop.yaml

# The first Python that the lock files have wheels for. Another one: make setup PYTHON=/path/to/python3.12
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c '$(SUPPORTED)' 2>/dev/null && echo $$python && break; done)

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.ready ## Build .venv with the `propensity` command, to train and to serve

setup-dev: .venv/.ready-dev ## The same, with what tests and linters need

run: .run/replayed | .run/trained ## From nothing to an answer: simulated shop, model, service on PORT (8000)
	@PROPENSITY_DATA_DIR=.run/data $(BIN)/propensity serve --port $(PORT) --artifacts .run/artifacts --first-answer

test: .venv/.ready-dev system ## Install what the tests need, then check style and types and run every test
	@$(MAKE) --no-print-directory lint
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder

faults: .venv/.ready-dev ## Give every fault of Redis, network and clients its full time, and print what was measured
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -q --timeout 300 tests/faults --full

identities: .venv/.ready-dev ## Normalise and hash 10,000 random addresses and 10,000 numbers, instead of the 500 of make test
	@IDENTITY_EXAMPLES=10000 $(BIN)/pytest -q tests/service/test_identity.py

rules: .venv/.ready-dev ## Check and test the rules of Prometheus (deploy/prometheus) with promtool
	@$(MAKE) --no-print-directory system PROGRAMS=prometheus
	@$(BIN)/pytest -q tests/deploy/test_rules.py

hysteresis-proof: .venv/.ready-dev ## Simulate a month of trembling scores with and without hysteresis; prints the tables of docs/audiences.md
	@$(BIN)/python -m loadtest.prove_hysteresis

drift-proof: .venv/.ready-dev ## Simulate false alarms and power of the drift rules; prints the tables of docs/drift.md
	@$(BIN)/python -m loadtest.prove_drift

lint: .venv/.ready-dev ## Check style (ruff) and types (mypy, strict)
	@$(BIN)/ruff format --quiet --check . || { echo "Run 'make format'." >&2; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary

format: .venv/.ready-dev ## Format the code and repair what ruff can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

DATA ?= data

examples: .venv/.ready-dev ## Train, serve and score every example on its data in DATA=DIRECTORY; writes docs/results.md
	@$(BIN)/python examples/results.py $(DATA)

SHAPE ?= steady
USERS ?= 50
SECONDS ?= 60
PROCESSES ?= 1
URL ?= http://127.0.0.1:$(PORT)

load: .venv/.ready-dev ## Send simulated visitors to URL: SHAPE=steady|ramp|spike|soak USERS=50 SECONDS=60 PROCESSES=1
	@mkdir -p .run/load
	@$(BIN)/locust -f loadtest/locustfile.py --headless --only-summary --host $(URL) --html .run/load/report.html \
		--shape $(SHAPE) --users $(USERS) --run-time $(SECONDS) $(OPTIONS) \
		$(if $(filter-out 1,$(PROCESSES)),--processes $(PROCESSES) --master-bind-host 127.0.0.1); \
	status=$$?; echo "Report: .run/load/report.html"; exit $$status

bench: .venv/.ready-dev ## Compare scores a second with a plain service and with bare uvicorn; QUICK=1 in a third of the time
	@$(MAKE) --no-print-directory system PROGRAMS="redis-server wrk"
	@$(BIN)/python -m loadtest.bench_serving $(if $(QUICK),--quick)

bench-audiences: .venv/.ready-dev | .run/trained ## Measure time and memory of refreshing audiences of a million visitors
	@$(BIN)/python -m loadtest.bench_audiences

bench-features: .venv/.ready-dev ## Measure how many feature rows a core computes in a second
	@$(BIN)/python -m loadtest.bench_features

bench-ingest: .venv/.ready-dev ## Measure how many events a second a core takes
	@$(MAKE) --no-print-directory system PROGRAMS="redis-server wrk"
	@$(BIN)/python -m loadtest.bench_ingest

bench-memory: .venv/.ready-dev ## Measure the memory of a million visitors, before and after compaction
	@$(BIN)/python -m loadtest.bench_memory

bench-members: .venv/.ready-dev ## Page through a million members while scores change; measure time and memory of the propensity database
	@$(MAKE) --no-print-directory system PROGRAMS=redis-server
	@$(BIN)/python -m loadtest.bench_members

bench-training: .venv/.ready-dev ## Measure time and memory of simulating and of training on 1 and 20 million events
	@$(BIN)/python -m loadtest.bench_training

bench-batch: .venv/.ready-dev ## Measure scoring a million visitors: rates, memory, Dask workers; PARTS="rates memory dask", DATA=DIR to keep the shop
	@$(BIN)/python -m loadtest.bench_batch $(PARTS) $(if $(filter command line,$(origin DATA)),--data $(DATA))

bench-tracing: .venv/.ready-dev ## Measure what traces cost a score, off and on
	@$(MAKE) --no-print-directory system PROGRAMS="redis-server wrk"
	@$(BIN)/python -m loadtest.bench_tracing

fresh-run: ## Clone this checkout and time its `make run` to the first score, first start and second
	@$(or $(PYTHON),python3) loadtest/fresh_run.py

dashboards: .venv/.ready-dev ## Write deploy/grafana/dashboards/*.json from the code beside them
	@$(BIN)/python -W ignore -m deploy.grafana

PROMETHEUS_PORT ?= 9090

observe: .venv/.ready ## Watch the service on PORT with Prometheus, and Grafana where it is installed, until Ctrl-C
	@$(MAKE) --no-print-directory system PROGRAMS=prometheus
	@$(BIN)/python -m deploy.observe --port $(PORT) --prometheus-port $(PROMETHEUS_PORT)

traffic: .venv/.ready ## Score moments of the shop's last week again on PORT: SECONDS=60, and DRIFT=FEATURE to see an alarm
	@$(BIN)/python -m deploy.grafana.traffic --port $(PORT) --seconds $(SECONDS) $(if $(DRIFT),--drift $(DRIFT))

preview: .venv/.ready-dev ## Draw the dashboards without Grafana, from the Prometheus on PROMETHEUS_PORT (9090)
	@$(BIN)/python -W ignore -m deploy.grafana.preview --prometheus http://127.0.0.1:$(PROMETHEUS_PORT) $(OPTIONS)

sync-kills: .venv/.ready-dev ## Kill the synchronisation at POINTS=100 random points, over SQLite and over PostgreSQL
	@$(MAKE) --no-print-directory system PROGRAMS=postgresql
	@$(BIN)/python -m tests.audiences.kills --points $(POINTS)

POINTS ?= 100

bench-sync: .venv/.ready-dev ## Measure time and memory of synchronising a million members
	@$(BIN)/python -m loadtest.bench_sync

image: ## Build the serving image with the models in artifacts/
	docker build --tag propensity .

clean: ## Remove .venv, .run and caches; trained models in artifacts/ stay
	rm -rf .venv .run build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- make run: each step is done once; a changed spec trains again, lost results are made again ---

again:

$(SHOP): | .venv/.ready
	@$(BIN)/propensity simulate --out $(@D) --events 400000 --seed 1

.run/trained: $(SHOP) $(SPEC) $(if $(wildcard .run/artifacts/*/aliases.json),,again)
	@$(BIN)/propensity train --events $(SHOP) --spec $(SPEC) --artifacts .run/artifacts
	@touch $@

.run/replayed: $(SHOP) $(SPEC) $(if $(wildcard .run/data/*),,again) | .run/trained
	@PROPENSITY_DATA_DIR=.run/data $(BIN)/propensity replay --events $(SHOP) --spec $(SPEC)
	@touch $@

# --- make setup: a virtual environment, installed from the lock files ---

# uv takes a third of pip's time; where it cannot be had or is refused its downloads, pip installs the same files.
define install
	@index="$${PIP_INDEX_URL:-$$($(BIN)/pip config get global.index-url 2>/dev/null)}"; \
	{ test -x $(BIN)/uv && UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$$index}" \
		$(BIN)/uv pip install --quiet --python $(BIN)/python $(1); } || \
	{ echo "Installing with pip, which takes longer ..."; \
		$(BIN)/pip install -qq --disable-pip-version-check $(1); }
endef

.venv/.python: requirements-bootstrap.lock
	@test -n "$(PYTHON)" || { echo "Python 3.11 to 3.14 is needed and none is on the PATH." \
		"Install one, or name it: make setup PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c '$(SUPPORTED)' || { echo "$(PYTHON) is not Python 3.11 to 3.14." \
		"Name one that is: make setup PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		package=$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y $$package >/dev/null; \
		else echo "$(PYTHON) cannot make virtual environments." \
			"On Debian and Ubuntu: sudo apt-get install $$package" >&2; exit 1; fi; }
	@echo "Installing into .venv with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/pip install -qq --disable-pip-version-check --require-hashes -r $< || \
		echo "uv cannot be installed here." >&2
	@touch $@

.venv/.ready: .venv/.python requirements-training.lock pyproject.toml
	$(call install,--require-hashes -r requirements-training.lock)
	$(call install,--no-deps --no-build-isolation --editable .)
	@touch $@

.venv/.ready-dev: .venv/.ready requirements-dev.lock
	$(call install,--require-hashes -r requirements-dev.lock)
	@touch $@

COMPILE = @$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --annotation-style line \
	--generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"

lock: .venv/.python ## Write the lock files from pyproject.toml (UPGRADE=1: with the newest versions)
	$(COMPILE) pyproject.toml $(if $(UPGRADE),--upgrade) --all-extras --group dev -o requirements-dev.lock
	$(COMPILE) pyproject.toml -c requirements-dev.lock --extra training --extra audiences --extra tracing --group build -o requirements-training.lock
	$(COMPILE) pyproject.toml -c requirements-dev.lock --extra tracing -o requirements.lock
	$(COMPILE) --group bootstrap -c requirements-dev.lock $(if $(UPGRADE),--upgrade) -o requirements-bootstrap.lock

PROGRAMS ?= redis-server chromium prometheus postgresql
# Debian starts the servers that it installs unless this file forbids it; the tests start their own, on other ports.
POLICY ?= /usr/sbin/policy-rc.d
# Debian has this server beside the PATH.
POSTGRES ?= /usr/lib/postgresql/*/bin/postgres

system: ## Install redis-server, chromium, prometheus and postgresql (PROGRAMS) where they are missing (by apt-get, as root), or say so
	@missing=""; \
	for program in $(PROGRAMS); do \
		case $$program in \
			chromium) names="chromium chromium-browser google-chrome";; \
			postgresql) names="postgres $(POSTGRES)";; \
			*) names=$$program;; \
		esac; \
		for name in $$names; do command -v $$name >/dev/null && continue 2; done; \
		missing="$$missing $$program"; \
	done; \
	test -n "$$missing" || exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "Installing$$missing ..."; \
		test -e $(POLICY) || { trap 'rm -f $(POLICY)' EXIT; printf '#!/bin/sh\nexit 101\n' >$(POLICY); chmod +x $(POLICY); }; \
		apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing >/dev/null && exit 0; \
	fi; \
	echo "Missing:$$missing. What needs them is skipped; on Debian: sudo apt-get install$$missing" >&2; \
	test "$$CI" != true
