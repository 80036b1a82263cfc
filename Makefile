# Every command sets up what it needs first; `make setup`, or bare `make`, only does that. `make help` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# torchrun by its module: where an installed torch is kept, its script lies elsewhere.
TORCHRUN := $(BIN)/python -m torch.distributed.run
# A looser request than == makes pip fetch the newest CUDA build where no torch is installed.
TORCH  := torch==2.13.0
# Where an installed torch that fits lies; it is kept, together with the GPU it was built for.
KEPT_TORCH = $(shell $(PYTHON) -c 'import pathlib, torch; v = tuple(map(int, torch.__version__.split(".")[:2])); print(pathlib.Path(torch.__file__).parents[1] if (2, 11) <= v <= (2, 13) else "")' 2>/dev/null)

.PHONY: setup help dev train recipe test test-package bench gpu tune lint clean

setup: $(VENV)/.installed  ## a virtual environment in .venv with phi4rv in it, csrc/ built where nvcc is (default)
dev: $(VENV)/.ready-dev  ## as setup, and what the tests, the benchmarks and the linters need

help:  ## this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

$(VENV)/.ready: requirements.txt Makefile
	$(PYTHON) -m venv --clear $(VENV)
	$(if $(KEPT_TORCH),echo '$(KEPT_TORCH)' > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth")
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(KEPT_TORCH),,$(TORCH)) -r requirements.txt
	touch $@

$(VENV)/.installed: $(VENV)/.ready setup.py pyproject.toml phi4rv/__init__.py csrc/build.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	$(BIN)/python csrc/build.py
	touch $@

$(VENV)/.ready-dev: $(VENV)/.installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

train: setup  ## draws pictures with questions, trains a tiny model on them, measures it
	$(TORCHRUN) train/main.py --stage 2

recipe: setup  ## the three stages, each from the last one's model
	@test ! -e out/recipe || { echo "error: out/recipe holds a run already; remove or rename it"; exit 2; }
	$(TORCHRUN) train/main.py --stage 1 --output out/recipe/stage-1
	$(TORCHRUN) train/main.py --stage 2 --max-steps 1600 --checkpoint out/recipe/stage-1/model --output out/recipe/stage-2
	$(TORCHRUN) train/main.py --stage 3 --checkpoint out/recipe/stage-2/model --output out/recipe/stage-3

test: dev  ## all tests that need no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

# In environments of its own, with downloads; the wheel with the kernels only where nvcc is.
test-package: dev  ## builds the sdist and the wheels, installs and tries each (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m packaging -o faulthandler_timeout=3600 tests/packaging

bench: dev  ## all benchmarks; without a GPU they only show that they run
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.run

# On a machine with a GPU: its own torch, no installs, no network, under 8 minutes where kernels are compiled.
# PART="tests kernels": only these, for longer; SECONDS=300: the time limit of each.
gpu:  ## on a machine with a GPU: its tests and benchmarks, under 8 minutes
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu $(if $(SECONDS),--seconds $(SECONDS)) $(PART)

tune:  ## on the GPU at hand: the fastest tile sizes into triton_kernels/tuned.json
	PYTHONPATH=. $(PYTHON) -m benchmarks.tune

lint: dev  ## ruff and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

clean:  ## removes .venv and all that was built
	rm -rf $(VENV) build dist *.egg-info phi4rv/lib
