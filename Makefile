# What there is to do here. `make` alone lists it.

SHELL := /bin/bash
TOOLS := target/tools
PYTHON ?= python3

.PHONY: help build release tools test unit conformance check bench chaos demo clean

help: ## list what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

build: ## a debug build: target/debug/tf
	cargo build

release: ## a release build: target/release/tf
	cargo build --release

tools: $(TOOLS)/.made terraform-there ## what the tests stand on: the loopback cloud, in target/tools

$(TOOLS)/.made: tests/requirements.txt
	@command -v $(PYTHON) >/dev/null || { echo "python3 is missing: the tests run a loopback S3 and DynamoDB written in it. Install Python 3.9 or later (apt install python3 python3-venv)."; exit 1; }
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python3 -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

.PHONY: terraform-there
terraform-there:
	@command -v terraform >/dev/null || { echo "terraform is missing: put Terraform 1.11 or later on PATH (https://developer.hashicorp.com/terraform/install)."; exit 1; }

test: tools ## every test, against real terraform and a real protocol server
	cargo test
	@tests/left-out
