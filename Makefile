# On a fresh machine, `make smoke` trains and `make test` runs the tests. Both set everything up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)
# Without these options Accelerate warns about each default that it uses.
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: setup smoke circle arc gate30 variants test test-slow test-gpu test-cloud test-realdata test-floor soak \
	bench bench-kernels bench-gpu docs lint clean

setup: $(VENV)/.installed $(VENV)/.ffcv

$(VENV)/.pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; PYTHON=/path/to/it chooses one")'
	@# Debian and Ubuntu ship venv in a package of its own
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { $(SUDO) apt-get update -q && $(SUDO) apt-get install -qy python3-venv; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	@touch $@

$(VENV)/.installed: $(VENV)/.pip pyproject.toml
	@echo "installing torch and the rest (some minutes and 5 GB the first time)"
	@# -qq: setuptools prints a page of warnings about every editable install
	$(BIN)/pip install -qq -e '.[dev]'
	@touch $@

# FFCV builds against OpenCV and libturbojpeg (whose package Debian and Ubuntu name differently). Where it cannot be
# built, the resident loader is used; after `rm .venv/.ffcv` the next set-up tries again.
APT := $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get
$(VENV)/.ffcv: $(VENV)/.installed
	@echo "installing FFCV (log: $(VENV)/ffcv.log)"
	@{ $(BIN)/python -c 'import ffcv.loader' || { \
	     { pkg-config --exists opencv4 libturbojpeg || { $(APT) update -q && \
	       $(APT) install -qy --no-install-recommends build-essential python3-dev pkg-config libopencv-dev && \
	       { $(APT) install -qy libturbojpeg0-dev || $(APT) install -qy libturbojpeg-dev; }; }; } && \
	     $(BIN)/pip install -e '.[ffcv]' && $(BIN)/python -c 'import ffcv.loader'; }; } \
	   < /dev/null > $(VENV)/ffcv.log 2>&1 \
	 || echo "FFCV could not be installed: the resident loader takes over"
	@touch $@

smoke: setup
	$(LAUNCH) engine/train.py

# Digits turned by any angle: trains, measures the plane of the rotation, and draws it; under three minutes on two cores.
circle: setup
	$(LAUNCH) engine/train.py configs/circle.yaml
	$(LAUNCH) engine/evaluate.py runs/circle eval.subspace=true

# Programs on grids: trains, and fails unless the gate passes; three minutes on two cores.
arc: setup
	$(LAUNCH) engine/train.py configs/data/arc_programs.yaml configs/tier/arc_smoke.yaml gates.enforce=true

# Thirty epochs of CIFAR-100, then frozen probes; needs a GPU. DATA is a folder of CIFAR-100.
gate30: setup
	$(LAUNCH) engine/train.py configs/data/cifar100_aug.yaml configs/tier/gate30.yaml configs/variant/baseline.yaml \
	  data.root=$(DATA) run.name=gate30 run.resume=auto
	$(LAUNCH) engine/evaluate.py runs/gate30

# Every variant and its controls, and a table of them; finished runs are skipped. DATA is a folder of CIFAR-10.
TIER := quick
variants: setup
	$(BIN)/python bench/variants.py $(TIER) --data $(DATA) $(if $(filter lite,$(TIER)),--seeds 42 0 1)
	$(BIN)/seqjepa compare runs/variants/$(TIER)/* --against exp_a_ema_rate --out runs/variants/$(TIER).md

# One worker for each of two cores; the tests of a file stay together and share their fixtures, in conftest's order.
test: setup
	$(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder

test-slow: setup
	$(BIN)/pytest -m slow

test-gpu: setup
	$(BIN)/pytest -m gpu

# The long fault tests; RELIABILITY.md has the results of the last run.
soak: setup
	@# root can start a SLURM; where none can be installed its tests are skipped
	@command -v slurmctld > /dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get > /dev/null || \
	  { $(APT) update -q && $(APT) install -qy --no-install-recommends slurmctld slurmd slurm-client munge; } || true
	$(BIN)/pytest -m soak -v --durations=0

test-realdata: setup
	$(BIN)/pytest -m 'realdata and not slow'

# What rents machines and keeps results, with SkyPilot's, dstack's and Vast's own code and a server that answers as S3
# does: in an environment of their own, which has no torch. No account and no network.
test-cloud: setup $(VENV)-cloud/.installed
	$(BIN)/pytest -n 2 -m cloud

$(VENV)-cloud/.installed: Makefile
	$(PYTHON) -m venv $(VENV)-cloud
	@echo "installing SkyPilot, dstack, vastai and moto (1 GB)"
	$(VENV)-cloud/bin/pip install -qq 'skypilot[vast,runpod]==0.14.1' dstack==0.22.5 vastai==1.9.1 'moto[server]==5.2.5'
	@touch $@

# The oldest Python, torch and triton that pyproject.toml allows; triton 3.6's interpreter fails with NumPy 2.4.
FLOOR_PYTHON := $(shell command -v python3.11 || echo $(PYTHON))
test-floor: $(VENV)-floor/.installed
	$(VENV)-floor/bin/pytest -n 2 --dist loadscope --no-loadscope-reorder

$(VENV)-floor/.installed: pyproject.toml
	$(FLOOR_PYTHON) -m venv $(VENV)-floor
	$(VENV)-floor/bin/pip install --quiet --upgrade pip
	@echo "installing torch 2.11 and the rest"
	$(VENV)-floor/bin/pip install -qq 'torch==2.11.*' 'torchvision==0.26.*' 'triton==3.6.*' 'numpy<2.4' -e '.[dev]'
	@touch $@

# The training step, loaders and kernels, each beside what it replaces: under five minutes on two cores.
bench: setup
	$(BIN)/pytest bench

# Every kernel at every shape: prints a table, and writes a CSV to bench/history.
bench-kernels: setup
	$(BIN)/python bench/kernel_table.py

# Everything to measure on a GPU: where a step's time goes, the step in each mode beside the peer, loaders, kernels, figures.
bench-gpu: setup
	$(BIN)/python bench/report.py run.compile=graph
	$(BIN)/python bench/report.py --task cifar10_rot run.compile=graph
	$(BIN)/pytest bench
	$(BIN)/python bench/kernel_table.py --repetitions 20
	$(BIN)/python bench/draw.py

# The site of the documentation, in site/; runs the notebook. A dead link fails it.
docs: $(VENV)/.docs
	$(BIN)/python docs/build.py

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install -qq -e '.[docs]'
	@touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

clean:
	rm -rf $(VENV) $(VENV)-floor $(VENV)-cloud runs site
