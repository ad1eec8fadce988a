# `make demo` and `make test` each do their whole set-up: a virtual environment inside the
# checkout, made once and kept until pyproject.toml or constraints.txt change.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# A second transformers, of the 4.x line, that tests start in a process of its own.
TRANSFORMERS4 := $(VENV)/transformers4

# segmentation_models_pytorch needs torchvision, whose newer releases do not import beside a CPU
# build of torch; and torchvision changes what transformers does. So it too has a process of its own.
SMP := $(VENV)/smp

# Ray, and Dask, Daft and Spark (which needs Java): none is needed by anything else here, and what
# else they need is installed.
RAY := $(VENV)/ray
ENGINES := $(VENV)/engines

# The oldest Triton that is supported: tests marked "oldest" run on it once more.
TRITON36 := $(VENV)/triton36

# Versions apart: those of a machine with a GPU, and the newest. Python 3.12 where one really runs:
# the first on the path may be one that only says how to install it.
PYTHON312 ?= $(shell python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null || command -v python3.11)
GPU_VERSIONS := $(VENV)/gpu-versions
NEWEST := $(VENV)/newest
# What another version of torch, Triton or a host can break.
OF_VERSIONS := tests/folding tests/cuda_graphs tests/models tests/kernels tests/test_accelerate.py

.PHONY: demo test test-all test-gpu-versions test-newest lint bench docs clean

demo: $(VENV)/.run
	$(BIN)/fastseg demo --output output

# Meant to take ten minutes on two cores; what takes long is marked "slow".
test: lint $(TRANSFORMERS4)/.done $(SMP)/.done
	$(BIN)/pytest -m "not slow"
	FASTSEG_TEST_HOSTS=transformers4 PYTHONPATH=$(TRANSFORMERS4) $(BIN)/pytest tests/models/hosts -m "not slow"
	FASTSEG_TEST_HOSTS=smp PYTHONPATH=$(SMP) $(BIN)/pytest tests/models/hosts -m "not slow"
	TRITON_INTERPRET=1 $(BIN)/pytest tests/kernels/triton -m "not slow"

# The rest, engines of many machines, and the oldest Triton.
test-all: test $(TRITON36)/.done $(RAY)/.done $(ENGINES)/.done
	$(BIN)/pytest -m slow
	FASTSEG_TEST_HOSTS=transformers4 PYTHONPATH=$(TRANSFORMERS4) $(BIN)/pytest tests/models/hosts -m slow
	FASTSEG_TEST_HOSTS=smp PYTHONPATH=$(SMP) $(BIN)/pytest tests/models/hosts -m slow
	TRITON_INTERPRET=1 $(BIN)/pytest tests/kernels/triton -m slow
	PYTHONPATH=$(CURDIR)/$(RAY) $(BIN)/pytest tests/engines tests/cli/test_engine_options.py --numprocesses=0
# By itself: in Python 3.11 tracemalloc crashes a process in which Ray's threads run (gh-128679).
	PYTHONPATH=$(CURDIR)/$(RAY) $(BIN)/pytest tests/bench/test_engines.py --numprocesses=0
	PYTHONPATH=$(CURDIR)/$(ENGINES) $(BIN)/pytest tests/engines/test_other_engines.py --numprocesses=0
	PYTHONPATH=$(TRITON36) TRITON_INTERPRET=1 $(BIN)/pytest tests/kernels/triton -m oldest
	PYTHONPATH=$(TRITON36) $(BIN)/pytest tests/kernels -m oldest

# On a CPU, in an environment of its own of 5 GB: compile, parity, ahead-of-time and host tests, and
# the rehearsal of the GPU command.
test-gpu-versions: $(GPU_VERSIONS)/.done
	$(GPU_VERSIONS)/bin/pytest $(OF_VERSIONS) -m "not slow or oldest"
	TRITON_INTERPRET=1 $(GPU_VERSIONS)/bin/pytest tests/kernels/triton -m oldest
	$(GPU_VERSIONS)/bin/pytest tests/kernels/test_precompile.py -m slow
	FASTSEG_REHEARSAL=1 $(GPU_VERSIONS)/bin/pytest -o addopts= tests/bench/test_rehearsal.py

test-newest: $(NEWEST)/.done
	$(NEWEST)/bin/pytest $(OF_VERSIONS) -m "not slow"
	TRITON_INTERPRET=1 $(NEWEST)/bin/pytest tests/kernels/triton -m oldest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test
	$(BIN)/python -m bench

# Pages that open from files: site/index.html.
docs: $(VENV)/.test
	$(BIN)/mkdocs build --strict

# torch goes first and alone, so that nothing after it can choose another build of it.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy
	touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml
	$(PIP) -e .
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) -e ".[test]"
	touch $@

$(TRANSFORMERS4)/.done: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps \
		--target $(TRANSFORMERS4) transformers==4.57.6 tokenizers==0.22.1 huggingface_hub==0.36.0
	$(PIP) requests
	touch $@

$(SMP)/.done: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps \
		--target $(SMP) segmentation-models-pytorch==0.6.0 timm==1.0.31 torchvision==0.16.2
	touch $@

$(RAY)/.done: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps \
		--target $(RAY) ray==2.60.0 msgpack==1.2.4
	touch $@

$(ENGINES)/.done: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps \
		--target $(ENGINES) dask==2026.8.0 cloudpickle==3.1.3 partd==1.4.2 locket==1.0.0 toolz==1.2.0 \
		daft==0.6.14 pyspark==4.3.0 py4j==0.10.9.9
	touch $@

$(TRITON36)/.done: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps \
		--target $(TRITON36) triton==3.6.0
	touch $@

$(GPU_VERSIONS)/.done: pyproject.toml
	$(PYTHON312) -m venv $(GPU_VERSIONS)
	$(GPU_VERSIONS)/bin/python -m pip install --quiet --disable-pip-version-check \
		torch==2.11.0 torchvision==0.26.0 triton==3.6.0 transformers==5.17.0 \
		"numpy==2.5.2; python_version >= '3.12'" \
		-e ".[test]"
	touch $@

$(NEWEST)/.done: pyproject.toml
	$(PYTHON312) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info output site
