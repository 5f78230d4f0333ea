# make demo    train, evaluate and report on generated data: from data to COCO AP, in minutes on a CPU
# make paper-figures    condition numbers during the demo's training, plain and conditioned, in minutes on a CPU
# make pictures    redraw the pictures of the README and docs/: 45 minutes on two idle CPU cores; needs Chromium
# make experiment    does the conditioning help a detector: four hours on two CPU cores; continues where it stopped
# make systems    the same question for ListOps, a ViT and BERT: half an hour on one core
# make followup    size or conditioning: a pre-registered experiment, eight hours on one core; continues where it stopped
# make bench    speed and memory of the backbone and of timm's XCiT on this machine
# make test    all tests;  make test-onedl  the unit tests on the maintained fork of MMDetection;  make lint
# make test-gpu    tests on a simulated GPU, part of make test; skipped without a PyTorch built with CUDA
# make torture    kill trainings, break writes, forge checkpoints, fuzz readers: half an hour on an idle machine
# make docs-test    every command of the README and docs/ as written, in a fresh clone and environment
PYTHON ?= python3
TORCH ?= torch==2.14.1 torchvision==0.29.1
VENV ?= .venv
# An extra index for PyTorch. auto: the index of CPU wheels, if the machine has no NVIDIA GPU. Set TORCH_INDEX= to use
# only pip's own index, or TORCH_INDEX=URL to use another one.
TORCH_INDEX ?= auto
# required: test-gpu fails instead of skipping its tests without a PyTorch built with CUDA.
PRETEND_GPU ?= 1
# Python stores what it compiles; where a machine forbids that, every start takes twice as long.
unexport PYTHONDONTWRITEBYTECODE
CPU_WHEELS := https://download.pytorch.org/whl/cpu
comma := ,

demo: $(VENV)/mmdet
	$(VENV)/bin/spec-mmdet demo

pictures: $(VENV)/mmdet
	$(VENV)/bin/python -m research.pictures

paper-figures: $(VENV)/mmdet
	$(VENV)/bin/python -m research.paper_figures

experiment: $(VENV)/mmdet
	$(VENV)/bin/python -m research.experiment

systems: $(VENV)/mmdet
	$(VENV)/bin/python -m research.systems

followup: $(VENV)/mmdet
	$(VENV)/bin/python -m research.followup

bench: $(VENV)/mmdet
	$(VENV)/bin/spec-mmdet benchmark --rounds 3

test: test-cpu test-gpu

# tests/conftest.py puts the longest modules first.
test-cpu: $(VENV)/mmdet
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-gpu: $(VENV)/mmdet
	PRETEND_GPU=$(PRETEND_GPU) $(VENV)/bin/python -m pytest -m gpu tests/gpu

test-onedl: $(VENV)-onedl/onedl
	$(VENV)-onedl/bin/python -m pytest -m 'not slow'

# atheris guides the fuzzers by coverage, but lacks wheels for some Pythons; without it inputs are changed at random.
torture: $(VENV)/mmdet
	$(VENV)/bin/pip install --quiet --editable '.[fuzz]' || true
	$(VENV)/bin/python tests/torture.py

docs-test:
	$(PYTHON) tests/docs.py

lint: $(VENV)/mmdet
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/hadolint Dockerfile
	$(VENV)/bin/codespell
	$(VENV)/bin/python tests/wording.py

# An environment is created again when setup.py changes; the target file is written last, when it is complete.
$(VENV)/mmdet: setup.py
	$(call environment,$(VENV),mmdet,test$(comma)seg)

$(VENV)-onedl/onedl: setup.py
	$(call environment,$(VENV)-onedl,onedl,test$(comma)test-onedl$(comma)seg-onedl)

# --no-compile: Python compiles what it imports, a fraction of the 18,000 files.
define environment
	@echo '$(1): creating a new environment'
	@$(PYTHON) -m venv $(1)
	@$(1)/bin/pip install --no-compile $(TORCH) $$($(wheels))
	@echo '$(1): installing MMDetection and other packages, a minute or two'
	@$(1)/bin/pip install --no-compile --quiet --editable '.[$(2),$(3)]'
	@$(call headless,$(1)/bin/pip)
	@touch $(1)/$(2)
endef

# Print pip's option for the index of PyTorch's wheels, and report the choice.
wheels = case '$(TORCH_INDEX)' in \
	auto) if command -v nvidia-smi > /dev/null; then echo 'NVIDIA GPU found: PyTorch with CUDA' >&2; \
	elif $(PYTHON) -c "import urllib.request; urllib.request.urlopen('$(CPU_WHEELS)/', timeout=10)" 2> /dev/null; \
	then echo 'no NVIDIA GPU: PyTorch for CPUs' >&2; echo --extra-index-url $(CPU_WHEELS); \
	else echo "no NVIDIA GPU, but $(CPU_WHEELS) does not answer: PyTorch with CUDA from pip's own index, 2.8 GB" >&2; fi;; \
	?*) echo --extra-index-url '$(TORCH_INDEX)';; esac

# mmcv requires an OpenCV that needs libGL, which servers and containers lack: replace it by its headless build.
define headless
	version=$$($(1) show opencv-python | sed -n 's/^Version: //p'); $(1) uninstall --quiet --yes opencv-python && \
	$(1) install --quiet --force-reinstall --no-deps opencv-python-headless==$$version
endef

clean:
	rm -rf $(VENV) $(VENV)-onedl

.PHONY: demo pictures paper-figures experiment systems followup bench torture test test-cpu test-gpu test-onedl docs-test lint clean
