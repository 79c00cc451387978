# `make demo` and `make test` set up .venv from nothing; `make help` lists the rest.
PYTHON ?= python3
# What pip installs as PyTorch. On Linux this brings CUDA along; `make demo TORCH="torch==2.13.0 --index-url
# https://download.pytorch.org/whl/cpu"` does not.
TORCH ?= torch==2.13.0
PHOTO ?=
PRIOR ?= image
# Processes that run the tests, of one thread each: on two cores that takes three fifths of the time of one with two.
JOBS ?= 2

# glibc gives the memory of every step back and takes it anew page by page, which costs a tenth of the time on a CPU.
export MALLOC_TRIM_THRESHOLD_ ?= 1000000000
export MALLOC_MMAP_THRESHOLD_ ?= 33554432

BIN := .venv/bin
# Python compiles what it imports; to compile all that is installed takes as long as installing it.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
NOTEBOOKS := $(wildcard notebooks/*.py)

.PHONY: help demo test lab sync baselines figures train bench benchmark gpu clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

.venv/ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "blindlib needs Python 3.11 or later; name one with make PYTHON=python3.12"; exit 1; }
	@echo "setting up .venv (some minutes, once)"
	@$(PYTHON) -m venv .venv
	@$(PIP) $(TORCH)
	@$(PIP) -r requirements.txt
	@$(PIP) --no-deps -e .
	@touch $@

# Of one's own photograph the truth is not known.
define SCORES
import json
r = json.load(open("runs/demo/figures/00_quickstart.json"))
if "mnc" in r:
    print("{psnr_before:.1f} dB before, {psnr_after:.1f} dB after; kernel MNC {mnc:.2f}".format(**r))
endef
export SCORES

demo: .venv/ready  ## a blurred photograph made sharp (PHOTO=my.jpg for your own)
	@mkdir -p runs/demo
	@start=$$(date +%s); photo="$(PHOTO:~/%=$(HOME)/%)"; [ -z "$$photo" ] || photo=$$(realpath "$$photo") || exit 1; \
	$(BIN)/papermill --cwd runs/demo --log-output --no-progress-bar -p photo "$$photo" \
	    notebooks/00_quickstart.ipynb runs/demo/quickstart.ipynb && \
	$(BIN)/python -c "$$SCORES" && \
	echo "executed notebook: runs/demo/quickstart.ipynb" && \
	echo "before and after:  runs/demo/figures/00_quickstart.png" && \
	echo "sharp photograph:  runs/demo/figures/00_quickstart_sharp.png" && \
	echo "$$(( $$(date +%s) - start )) seconds"

test: .venv/ready  ## lint, tests, every notebook at "ci" against its baseline, pairing, committed outputs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --maxschedchunk 1 tests/test_notebooks.py tests

lab: .venv/ready  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir notebooks

sync: .venv/ready  ## bring .ipynb and .py of each notebook in step, the .py being right
	$(BIN)/jupytext --update --to ipynb $(NOTEBOOKS)

figures: sync  ## execute the notebooks at "cpu", in place: their outputs, pictures and records
	for n in $(NOTEBOOKS:.py=.ipynb); do $(BIN)/papermill --cwd notebooks $$n $$n || exit 1; done
	$(BIN)/python tests/shrink.py $(NOTEBOOKS:.py=.ipynb) figures/*.png

train: .venv/ready  ## train a prior, or go on training it (PRIOR=image, kernel, text, tilt or kernel-denoiser)
	$(BIN)/python -m blindlib.train $(PRIOR)

bench: .venv/ready  ## cost of a sampler step against the bare networks
	$(BIN)/python tests/bench.py

benchmark: .venv/ready  ## every way to a kernel on the same images, into figures/benchmark.json: days on a CPU; resumable
	$(BIN)/python tests/benchmark.py --size 64 128 --noise 5 10 20 --images 8

gpu: .venv/ready  ## execute the notebooks at "gpu", into runs/gpu
	mkdir -p runs/gpu/notebooks runs/gpu/figures
	ln -sfn ../../models runs/gpu/models
	for n in $(notdir $(NOTEBOOKS:.py=.ipynb)); do \
	    $(BIN)/papermill --cwd runs/gpu/notebooks -p preset gpu notebooks/$$n runs/gpu/notebooks/$$n || exit 1; done

baselines: .venv/ready  ## write the notebooks' baselines anew, for a change that means to move them
	BLINDLIB_REBASE=1 $(BIN)/python -m pytest tests/test_notebooks.py -k figures_of_merit

clean:  ## remove what can be made again; .venv and the folder of training runs stay
	rm -rf build *.egg-info .pytest_cache .ruff_cache .hypothesis runs/demo runs/gpu
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
