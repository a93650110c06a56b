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
MEMBERS := proto runtime operator agent
PROTOS := $(wildcard proto/src/outrider_proto/v1/*.proto)
COMPILE := $(UV) pip compile -q --universal --generate-hashes --no-emit-index-url --no-header -p 3.11 \
	$(foreach m,$(MEMBERS),--no-emit-package outrider-$(m))

.PHONY: help
help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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
