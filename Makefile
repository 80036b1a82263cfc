# Every command sets up what it needs first; `make setup` alone only does that.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# torchrun by its module: where an installed torch is kept, its script lies elsewhere.
TORCHRUN := $(BIN)/python -m torch.distributed.run
# A looser request than == makes pip fetch the newest CUDA build where no torch is installed.
TORCH  := torch==2.13.0
# Where an installed torch that fits lies; it is kept, together with the GPU it was built for.
KEPT_TORCH = $(shell $(PYTHON) -c 'import pathlib, torch; v = tuple(map(int, torch.__version__.split(".")[:2])); print(pathlib.Path(torch.__file__).parents[1] if (2, 11) <= v <= (2, 13) else "")' 2>/dev/null)

.PHONY: setup dev train recipe test bench gpu tune lint clean

setup: $(VENV)/.ready
dev: $(VENV)/.ready-dev

$(VENV)/.ready: requirements.txt setup.py Makefile
	$(PYTHON) -m venv --clear $(VENV)
	$(if $(KEPT_TORCH),echo '$(KEPT_TORCH)' > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth")
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(KEPT_TORCH),,$(TORCH)) -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	$(BIN)/python csrc/build.py
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

train: setup
	$(TORCHRUN) train/main.py --stage 2

# The three stages, each from the last one's model.
recipe: setup
	@test ! -e out/recipe || { echo "error: out/recipe holds a run already; remove or rename it"; exit 2; }
	$(TORCHRUN) train/main.py --stage 1 --output out/recipe/stage-1
	$(TORCHRUN) train/main.py --stage 2 --max-steps 1600 --checkpoint out/recipe/stage-1/model --output out/recipe/stage-2
	$(TORCHRUN) train/main.py --stage 3 --checkpoint out/recipe/stage-2/model --output out/recipe/stage-3

test: dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

bench: dev
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.run

# On a machine with a GPU: its own torch, no installs, no network, under 8 minutes where kernels are compiled.
# PART="tests kernels": only these, for longer; SECONDS=300: the time limit of each.
gpu:
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu $(if $(SECONDS),--seconds $(SECONDS)) $(PART)

# On the GPU at hand: the fastest tile sizes of each kernel into triton_kernels/tuned.json.
tune:
	PYTHONPATH=. $(PYTHON) -m benchmarks.tune

lint: dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) build *.egg-info
