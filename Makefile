# make setup | quickstart | check | test | fuzz | resume | slurm | clients | libero | simpler | lowest | mutants | docs | browser | lab | smoke | figures | speed | format | hook | clean
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:

PYTHON ?= python3
BIN := .venv/bin
EXTRAS := train,notebook,metaworld,dev
# Two torch threads on a busy two-core machine are slower than one; a GPU machine does not notice.
export OMP_NUM_THREADS ?= 1
export MUJOCO_GL ?= $(if $(filter Darwin,$(shell uname)),cgl,egl)
export PATH := $(CURDIR)/$(BIN):$(PATH)

RUNS := experiments/runs
MODEL := $(RUNS)/models/tiny_qwen2_5_vl
DATA := $(RUNS)/data/metaworld_quickstart
CONFIG := experiments/configs/quickstart.yaml
TASKS := drawer-open-v3 button-press-topdown-v3 window-open-v3 door-open-v3
OVERRIDES ?=
EPISODES ?= 25
WORKERS ?= 2
SINCE ?= main
PACKAGE ?= evaluation
MODULE ?=
SAMPLE ?= 0
SEED ?= 0
AGAIN ?=

.PHONY: setup system quickstart check test fuzz resume slurm clients libero simpler lowest mutants docs browser smoke figures speed format hook lab clean
setup: $(BIN)/.ready system

$(BIN)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vla_bench[train] needs Python 3.11 or newer: make setup PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

system: ; @.ci/system-libraries

$(MODEL)/config.json: | setup
	python -m vla_bench.models.backbones.tiny qwen2_5_vl --out $(MODEL)

$(DATA)/meta/info.json: | setup
	python -m vla_bench.benchmarks.metaworld record --tasks $(TASKS) --episodes $(EPISODES) --out $(DATA)

quickstart: setup $(MODEL)/config.json $(DATA)/meta/info.json
	mkdir -p $(RUNS)/quickstart
	papermill experiments/train.ipynb $(RUNS)/quickstart/train.ipynb -p config $(CONFIG) -p overrides '$(OVERRIDES)' --log-output --no-progress-bar
	papermill experiments/evaluate.ipynb $(RUNS)/quickstart/evaluate.ipynb -p config $(RUNS)/quickstart --log-output --no-progress-bar
	python -m vla_bench.evaluation.report $(RUNS)/quickstart

# Two minutes, for everyday work: lint, the repository's checks, one notebook per folder, what changed since main.
check: setup
	ruff check .
	ruff format -q --check nbs experiments figures tests docs .ci
	python .ci/check $(SINCE)

# Everything, on two processes; each runs its notebooks in copies of one that has imported torch.
test: setup
	ruff check .
	pytest -n $(WORKERS) --dist worksteal --durations=10

# The property tests whole, of which `make test` runs a sample: every damaged run, dataset and conversation, every drawn case.
fuzz: setup
	VLA_BENCH_ALL_DAMAGES=1 VLA_BENCH_CASES=500 pytest -n $(WORKERS) --dist worksteal $$(grep -rlE 'VLA_BENCH_(ALL_DAMAGES|CASES)' tests --include='test_*.py')

# The public openpi-client and vla-eval, unmodified, each in an environment of its own, through whole episodes of MetaWorld
# with a served checkpoint: every executed action must be that of an evaluation in one process. RUN=FOLDER names the run.
# --clear, since an environment laid over that of another Python keeps the other's program and has no ssl.
CLIENTS ?= $(HOME)/.cache/vla_bench/clients
RUN ?= $(RUNS)/smoke
CLIENT_NEEDS := metaworld==3.1.1 mujoco==3.3.0 scipy omegaconf pyyaml pillow tqdm filelock packaging 'fastcore>=2.2.39,<3'
clients: setup $(CLIENTS)/.ready
	test -d $(RUN)/checkpoints || $(MAKE) smoke
	.ci/clients $(RUN) --openpi $(CLIENTS)/openpi/bin/python --vla_eval $(CLIENTS)/vla_eval/bin/python

$(CLIENTS)/.ready: Makefile
	$(PYTHON) -m venv --clear $(CLIENTS)/openpi
	$(PYTHON) -m venv --clear $(CLIENTS)/vla_eval
	$(CLIENTS)/openpi/bin/python -m pip install --disable-pip-version-check -q uv
	$(CLIENTS)/openpi/bin/uv pip install -q --python $(CLIENTS)/openpi/bin/python openpi-client==0.1.2 typing_extensions 'numpy<2' $(CLIENT_NEEDS)
	$(CLIENTS)/openpi/bin/uv pip install -q --python $(CLIENTS)/vla_eval/bin/python vla-eval==0.8.0 $(CLIENT_NEEDS)
	touch $@

# LIBERO beside MetaWorld: an environment that sees this one's packages, the official assets (0.2 GB, by their commit; another
# folder by VLA_BENCH_LIBERO_ASSETS), and every test that needs them: about twenty minutes.
LIBERO ?= $(HOME)/.cache/vla_bench/libero
LIBERO_NEEDS := hf-libero==0.1.4 robosuite==1.4.0 bddl==1.0.1 numba==0.68.1 llvmlite==0.50.0
LIBERO_NEEDS += opencv-python-headless==5.0.0.93 easydict==1.14 future==1.0.0 termcolor==3.3.0
export VLA_BENCH_LIBERO_ASSETS ?= $(if $(filter libero,$(MAKECMDGOALS)),$(LIBERO)/assets)
libero: setup
	test -x $(LIBERO)/bin/python || $(BIN)/python -m venv $(LIBERO)
	$(BIN)/python -c 'import numpy, pathlib; print(pathlib.Path(numpy.__file__).parents[1])' > "$$(echo $(LIBERO)/lib/python*/site-packages)/dev.pth"
	$(LIBERO)/bin/python -m pip install --disable-pip-version-check -q --no-deps $(LIBERO_NEEDS)
	test -d "$$VLA_BENCH_LIBERO_ASSETS" || python -m vla_bench.benchmarks.libero_files --out "$$VLA_BENCH_LIBERO_ASSETS"
	VLA_BENCH_LIBERO_STATES=$${VLA_BENCH_LIBERO_STATES:-10} $(LIBERO)/bin/python -m pytest -s tests/benchmarks/test_libero*.py

# ManiSkill and SimplerEnv beside all else: an environment with NumPy 1 that sees this one's other packages, a software Vulkan
# where there is no GPU, the official assets (or a folder named by VLA_BENCH_MANISKILL_ASSETS), and every test that needs them.
SIMPLER ?= $(HOME)/.cache/vla_bench/simpler
SIMPLER_NEEDS := mani-skill==3.0.1 sapien==3.0.3 mplib==0.1.1 numpy==1.26.4 opencv-python-headless==4.11.0.86 'setuptools<81'
SIMPLER_NEEDS += arm_pytorch_utilities==0.5.0 dacite==1.9.2 docstring_parser==0.18.0 importlib_resources==7.1.0 lxml==6.1.3
SIMPLER_NEEDS += nvidia-ml-py==13.615.71 pytorch-kinematics==0.7.6 pytorch-seed==0.2.0 toppra==0.6.10 transforms3d==0.4.2
SIMPLER_NEEDS += pyarrow==21.0.0 trimesh==5.2.0 typeguard==4.6.1 tyro==1.0.17
SIMPLER_ASSETS := bridge_v2_real2sim widowx250s
VULKAN := $(if $(wildcard /dev/nvidia0),,VK_ICD_FILENAMES=$(SIMPLER)/vulkan/lavapipe.json LD_LIBRARY_PATH=$(SIMPLER)/vulkan/lib)
export VLA_BENCH_MANISKILL_ASSETS ?= $(if $(filter simpler,$(MAKECMDGOALS)),$(SIMPLER)_assets)
simpler: setup
	$(BIN)/python -m venv --clear $(SIMPLER)
	$(BIN)/python -c 'import numpy, pathlib; print(pathlib.Path(numpy.__file__).parents[1])' > "$$(echo $(SIMPLER)/lib/python*/site-packages)/dev.pth"
	$(SIMPLER)/bin/python -m pip install --disable-pip-version-check -q --no-deps $(SIMPLER_NEEDS)
	$(if $(VULKAN),.ci/software-vulkan $(SIMPLER)/vulkan)
	test -d "$$VLA_BENCH_MANISKILL_ASSETS" || for part in $(SIMPLER_ASSETS); do
		MS_ASSET_DIR="$$VLA_BENCH_MANISKILL_ASSETS" $(SIMPLER)/bin/python -m mani_skill.utils.download_asset "$$part" -y
	done
	$(VULKAN) $(SIMPLER)/bin/python -m pytest -s tests/benchmarks/test_{maniskill,simpler}*.py

# Runs that take long, whole: killed in every step of every mode, a save killed at a thousand places, twenty steps of every
# mode beside one process, the order of the samples of 500 drawn runs, and the graph of every pair. More than an hour.
resume: setup
	VLA_BENCH_EVERY_RUN=1 VLA_BENCH_SAVES=1000 pytest -n $(WORKERS) --dist worksteal tests/training/test_{sharding,cotrain,kills,killed_saves,order_of_samples,resume,retention,schedule}.py tests/serving/test_graph.py

# Trainings on a real SLURM of two nodes, which is started on this machine for as long as the tests run: about ten minutes.
slurm: setup
	.ci/slurm install
	.ci/slurm run "$$(mktemp -d /tmp/slurm.XXXXXX)" pytest --durations=0 tests/training/test_slurm.py

# Small faults put into copies of a package: does a test catch each? PACKAGE=models/heads [MODULE=bins] [SAMPLE=60]
mutants: setup
	python .ci/mutants $(PACKAGE) --sample $(SAMPLE) --seed $(SEED) --workers $(WORKERS) $(if $(MODULE),--module $(MODULE)) $(if $(AGAIN),--again)

# The whole loop in two minutes: two demonstrations of two tasks, a few steps, a few episodes.
smoke: setup $(MODEL)/config.json
	rm -rf $(RUNS)/smoke $(RUNS)/data/metaworld_smoke
	mkdir -p $(RUNS)/smoke
	python -m vla_bench.benchmarks.metaworld record --tasks drawer-open-v3 window-open-v3 --episodes 2 --out $(RUNS)/data/metaworld_smoke
	papermill experiments/train.ipynb $(RUNS)/smoke/train.ipynb -p config experiments/configs/smoke.yaml --no-progress-bar
	papermill experiments/evaluate.ipynb $(RUNS)/smoke/evaluate.ipynb -p config $(RUNS)/smoke --no-progress-bar
	python -m vla_bench.evaluation.report $(RUNS)/smoke

# The oldest versions that pyproject.toml allows, in an environment of their own: the smoke, and the cheap tests.
LOWEST := .venv-lowest
LOWEST_TESTS := tests/test_config.py tests/test_registry.py tests/data tests/serving tests/viz tests/training/test_run.py
LOWEST_TESTS += tests/models/frameworks/test_framework.py tests/models/heads/test_fast.py
lowest: system
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --disable-pip-version-check -q uv
	$(LOWEST)/bin/uv pip install -q --python $(LOWEST)/bin/python --resolution lowest-direct -e '.[$(EXTRAS)]'
	touch $(LOWEST)/bin/.ready
	$(MAKE) smoke BIN=$(LOWEST)/bin
	$(LOWEST)/bin/python -m pytest -q $(LOWEST_TESTS)

docs: setup
	python docs/build.py
	echo "documentation: _docs/index.html"

# What people see, in Chromium without a window and without a network: an executed training in a real JupyterLab, the
# explorer, a tutorial, the pages. SCREENSHOTS=FOLDER keeps what was seen. Chromium and its driver come from Debian.
SCREENSHOTS ?=
browser: $(BIN)/.browser $(RUNS)/smoke/train.ipynb
	test -f _docs/index.html || $(MAKE) docs
	VLA_BENCH_BROWSER=1 VLA_BENCH_SCREENSHOTS='$(SCREENSHOTS)' pytest --durations=5 tests/browser

$(BIN)/.browser: $(BIN)/.ready
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[browser]'
	if test "$$(id -u)" = 0 && ! { command -v chromium && command -v chromedriver; } > /dev/null; then
	    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver
	fi
	touch $@

$(RUNS)/smoke/train.ipynb: experiments/train.ipynb | setup
	$(MAKE) smoke

figures: setup
	for notebook in figures/*.ipynb; do papermill $$notebook $(RUNS)/$$(basename $$notebook) --no-progress-bar; done

# Every hot path beside its best peer; LEROBOT=PYTHON names one that can import lerobot, for samples per second.
speed: setup $(DATA)/meta/info.json
	python experiments/speed/video_access.py $(DATA)
	python experiments/speed/open_dataset.py
	python experiments/speed/train_step.py
	python experiments/speed/loop_overhead.py
	python experiments/speed/flow_sampling.py
	test -d $(RUN)/checkpoints || $(MAKE) smoke
	python experiments/speed/serving.py $(RUN)
	$(if $(LEROBOT),python experiments/speed/samples.py $(LEROBOT))

# Notebooks are the source: format them, write the package anew, keep only the outputs that teach.
format: setup
	ruff format -q nbs experiments figures tests docs
	nbdev-export
	nbdev-clean
	for folder in experiments figures; do nbdev-clean --fname $$folder; done
	cp nbs/templates/*.ipynb vla_bench/templates/

# Before each commit with notebooks: are they clean, and is the package what they export?
hook: setup
	install .ci/pre-commit "$$(git rev-parse --git-path hooks)/pre-commit"

AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)
lab: setup
	@test -z "$(AS_ROOT)" || echo "as root, as in a container: JupyterLab is started with --allow-root"
	jupyter lab --ServerApp.root_dir=$(CURDIR) $(AS_ROOT) nbs/index.ipynb

clean:
	rm -rf _docs _proc _site_src
