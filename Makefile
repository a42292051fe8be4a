# The one door: everything is done by `make WORD`. `make` alone says which words there are.
# Works on a Debian 12 with python3 and make; what else is needed, each target brings or names.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup check format test torture soak nightly servers demo bench lock clean

BIN := .venv/bin
RUN := $(BIN)/python
# Any other Python of 3.11 or later:  make setup PYTHON=/usr/bin/python3.12
PYTHON ?=
# How long the demo runs, in seconds.
DEMO_S ?= 60
# More words for pytest:  make test PYTEST="-k buffer -x"
PYTEST ?=

export DEMO_S

help: ## say which words there are
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

setup: .build/setup ## make .venv and install what the lock pins

# A stamp: set up again only where the lock or the project's own description changed, or .venv is gone.
.build/setup: requirements/dev.lock pyproject.toml .ci/setup $(if $(wildcard $(RUN)),,again)
	@PYTHON='$(PYTHON)' .ci/setup
	@mkdir -p .build && touch $@

.PHONY: again
again:

check: setup ## the gate: format, lint, types, imports, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

format: setup ## put the code in the one format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

servers: setup ## bring the real servers that the tests need: found, pulled, installed or built
	$(RUN) -m tests.servers

# A server that cannot be had is named here and fails the tests that need it; the others are run all the same.
test: setup ## every test, against real servers
	-$(RUN) -m tests.servers
	$(RUN) -m pytest --durations=10 $(PYTEST)

# Each proof at full length; what it found goes to docs/reliability/, and the page is made from that.
torture: setup ## every proof of the promise, at full length (hours), and the page of what they found
	-$(RUN) -m tests.servers
	$(RUN) -m tests.torture.run

# Random faults on the whole system, for as long as told:  make soak HOURS=24
HOURS ?= 1
soak: setup ## the whole system under random faults for HOURS, its memory and its account watched
	-$(RUN) -m tests.servers
	$(RUN) -m tests.torture.soak --hours $(HOURS) --record
	$(RUN) -m tests.torture.page

# The sizes that the tests take from the environment, each at its full length. FUZZ=100000 make nightly is a shorter one.
FUZZ ?= 10000000
nightly: setup ## the long runs: fuzzing, faults, replugs and kills at full length, and Bluetooth in a virtual machine
	HEADGATE_FUZZ=$(FUZZ) $(RUN) -m pytest -o timeout=0 tests/test_fuzz_*.py
	HEADGATE_FRAMES=100000 HEADGATE_DEVICES=1500 HEADGATE_REPLUGS=100 HEADGATE_READS=10000 HEADGATE_KILLS=1000 \
		$(RUN) -m pytest -o timeout=0 tests/test_drivers_*.py tests/test_agent_buffer.py
	bash tests/nightly/ble_vm.sh

demo: setup ## the main job, with a kill and a cut on the way, and the account at the end
	@$(RUN) -m tests.demo

bench: setup ## the figures, each beside a raw baseline of the same run
	-$(RUN) -m tests.servers
	$(RUN) -m tests.benchmarks.run

# `make lock UPGRADE=--upgrade` takes the newest versions that pyproject.toml allows.
LOCK = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--no-emit-find-links --no-header --no-annotate $(UPGRADE)

lock: ## pin again what pyproject.toml asks for: hashes, no addresses
	@test -x $(BIN)/uv || $(MAKE) setup
	$(LOCK) --extra dev --output-file requirements/dev.lock pyproject.toml
	$(LOCK) --extra agent --output-file requirements/agent.lock pyproject.toml
	$(LOCK) --extra cloud --output-file requirements/cloud.lock pyproject.toml
	$(LOCK) --output-file requirements/build.lock requirements/build.in
	$(LOCK) --output-file requirements/toolchain.lock requirements/toolchain.in

clean: ## take away .venv and all that was made here; built servers stay in ~/.cache/headgate
	rm -rf .venv .build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
