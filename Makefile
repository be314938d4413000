# make demo, make test, make slow, make check, make trials: each makes .venv when it is missing or out of date. Needs Python 3.11+ and make.
#   PYTHON=<command>        another interpreter than the first of these that is Python 3.11 or newer
#   TORCH_INDEX=<address>   an extra package index to take torch from, such as PyTorch's own index of CPU builds
NEW_ENOUGH := import sys; sys.version_info >= (3, 11) or sys.exit(1)
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$p && break; done)
TORCH_INDEX ?=
BIN := .venv/bin
STAMP := .venv/.installed
OFFLINE := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

.PHONY: install demo test slow check trials picture
install: $(STAMP)

# torch goes first and alone, so that the build chosen here is the one every later package is resolved against.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer was found; install one, or name it: make PYTHON=<command>" >&2; exit 2; }
	@echo "installing into .venv, two or three minutes the first time"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/soundstage generate "a small red metal ball bounces three times" --model tiny-4step -o outputs/ball.mp4 --sheet

# The picture of the README.
picture: demo
	cp outputs/ball.png docs/images/ball.png

# One thread a process, one process a core; a file's tests stay together.
PYTEST := $(OFFLINE) $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(STAMP)
	$(PYTEST)

# What takes longer: sharded runs of four processes, compilers, kills, benchmarks.
slow: $(STAMP)
	$(PYTEST) -m "slow and not gpu and not weights"

# Students and deliberate defects of every distillation method, about half an hour on one core.
trials: $(STAMP)
	$(OFFLINE) $(BIN)/python -m pytest -m trial

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(PYTEST)
