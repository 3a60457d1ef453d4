# `make help` lists the commands. Each installs its requirements into $(VENV), and can be run again at any time.

VENV ?= .venv
# `make VENV=~/envs/d2`: not every shell expands the ~ there.
override VENV := $(patsubst ~/%,$(HOME)/%,$(VENV))
# The first Python that SparseInst runs on makes $(VENV) where it does not exist.
IS_SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13 python3.10; do \
	"$$python" -c '$(IS_SUPPORTED)' 2>/dev/null && echo "$$python" && break; done)
# Worker processes of the test suite.
TEST_WORKERS ?= 2
# The redistribution of Detectron2 that is installed where none can be imported. Its wheel is tagged cp310, but its
# Python code runs on 3.11 to 3.13 too, and nothing here needs its compiled operators.
DETECTRON2 := sal-detectron2==0.7.2
# Where torch and torchvision come from; empty: from the same index as all else, with 3 GB of libraries for GPUs.
TORCH_INDEX ?=
# For a test of Detectron2's LVISEvaluator. Installed without its requirements: opencv-python needs libGL.
LVIS := lvis==0.5.3
# Packages that only tests/extras needs (the tests of the page install Chromium where apt-get may). The second list is
# installed without its requirements: opencv-python needs libGL.
EXTRAS_PACKAGES := 'nncf>=2.14' 'ray[data]>=2.40,<3' 'supervision>=0.27' 'mlflow>=2.14' 'wandb>=0.19' rich 'playwright>=1.50'
EXTRAS_WITHOUT_NEEDS := 'sahi>=0.11.20' 'trackers>=2.6'
# Free space that a first installation takes at its peak, in GB: $(VENV) ends up with 6, the rest are downloads.
DISK_GB := 10
FREE_GB = $$(df -Pk "$(VENV)" | awk 'NR == 2 { print int($$4 / 1048576) }')

, := ,
VENV_PYTHON := $(VENV)/bin/python
PIP := "$(VENV_PYTHON)" -m pip
PIP_INSTALL := $(PIP) install --quiet --disable-pip-version-check --no-warn-conflicts
# There when $(VENV) was made here, not by the user.
OURS := $(VENV)/.sparseinst-venv
# There when everything is installed as these files say: an interrupted or outdated installation is repeated.
INSTALLED := $(VENV)/.sparseinst-installed-$(shell \
	{ echo "$(DETECTRON2) $(LVIS) $(CURDIR)"; cat requirements.txt setup.py; } | cksum | tr ' ' '-')

QUICK_CONFIG := configs/quick/shapes.yaml
QUICK_OUTPUT := output/quick
QUICK_DATA := datasets/shapes
# Seeds 1 to 3 are within 2 of these values. Outside of value +- tolerance the evaluation fails.
QUICK_EXPECTED := [["segm", "AP", 78.0, 8.0], ["segm", "AP50", 95.5, 6.0]]

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-fast test-slow test-faults test-extras lint format clean install environment install-pinned install-beside-detectron2

help:
	@echo 'make quickstart   generate data, train a small SparseInst on the CPU, evaluate it, draw predictions; minutes'
	@echo 'make test         run the test suite, without the slow tests'
	@echo 'make test-fast    run the tests of single functions and layers, in under a minute'
	@echo 'make test-slow    run the slow tests of it: variants of published models, learning, statistics; minutes'
	@echo 'make test-faults  run the slow fault tests: broken files, killed processes; most of an hour'
	@echo 'make test-extras  run the tests that need more packages or a browser, in $(VENV)-extras; minutes'
	@echo 'make lint         check style and language'
	@echo 'make format       rewrite the files in the style that make lint checks'
	@echo 'make clean        remove everything that these commands made, except $(VENV)'
	@echo
	@echo 'Settings: VENV=FOLDER     virtual environment, created where it is missing; keeps the Detectron2 that it has'
	@echo '          PYTHON=COMMAND  Python, 3.10 to 3.13, that creates it'
	@echo '          TORCH_INDEX=https://download.pytorch.org/whl/cpu  PyTorch without the libraries for GPUs'

quickstart: install
	@echo '== 1 of 4: generating the data set'
	"$(VENV_PYTHON)" -m sparseinst.tools.make_shapes --output $(QUICK_DATA)
	@echo '== 2 of 4: training from random weights, 1.5 to 3 minutes on 2 idle cores'
	rm -rf $(QUICK_OUTPUT)
	"$(VENV_PYTHON)" train_net.py --config-file $(QUICK_CONFIG) OUTPUT_DIR $(QUICK_OUTPUT)
	@echo '== 3 of 4: evaluation on images of another seed'
	"$(VENV_PYTHON)" train_net.py --config-file $(QUICK_CONFIG) --eval-only \
		OUTPUT_DIR $(QUICK_OUTPUT) MODEL.WEIGHTS $(QUICK_OUTPUT)/model_final.pth \
		TEST.EXPECTED_RESULTS '$(QUICK_EXPECTED)'
	@echo '== 4 of 4: drawing predictions on those images'
	"$(VENV_PYTHON)" demo/demo.py --config-file $(QUICK_CONFIG) --confidence-threshold 0.4 \
		--input '$(QUICK_DATA)/val/00000*.jpg' \
		--output $(QUICK_OUTPUT)/drawn --opts MODEL.WEIGHTS $(QUICK_OUTPUT)/model_final.pth
	@echo '== Done. Tables of AP and speed: above, and $(QUICK_OUTPUT)/results.json'
	@echo '         Curves, predictions next to the truth, confusion matrix: $(QUICK_OUTPUT)/*.png, val_predictions.jpg'
	@echo '         Drawn predictions: $(QUICK_OUTPUT)/drawn'

test: install
	OMP_NUM_THREADS=1 "$(VENV_PYTHON)" -m pytest -q -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder \
		-m 'not slow' --ignore=tests/extras

# The tests that tests/conftest.py lists: variants of tests of `make test`, and long tests.
test-slow: install
	OMP_NUM_THREADS=1 "$(VENV_PYTHON)" -m pytest -q -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder \
		-m slow --ignore=tests/extras

# Tests of single functions, layers and config files; none trains through a command or starts processes.
FAST_TESTS := tests/ops tests/structures tests/modeling tests/config tests/test_imports.py tests/test_language.py \
	$(foreach family,solo yolact,\
		$(patsubst %,--ignore=tests/modeling/$(family)/test_%.py,commands learning model published_configs))

test-fast: install
	OMP_NUM_THREADS=1 "$(VENV_PYTHON)" -m pytest -q -n $(TEST_WORKERS) --dist loadfile $(FAST_TESTS)

# `make test` runs its fast part, and a few cases of the rest.
test-faults: install
	SPARSEINST_FAULTS=full OMP_NUM_THREADS=1 "$(VENV_PYTHON)" -m pytest -q -rA -n $(TEST_WORKERS) --dist loadfile \
		tests/faults

# The environment sees the packages of $(VENV), editable ones too, and has the packages that only these tests need.
test-extras: install
	@[ -x "$(VENV)-extras/bin/python" ] || "$(VENV_PYTHON)" -m venv "$(VENV)-extras"
	@"$(VENV_PYTHON)" -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		>"$$("$(VENV)-extras/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	@"$(VENV)-extras/bin/python" -m pip install --quiet --disable-pip-version-check $(EXTRAS_PACKAGES)
	@"$(VENV)-extras/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps $(EXTRAS_WITHOUT_NEEDS)
	OMP_NUM_THREADS=1 "$(VENV)-extras/bin/python" -m pytest -v -rA tests/extras

lint: install
	"$(VENV_PYTHON)" -m ruff check .
	"$(VENV_PYTHON)" -m ruff format --check .
	"$(VENV_PYTHON)" tests/language.py

format: install
	"$(VENV_PYTHON)" -m ruff check --fix .
	"$(VENV_PYTHON)" -m ruff format .

clean:
	rm -rf $(QUICK_OUTPUT) $(QUICK_DATA) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find configs demo sparseinst tests -name __pycache__ -prune -exec rm -rf {} +

install: $(INSTALLED)

# Stops with one line that says what is missing.
STOP = { echo "$(1)" >&2; exit 1; }

$(INSTALLED):
	@$(PIP) --version >/dev/null 2>&1 || $(MAKE) --no-print-directory environment
	@"$(VENV_PYTHON)" -c '$(IS_SUPPORTED)' || $(call STOP,SparseInst needs Python 3.10 to 3.13; \
		$(VENV) has $$("$(VENV_PYTHON)" --version). Name another: make VENV=FOLDER)
	@rm -f "$(VENV)"/.sparseinst-installed-*
	@if [ ! -e "$(OURS)" ] && "$(VENV_PYTHON)" -c 'import detectron2' 2>/dev/null; \
		then $(MAKE) --no-print-directory install-beside-detectron2; \
		else $(MAKE) --no-print-directory install-pinned; fi
	@"$(VENV_PYTHON)" -W ignore -c 'import cv2, detectron2, sparseinst' || \
		$(call STOP,The installation in $(VENV) does not work: the reason is above)
	@touch "$@"

environment:
	@[ ! -e "$(VENV)" ] || [ -e "$(OURS)" ] || $(call STOP,$(VENV) is there$(,) but has no bin/python with pip in it: \
		remove it$(,) repair it$(,) or name another: make VENV=FOLDER)
	@[ -n "$(PYTHON)" ] || $(call STOP,SparseInst needs Python 3.10 to 3.13$(,) and the PATH has none. \
		Install one$(,) or name it: make PYTHON=COMMAND)
	@"$(PYTHON)" -c '$(IS_SUPPORTED)' || $(call STOP,SparseInst needs Python 3.10 to 3.13; \
		$(PYTHON) is $$("$(PYTHON)" --version 2>&1). Name another: make PYTHON=COMMAND)
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || $(call STOP,$(PYTHON) has no module venv. \
		Install it; on Debian and Ubuntu: apt install $$("$(PYTHON)" -c \
		'import sys; print("python3.%d-venv" % sys.version_info[1])'))
	@echo "Making $(VENV) with $$("$(PYTHON)" --version)"
	@mkdir -p "$(VENV)"
	@touch "$(OURS)"
	@rm -rf "$(VENV)/bin" "$(VENV)/lib" "$(VENV)/lib64"
	@"$(PYTHON)" -m venv "$(VENV)"

install-pinned:
	@"$(VENV_PYTHON)" -c 'import torch' 2>/dev/null || [ "$(FREE_GB)" -ge $(DISK_GB) ] || \
		$(call STOP,The installation takes $(DISK_GB) GB in $(VENV)$(,) where $(FREE_GB) GB are free. \
		Name a folder with more: make VENV=FOLDER)
	@echo 'Installing the versions of requirements.txt in $(VENV): 3 GB to download, 6 GB on disk, 3 to 15 minutes'
	@[ -n "$(TORCH_INDEX)" ] || echo 'Less without GPUs: make TORCH_INDEX=https://download.pytorch.org/whl/cpu'
	@$(PIP_INSTALL) --constraint requirements.txt setuptools wheel
	@[ -z "$(TORCH_INDEX)" ] || $(PIP_INSTALL) --no-deps --constraint requirements.txt --index-url "$(TORCH_INDEX)" \
		torch torchvision
	@$(PIP_INSTALL) --no-build-isolation --requirement requirements.txt
	@echo 'Installing $(DETECTRON2)'
	@$(PIP_INSTALL) --no-deps --upgrade --only-binary=:all: --python-version 3.10 $(DETECTRON2) \
		--target "$$("$(VENV_PYTHON)" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@$(PIP_INSTALL) --no-deps $(LVIS)
	@echo 'Installing SparseInst, editable'
	@$(PIP_INSTALL) --no-deps --no-build-isolation --editable .

# The installed versions of torch and others were chosen for that Detectron2: add missing packages only.
install-beside-detectron2:
	@echo 'Installing SparseInst, editable, next to the Detectron2 of $(VENV), with the packages that are missing there'
	@$(PIP_INSTALL) --editable \
		".[dev$$("$(VENV_PYTHON)" -c 'from importlib.util import find_spec; print("" if find_spec("cv2") else ",headless")')]"
