# The commands of the README. `make setup` is a prerequisite of all and runs once; PYTHON=... chooses the interpreter.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
NATIVE := setup.py CMakeLists.txt pyproject.toml requirements.txt $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
PYTEST := $(RUN) -m pytest
# A worker of one thread for each core and one more, since some tests wait, up to 8: most of the time is spent where one
# process works. Idle workers take tests from busy ones. What a failed test printed is shown, not what the libraries log below a warning.
WORKERS := $(shell $(PYTHON) -c "import os; print(min(8, (os.cpu_count() or 1) + 1))")
SUITE := $(PYTEST) --numprocesses $(WORKERS) --dist worksteal --durations 15 --log-level WARNING

# Nothing is installed for a GPU run: the environment made by `make setup` where there is one, unless PYTHON is given.
GPU_RUN := $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(RUN)),$(PYTHON)),$(PYTHON)) -m benchmarks.gpu
GPU_OUT := $(or $(OUT),benchmarks/results)

.PHONY: help setup quickstart test test-all soak bench bench-check gpu gpu-dry counts structure lint format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(VENV)/.ready-%: $(NATIVE) scripts/setup_env.sh
	PYTHON=$(PYTHON) VENV=$(VENV) scripts/setup_env.sh $*

setup: $(VENV)/.ready-test  ## environment, pinned dependencies, native build

quickstart: $(VENV)/.ready-quickstart  ## pre-train vision-tiny on real photographs, evaluate it, draw the picture
	$(RUN) scripts/quickstart.py

test: setup  ## every test this machine can run, on every core: less than half an hour on two
	$(SUITE) -m "not long and not soak and not large"

test-all: setup  ## the long tests too
	$(SUITE) -m "not soak"

soak: setup  ## endurance: kills, broken disks, lost ranks, cut links; goes on where it was stopped, ends with a table
	$(RUN) scripts/soak.py

bench: setup  ## kernels, host, instructions, errors, training steps, growth; ends with one table and plots, about an hour
	$(RUN) -m benchmarks.operators
	$(PYTEST) benchmarks/host.py --benchmark-columns=min,median,stddev --benchmark-sort=name -q
	$(RUN) -m benchmarks.host
	$(RUN) -m benchmarks.errors
	$(RUN) -m benchmarks.step
	$(RUN) -m benchmarks.growth
	$(RUN) -m benchmarks.summary

bench-check: setup  ## compare ratios of kernels and steps, and instruction counts, with the stored ones
	$(RUN) -m benchmarks.check
	$(RUN) -m benchmarks.host

gpu:  ## with an NVIDIA GPU: build in place, GPU tests, sanitizer, benchmarks, report; under 9 minutes, installs nothing
	$(GPU_RUN) --output $(GPU_OUT)

gpu-dry:  ## every stage of `make gpu` without a GPU, on tiny shapes; its records are marked emulated
	$(GPU_RUN) --output $(GPU_OUT) --dry

counts: setup  ## machine code of every kernel: instructions a KiB against what a GPU issues; table of docs/gpu-first-run.md
	PYTHONPATH=tests:. $(RUN) -m codegen.issue --write

structure:  ## size of each package, its largest folder, its import circles
	$(PYTHON) scripts/structure.py

lint: setup  ## ruff, mypy, clang-format
	$(PYTEST) tests/test_style.py

format: setup  ## rewrite the sources in the project's style
	$(RUN) -m ruff check --fix . && $(RUN) -m ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(VENV)/bin/clang-format -i

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info d2v_kernels/lib
