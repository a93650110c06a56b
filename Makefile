# `make help` lists what there is. Everything runs from a clean clone; what a target needs, it installs.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
UV_VERSION := 0.13.8
# uv from PATH would do, but its version decides what a lock file looks like.
UV := .tools/uv/bin/uv
MEMBERS := proto runtime operator agent cli plugin
PROTOS := $(wildcard proto/src/outrider_proto/v1/*.proto)
COMPILE := $(UV) pip compile -q --universal --generate-hashes --no-emit-index-url --no-header -p 3.11 \
	$(foreach m,$(MEMBERS),--no-emit-package outrider-$(m))

.PHONY: help
help: ## list the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(UV):
	@echo "installing uv $(UV_VERSION)" >&2
	@$(PYTHON) -m venv .tools/uv
	@.tools/uv/bin/pip install -q --disable-pip-version-check uv==$(UV_VERSION)

$(VENV)/.synced: $(UV) requirements.lock $(foreach m,$(MEMBERS),$(m)/pyproject.toml)
	@echo "installing the locked Python packages into $(VENV)" >&2
	@[ -x $(BIN)/python ] || $(UV) venv -q --python $(PYTHON) $(VENV)
	@$(UV) pip sync -q --python $(BIN)/python --require-hashes requirements.lock
	@$(UV) pip install -q --python $(BIN)/python --no-deps $(foreach m,$(MEMBERS),-e $(m))
	@touch $@

.PHONY: setup
setup: $(VENV)/.synced ## install the locked Python packages into .venv

.PHONY: lock
lock: $(UV) ## resolve the dependencies anew and write the lock files
	$(COMPILE) --group dev pyproject.toml -o requirements.lock
	$(COMPILE) -c requirements.lock operator/pyproject.toml -o operator/requirements.lock
	$(COMPILE) -c requirements.lock agent/pyproject.toml -o agent/requirements.lock

PROTOC = $(BIN)/python -m grpc_tools.protoc -I proto/src --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
	--plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc --python_out=$(1) --mypy_out=quiet:$(1) \
	--grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) $(PROTOS)

.PHONY: proto
proto: setup ## generate the Python code from the .proto files
	$(call PROTOC,proto/src)

.PHONY: crds
crds: setup ## write what is derived in the resource definitions, and the chart's copies
	$(BIN)/python crds/generate.py

# ---------------------------------------------------------------- checks and tests

PYTEST = PYTHONPATH=tests $(BIN)/pytest
CHECKED := proto/src runtime/src operator/src agent/src cli/src plugin/src crds tests benchmarks

.PHONY: check
check: setup ## everything fast: format, lint, types, layers, freshness, unit tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(CHECKED)
	$(BIN)/lint-imports
	@$(MAKE) --no-print-directory check-proto
	$(PYTEST) -q tests/unit

.PHONY: check-proto
check-proto: setup
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && $(call PROTOC,$$scratch) && \
	for file in $$(cd "$$scratch" && find . -type f); do \
	  cmp -s "$$scratch/$$file" "proto/src/$$file" || { \
	    echo "error: proto/src/$$file is not what the .proto files give: run make proto" >&2; exit 1; }; \
	done

.PHONY: fetch
fetch: setup ## build and fetch all that the tests need: Kubernetes, Kafka, Prometheus, images
	PYTHONPATH=tests $(BIN)/python -m cluster.fetch --all

.PHONY: test
test: check fetch ## all tests: unit, integration, end to end (50 minutes cold, 30 warm)
	$(PYTEST) tests/integration tests/e2e

.PHONY: test-unit
test-unit: setup ## the unit tests
	$(PYTEST) tests/unit

.PHONY: test-integration
test-integration: setup ## the tests against a real API server and a real Kafka
	$(PYTEST) tests/integration

.PHONY: test-e2e
test-e2e: setup ## the tests on the three-node cluster, with the chart
	$(PYTEST) tests/e2e

.PHONY: soak
soak: setup ## faults that take long: the broker away for 5 minutes with 50 agents (10 minutes)
	PYTHONPATH=tests $(BIN)/pytest tests/soak

.PHONY: format
format: setup ## format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# ---------------------------------------------------------------- figures

BENCH = PYTHONPATH=tests:benchmarks $(BIN)/python -m

.PHONY: bench-fanout
bench-fanout: setup ## time, memory and writes of one task on 5,000 agents (10 minutes; AGENTS=500 for a look)
	$(BENCH) swarm.fanout --agents $(or $(AGENTS),5000) --profile

.PHONY: bench-config
bench-config: setup ## time, writes and processor time of one AgentConfig on 5,000 agents (10 minutes; AGENTS=500 for a look)
	$(BENCH) swarm.config --agents $(or $(AGENTS),5000) --profile

.PHONY: bench-salt
bench-salt: setup ## the same job by Salt and by Outrider on 50 nodes (NODES=10 for a look)
	$(BENCH) swarm.salt --nodes $(or $(NODES),50)

.PHONY: bench-ingest
bench-ingest: setup ## records a second and CPU-second, latency, memory, the agent's cost (20 minutes; LOOK=1 for a look)
	$(BENCH) records.ingest --profile $(if $(LOOK),--look) $(if $(PARTS),--parts $(PARTS)) \
	  $(if $(AGENTS),--agents $(AGENTS)) $(if $(MINUTES),--minutes $(MINUTES))

.PHONY: bench-producers
bench-producers: setup ## cost, latency and faults of the Kafka producers there are (5 minutes), as JSON lines
	@$(BENCH) kafka_producers

# ---------------------------------------------------------------- seeing it

.PHONY: demo
demo: setup ## see it work: a real API server, one server, three agents, one task (about 6 minutes at first, then 30 s)
	@PYTHONPATH=tests $(BIN)/python -m cluster.demo up

.PHONY: demo-cluster
demo-cluster: setup ## the whole: three nodes, Kafka, Prometheus, images, helm install (needs root)
	@PYTHONPATH=tests $(BIN)/python -m cluster.demo_cluster

.PHONY: demo-down
demo-down: setup ## take either demo away
	@PYTHONPATH=tests $(BIN)/python -m cluster.demo down
	@PYTHONPATH=tests $(BIN)/python -m cluster down

.PHONY: clean
clean: ## remove what make made in this folder (not the cache outside it)
	rm -rf .venv .tools dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
