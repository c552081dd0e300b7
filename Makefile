# make setup     create .venv with pinned versions (does nothing when it is up to date)
# make demo      compile a program of your own kind, run it, check it, time it, draw it
# make test      every test;   make test-triton: the Triton tests under Triton 3.6 and under the newest release
# make test-long the slow comparisons, every library program at 4096 tokens
# make fuzz-grad 100,000 random scores: gradients of the C++ kernels against float64 (hours)
# make fuzz      200,000 random masks: is every tile what the analysis says? (half an hour)
# make lint      style, formatting, types
# make bench     all benchmarks; results go to benchmarks/results/
# make resources compile the library's kernels for GPUs that need not be here, as far as they changed
# make clean     remove what was built (environments stay; `make distclean` removes them too)

PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
TRITON ?= 3.9.0
PYTEST_FLAGS ?=

VENV36  := .venv-triton36
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.attnlang-setup
STAMP36 := $(VENV36)/.attnlang-setup
PIP     := -m pip --disable-pip-version-check install --quiet

.PHONY: setup demo test test-long test-triton lint format bench resources fuzz fuzz-sparsity fuzz-grad clean distclean help
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# //p' Makefile

setup: $(STAMP)
	@:

# A CUDA build of torch asks for one exact triton; then the first command cannot be satisfied and the second takes it.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing attnlang and its tools into $(VENV) (a few minutes the first time)"
	@$(BIN)/python $(PIP) -c constraints.txt -e '.[dev]' 'triton==$(TRITON)' \
	    || $(BIN)/python $(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

$(STAMP36): pyproject.toml constraints.txt
	@test -x $(VENV36)/bin/python || { echo "creating $(VENV36)"; $(PYTHON) -m venv $(VENV36); }
	@grep -v '^numpy==' constraints.txt > $(VENV36)/constraints.txt
	@$(VENV36)/bin/python $(PIP) -c $(VENV36)/constraints.txt -e '.[dev]' 'triton==3.6.0' 'numpy<2.4'
	@touch $@

demo: setup
	@$(BIN)/python examples/demo.py

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_FLAGS)

# Every library program at 4096 tokens against dense float64: too slow for every change.
test-long: setup
	$(BIN)/python -m pytest -n $(JOBS) -m long tests

test-triton: setup $(STAMP36)
	$(BIN)/python -m pytest -m '' -W error::DeprecationWarning tests/triton
	$(VENV36)/bin/python -m pytest -m '' -W error::DeprecationWarning tests/triton

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/cpu_forward.py
	$(BIN)/python benchmarks/cpu_forward.py --dtype bfloat16
	$(BIN)/python benchmarks/cpu_backward.py
	$(BIN)/python benchmarks/first_call.py
	$(BIN)/python benchmarks/sparsity.py
	$(BIN)/python benchmarks/layouts.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/report.py

# registers, spills and shared memory; hours for everything, but it goes on where it was stopped
resources: setup
	$(BIN)/python benchmarks/gpu_resources.py
	$(BIN)/python benchmarks/gpu_backward_resources.py
	$(BIN)/python benchmarks/report.py

# 200,000 random mask programs against brute force: no tile may be called empty or full that is not.
fuzz fuzz-sparsity: setup
	$(BIN)/python tests/sparsity/fuzz.py --jobs $(JOBS)

# A hundred times the random differentiable scores of a test run; ATTNLANG_SEED=N starts at another seed.
fuzz-grad: setup
	ATTNLANG_FUZZ=100 $(BIN)/python -m pytest -n $(JOBS) tests/backward/test_random_scores.py

clean:
	rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(VENV36)
