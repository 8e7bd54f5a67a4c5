# The front door: `make demo` shows it, `make test` proves it. Both set everything up in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests share one thread pool of two; benchmarks set their own threads.
export OMP_NUM_THREADS ?= 2

.PHONY: demo test bench style check fuzz gpu report clean
.DEFAULT_GOAL := demo

demo: $(VENV)/installed  ## a real DeiT, dense and reduced, on two real photographs
	$(BIN)/tokred bench deit_small_patch16_224 --method tome --r 13

test: $(VENV)/developing  ## every test
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: $(VENV)/developing  ## every benchmark
	$(BIN)/python -m pytest benchmarks

report: $(VENV)/developing  ## the goals with their gates, measured here
	$(BIN)/python -m benchmarks.report

fuzz: $(VENV)/developing  ## 100,000 random cases against the float64 oracle
	$(BIN)/python -m tests.fuzz --cases 100000

style: $(VENV)/developing  ## format and lint in place
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

check: $(VENV)/developing  ## what style would change, as an error
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

gpu:  ## on a machine with an NVIDIA GPU, with what is installed there: build, test, measure
	$(PYTHON) -m benchmarks.gpu

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "tokred_kernels needs Python >= 3.10 ($(PYTHON) is older)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no venv module: apt-get install python3-venv"; exit 1; }

$(VENV)/dependencies: requirements.txt | $(VENV)/bin/python
	$(BIN)/pip install --disable-pip-version-check -q -r requirements.txt
	@touch $@

SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.* build_backend/*)
$(VENV)/installed: $(VENV)/dependencies $(SOURCES)
	$(BIN)/pip install --disable-pip-version-check -q --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/developing: requirements-dev.txt $(VENV)/installed
	$(BIN)/pip install --disable-pip-version-check -q -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV) build dist .cache *.egg-info tokred_kernels/*.so
