# make demo: set up, train an agent that finds out its controls and one on ProcGen StarPilot, evaluate both on levels
# never seen, write a film and a page to logs/; seven minutes on two slow cores.
# make test: set up, then lint, types and the fast tests; make test-all: every test.

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python3.14; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 15))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations=30

.PHONY: demo test test-heavy test-lowest test-all slow gpu lint types docs wheel lock audit install clean

# The newest run on a task or game.
newest = $$(ls -dt logs/ppo_srwm/$(1)_* | head -1)

demo: $(VENV)/.package
	$(BIN)/srwm-rl train --env hidden_controls -n 600000
	$(BIN)/srwm-rl eval $(call newest,hidden_controls) --train-levels none --baselines --freeze-edits \
		--beside zoo:hidden_controls_feedforward --json logs/hidden_controls.json
	$(BIN)/srwm-rl watch $(call newest,hidden_controls) -o logs/hidden_controls.mp4
	$(BIN)/srwm-rl report $(call newest,hidden_controls) --eval logs/hidden_controls.json \
		--video logs/hidden_controls.mp4 -o logs/hidden_controls.html
	if $(BIN)/srwm-rl train --env-list | grep -q '^procgen: '; then $(BIN)/srwm-rl train --preset demo && \
		$(BIN)/srwm-rl eval $(call newest,starpilot) --baselines; \
	else echo "ProcGen has no wheels for this Python: its part of the demo is left out"; fi

test: lint types
	$(PYTEST) -m "not slow and not heavy"

# What `make test` leaves out: simulated CUDA, torchrun, kills, fuzzing, learning.
test-heavy: install
	$(PYTEST) -m "heavy and not slow"

# Minutes each: long learning runs, fuzzing, repeated kills.
slow: install
	$(BIN)/python -m pytest -m slow --timeout 3600

# The fast tests with the lowest versions that pyproject.toml allows; torch's is not among them unless asked for.
test-lowest: install
	$(BIN)/python requirements/lowest.py build/lowest $(if $(LOWEST_TORCH),--torch)
	build/lowest/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not heavy"

test-all: test test-heavy slow test-lowest

# On a machine with a GPU: its tests, an exact resume, a profile, and every benchmark for docs/results.
gpu: install
	$(BIN)/python -m pytest -m gpu
	$(BIN)/srwm-rl train --env bigfish --device cuda --n-envs 256 -n 131072 --profile --save-freq 16384
	$(BIN)/srwm-rl train --resume $(call newest,bigfish) --verify
	$(BIN)/srwm-rl bench suite --device cuda --out build/gpu

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# srwm_rl/agents, envs and scripts are links to the top-level folders, for type checkers and editors.
types: install
	$(BIN)/mypy -p srwm_rl -p examples

# The documentation site, in build/site.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open build/site/index.html"

# One wheel for this platform and every Python, and the source distribution, in dist/.
wheel: install
	$(BIN)/python requirements/wheel.py dist

# Hashes for the development versions; needs the package index.
lock: install
	$(BIN)/python requirements/lock.py

# Known vulnerabilities among them; fails, too, where the advisories cannot be reached and nothing was audited.
audit: install
	test -x build/audit/bin/pip-audit || { $(PYTHON) -m venv build/audit && build/audit/bin/pip install --quiet pip-audit==2.10.1; }
	$(BIN)/python requirements/audit.py build/audit/bin/pip-audit

install: $(VENV)/.installed

# The package alone, which is what the demo needs; with all that development needs.
$(VENV)/.package: NEEDS := .
$(VENV)/.installed: NEEDS := .[dev]
$(VENV)/.package $(VENV)/.installed: pyproject.toml constraints.txt setup.py $(wildcard srwm_rl/ops/csrc/*)
	@test -n "$(PYTHON)" || { echo "srwm-rl needs Python 3.10 to 3.14; install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt --editable '$(NEEDS)'
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > $(VENV)/compileall.log 2>&1 || true # on all cores, which pip does not
	@touch $(VENV)/.package $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
