# What a person does with this repository, one target each; `make` alone lists them.
# Every target that runs Python makes .venv first when it is missing, and brings it up to date when the pins change.
# pip reads its own settings (PIP_INDEX_URL, PIP_FIND_LINKS, pip.conf), so mirrors and wheel folders need no change here.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
BENCH_OUT := build/bench
WORKERS ?= 2

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help venv quickstart retrofit test test-fast lint bench clean missing

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r target what; do \
		printf '%-18s %s\n' "$$target" "$$what"; done
	@echo "  PYTHON=python3.12 picks the interpreter that makes .venv (3.11 to 3.13)"

venv: $(STAMP) ## make .venv and install the package in it, editable, with the pinned versions

# A .venv whose interpreter is gone, or is none of 3.11 to 3.13, is made anew.
$(STAMP): setup.py pyproject.toml constraints.txt $(shell [ -x $(PY) ] || echo missing)
	@$(PY) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
		command -v "$(PYTHON)" >/dev/null || { \
			echo "error: $(PYTHON) is not found; name a Python 3.11 to 3.13: make PYTHON=python3.12 ..." >&2; exit 2; }; \
		"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
			echo "error: $(PYTHON) is $$("$(PYTHON)" --version 2>&1); megatron.dmc needs Python 3.11 to 3.13:" \
				"make PYTHON=python3.12 ..." >&2; exit 2; }; \
		"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
			echo "error: $(PYTHON) has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 2; }; \
		echo "making $(VENV) with $$("$(PYTHON)" --version)"; \
		"$(PYTHON)" -m venv --clear $(VENV); \
	}
	$(PY) -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(STAMP) ## chat with a model whose cache is compressed: numbers, heat map, text (3 minutes on two cores)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" examples/dmc/quickstart.sh

retrofit: $(STAMP) ## teach a small Llama to compress its cache, start to end (at most 15 minutes on two cores)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" examples/dmc/retrofit.sh

test: $(STAMP) ## all tests, two files at a time; WORKERS=1 for one
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 25

test-fast: $(STAMP) ## the tests that take seconds
	$(PY) -m pytest -m "not slow" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(STAMP) ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: $(STAMP) ## the benchmarks; figures go to build/bench/*.json
	mkdir -p $(BENCH_OUT)
	$(PY) benchmarks/train_attention.py --json $(BENCH_OUT)/train_attention.json
	$(PY) benchmarks/train_step.py --json $(BENCH_OUT)/train_step.json
	$(PY) benchmarks/frozen_base.py --json $(BENCH_OUT)/frozen_base.json
	$(PY) benchmarks/convert.py --json $(BENCH_OUT)/convert.json
	$(PY) benchmarks/checkpoint.py --json $(BENCH_OUT)/checkpoint.json
	$(PY) benchmarks/decode_attention.py --json $(BENCH_OUT)/decode_attention.json
	$(PY) benchmarks/prefill_attention.py --json $(BENCH_OUT)/prefill_attention.json
	$(PY) benchmarks/engine.py --json $(BENCH_OUT)/engine.json
	$(PY) benchmarks/serving.py --json $(BENCH_OUT)/serving.json

clean: ## remove .venv, build/ and caches; nothing else
	rm -rf $(VENV) build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . \( -path ./.git -o -path ./runs \) -prune -o -type d -name __pycache__ -exec rm -rf {} +
