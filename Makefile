# The front door: `make demo` shows it, `make test` proves it. Both set everything up in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests share one thread pool of two; benchmarks set their own threads.
export OMP_NUM_THREADS ?= 2

.PHONY: demo test bench study style check fuzz gpu goals report browser clean
.DEFAULT_GOAL := demo

demo: $(VENV)/installed  ## a real DeiT, dense and reduced, on two real photographs
	$(BIN)/tokred bench deit_small_patch16_224 --method tome --r 13

test: $(VENV)/developing  ## every test
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: $(VENV)/developing  ## every benchmark
	$(BIN)/python -m pytest benchmarks

goals: $(VENV)/developing  ## the goals with their gates, measured here
	$(BIN)/python -m benchmarks.report

study: $(VENV)/developing  ## what training does for token reduction, on digits: docs/study.md
	$(BIN)/python -m benchmarks.study

PHOTOGRAPHS := .cache/photographs
report: $(VENV)/developing  ## tokred analyze on photographs that packages ship and on trained models of digits: report/report.html
	$(BIN)/pip install --disable-pip-version-check -q --no-deps 'scikit-image>=0.25,<0.27'
	$(BIN)/python -m benchmarks.photographs $(PHOTOGRAPHS)
	$(BIN)/python -m benchmarks.study_records report
	$(BIN)/tokred analyze $(PHOTOGRAPHS)/scenes $(PHOTOGRAPHS)/textures --model deit_tiny_patch16_224 --model deit_small_patch16_224 -o report

browser: $(VENV)/developing  ## the page of tokred analyze in a headless Chromium
	@{ command -v chromium && command -v chromedriver; } > /dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver; } \
		|| { echo "needs chromium and chromedriver: apt-get install chromium chromium-driver, as root"; exit 1; }
	$(BIN)/pip install --disable-pip-version-check -q selenium==4.51.0
	$(BIN)/python -m pytest tests/test_browser.py

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

gpu:  ## on a machine with an NVIDIA GPU, with what is installed there: build, test, measure; ARGS=--resume goes on
	$(PYTHON) -m benchmarks.gpu $(ARGS)

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
