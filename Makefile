# make demo: set up, train on ProcGen CoinRun for some minutes, evaluate on levels never seen.
# make test: set up, then lint, types and tests.

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
TYPES := build/types

.PHONY: demo test lint types slow lock audit install clean

demo: install
	$(BIN)/srwm-rl train --preset demo
	$(BIN)/srwm-rl eval --random "$$(ls -dt logs/ppo_srwm/coinrun_* | head -1)"

test: lint types
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The rooms agents/, envs/ and scripts/ are srwm_rl.agents and so on when installed; mypy gets them as one tree.
types: install
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/srwm_rl
	@ln -s $(CURDIR)/srwm_rl/* $(CURDIR)/agents $(CURDIR)/envs $(CURDIR)/scripts $(TYPES)/srwm_rl/
	MYPYPATH=$(TYPES) $(BIN)/mypy -p srwm_rl

slow: install
	$(BIN)/python -m pytest -m slow --timeout 3600

# Hashes for the development versions; needs the package index.
lock: install
	$(BIN)/python requirements/lock.py

# Known vulnerabilities among them; fails, too, where the advisories cannot be reached and nothing was audited.
audit: install
	test -x build/audit/bin/pip-audit || { $(PYTHON) -m venv build/audit && build/audit/bin/pip install --quiet pip-audit==2.10.1; }
	$(BIN)/python requirements/audit.py build/audit/bin/pip-audit

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt setup.py $(wildcard srwm_rl/ops/csrc/*)
	@test -n "$(PYTHON)" || { echo "srwm-rl needs Python 3.10, 3.11 or 3.12; install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[procgen,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
