# make run       set up, build, and compare stock and accelerated SHViT on a photograph (IMAGE=, CHECKPOINT=)
# make test      set up, build, and run the whole test suite
# make sanitize  build the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer, then with
#                ThreadSanitizer, and run the operators' tests on both
# make lint      check style; make format repairs it
# make bench     measure the operator, the layer and the models
# make gpu       on a machine with a GPU, with the Python and the packages that are there: build, test and measure the
#                GPU kernels within BUDGET seconds, results in OUT; make gpu-full without a limit, and with all tests
# make clean     remove the environment and everything built

PYTHON ?= python3
BUDGET ?= 480
OUT ?= gpu-results

VENV := .venv
BIN := $(VENV)/bin
SET_UP := $(VENV)/.requirements-installed
BUILT := $(VENV)/.library-built
SOURCES := $(shell find csrc)
CPP := $(filter %.cpp %.h %.cu %.cuh,$(SOURCES) $(shell find tests/cuda_host))
export IMAGE CHECKPOINT

run: $(BUILT)
	$(BIN)/python -m shvit_kernels demo $(if $(IMAGE),--image "$$IMAGE") $(if $(CHECKPOINT),--checkpoint "$$CHECKPOINT")

# One process per core, at most 8, each with one thread.
test: $(BUILT)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8

sanitize: $(SET_UP)
	$(BIN)/python -m tests.support.sanitize

bench: $(BUILT)
	$(BIN)/python -m shvit_kernels bench

gpu:
	$(PYTHON) -m benchmarks.gpu --budget $(BUDGET) --out $(OUT)

gpu-full:
	$(PYTHON) -m benchmarks.gpu --out $(OUT)

lint: $(SET_UP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CPP),$(BIN)/clang-format --dry-run -Werror $(CPP))

format: $(SET_UP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CPP),$(BIN)/clang-format -i $(CPP))

clean:
	rm -rf $(VENV) build demo shvit_kernels/*.so *.egg-info

$(SET_UP): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make needs Python 3.11 or newer, and $(PYTHON) is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint requirements.txt torch
	$(BIN)/python -m pip install --no-deps --requirement requirements.txt
	touch $@

# shvit_kernels is installed in place: only a change of the C++ sources or of the packaging builds it again.
$(BUILT): $(SET_UP) pyproject.toml setup.py $(SOURCES)
	$(BIN)/python -m pip install --no-build-isolation --no-deps --editable .
	touch $@

.PHONY: run test sanitize bench gpu gpu-full lint format clean
