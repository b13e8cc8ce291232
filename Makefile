# Every target does its own set-up, once: a virtual environment in $(VENV) with the versions of
# constraints.txt. It needs Python 3.11 or later, pip and make. `make gpu` alone installs nothing: it
# uses the torch, triton and pytest of $(PYTHON).

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
SHARDS ?= 4
PYTEST_ARGS ?=

export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

PY := $(abspath $(VENV))/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install -qq --no-compile
CONSTRAINTS := $(VENV)/constraints.txt
BASE := $(VENV)/.base
READY := $(VENV)/.ready
TORCH := $(shell grep '^torch==' constraints.txt)
PYTEST := $(PY) -m pytest -n $(JOBS) --dist worksteal

.PHONY: help demo test test-all test-browser lint docs bench gpu clean

help:
	@echo "make demo      the two examples on real input: sentences and a photograph"
	@echo "make test      the tests that are not slow"
	@echo "make test-all  every test, in $(SHARDS) shards; SHARD=i/n runs one of them"
	@echo "make test-browser  the HTML report in a headless Chromium"
	@echo "make lint      ruff and mypy"
	@echo "make docs      docs/api.md and docs/limits.md, from docstrings and measurements"
	@echo "make bench     the benchmark suites on this machine's CPU"
	@echo "make gpu       tests, calibration and suite for a GPU in 9 minutes, $(PYTHON) as it is"

# torch comes first and alone, as one exact version, so that nothing below can pull in another build
# of it. A torch that was built for CUDA has then brought its own triton, which must stay.
# Debian's Python without python3-venv makes an environment but puts no pip into it.
$(BASE): pyproject.toml setup.py constraints.txt
	@echo "Setting up $(VENV) (once, a minute or two)"
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	  v >= (3, 11) or sys.exit(f"Python must be 3.11 or later, got {v[0]}.{v[1]}")'
	@$(PYTHON) -m venv $(VENV) >/dev/null || { $(PYTHON) -m venv --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(PY) install --quiet pip; }
	$(PIP) $(TORCH)
	@if $(PY) -m pip show --quiet triton 2>/dev/null; then grep -v '^triton==' constraints.txt; \
	  else cat constraints.txt; fi > $(CONSTRAINTS)
	$(PIP) -c $(CONSTRAINTS) setuptools
	$(PIP) -c $(CONSTRAINTS) --no-build-isolation --editable '.[demo]'
	@touch $@

$(READY): $(BASE)
	$(PIP) -c $(CONSTRAINTS) --no-build-isolation --editable '.[dev,models,report,onnx]'
	@touch $@

demo: $(BASE)
	$(PY) examples/semantic_search.py
	$(PY) examples/denoise_photo.py

test: $(READY)
	$(PYTEST) -m 'not slow and not browser' $(PYTEST_ARGS)

test-all: $(READY)
ifdef SHARD
	$(PYTEST) --shard $(SHARD) $(PYTEST_ARGS)
else
	@failed=0; for i in $$(seq $(SHARDS)); do \
	  echo "shard $$i/$(SHARDS)"; $(PYTEST) --shard $$i/$(SHARDS) $(PYTEST_ARGS) || failed=1; \
	done; exit $$failed
endif

# Root can install Debian's Chromium; anybody else is told what is missing, and the tests skip.
test-browser: $(READY)
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  { timeout 50 apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 100 \
	    apt-get install -y -qq --no-install-recommends chromium chromium-driver; } >/dev/null 2>&1; \
	} || echo "no browser: install the packages chromium and chromium-driver; its tests are skipped"
	$(PY) -m pytest tests/browser -m browser -p no:xdist $(PYTEST_ARGS)

# mypy cannot follow attnopt.passes to passes/ in a checkout, so it reads an installed copy.
lint: $(READY)
	$(PY) -m ruff check .
	@rm -rf build $(VENV)/installed
	$(PIP) --no-deps --no-build-isolation --target $(VENV)/installed .
	@rm -rf build
	cd $(VENV)/installed && $(PY) -m mypy --config-file $(CURDIR)/pyproject.toml -p attnopt

docs: $(READY)
	$(PY) -m docs.generate

bench: $(READY)
	$(PY) -m attnopt bench

# Correctness, calibration and the suite gpu, each with its share of nine minutes. SIGINT lets the
# suite store the rows that it has. Only files with such tests are collected: the others take a
# minute, and need packages that $(PYTHON) may not have.
gpu:
	@failed=0; \
	timeout 190 $(PYTHON) -m pytest $$(grep -rl --include='test_*.py' 'mark\.gpu' tests) -m gpu \
	  $(PYTEST_ARGS) || failed=1; \
	timeout 50 $(PYTHON) -m attnopt calibrate --device gpu || failed=1; \
	timeout --signal INT --kill-after 10 280 \
	  $(PYTHON) -m attnopt bench --suite gpu --budget 250 || failed=1; \
	exit $$failed

clean:
	rm -rf $(VENV) build examples/output *.egg-info
