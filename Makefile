# `make demo` and `make test` do all the set-up. The interpreter is PYTHON= if given, else that of
# the active environment; where it has torch 2.11 or later it is used as it is, else a .venv is made
# from it, with TORCH= in it.
TORCH ?= torch==2.13.0

CHOSEN := $(or $(PYTHON),$(if $(VIRTUAL_ENV)$(CONDA_PREFIX),python,python3))
NEW_ENOUGH = tuple(map(int, version("torch").split(".")[:2])) >= (2, 11)
FIND = import sys; from importlib.metadata import version; print(sys.executable if $(NEW_ENOUGH) else "")
ACTIVE := $(shell "$(CHOSEN)" -c '$(FIND)' 2>/dev/null)
PY := $(or $(ACTIVE),.venv/bin/python)
# What was installed, so that the second run installs nothing.
checksum = $(shell echo "$(1)" | cksum | cut -d' ' -f1)
STAMP := $(if $(ACTIVE),build/installed-$(call checksum,$(ACTIVE)),.venv/installed-$(call checksum,$(TORCH)))

.PHONY: demo test gpu gpu-quick build lint format clean

# Compiles CUDA sources only for a GPU that is there.
CAPABILITY := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u)
demo: export DMFAST_CUDA ?= $(if $(CAPABILITY),,0)
demo: export TORCH_CUDA_ARCH_LIST ?= $(CAPABILITY)
demo: build
	"$(PY)" -m dmfast.demo

test: build
	"$(PY)" -m pytest -q tests

# Builds, tests and measures on a GPU, in ten minutes or three, with the active Python as it is:
# nothing is installed. DATA= is the folder that holds CIFAR-10, OUT= where the results go.
GPU_OPTIONS = $(if $(filter %quick,$@),--quick) $(if $(DATA),--data "$(DATA)") $(if $(OUT),--out "$(OUT)")
gpu gpu-quick:
	"$(CHOSEN)" benchmarks/gpu.py $(GPU_OPTIONS)

# Takes seconds where nothing has changed: ninja compiles what is newer than its object.
build: $(STAMP)
	"$(PY)" setup.py -q build_ext --inplace

$(STAMP): pyproject.toml
	$(if $(ACTIVE),,test -x $(PY) || "$(CHOSEN)" -m venv .venv)
	$(if $(ACTIVE),,$(PY) -m pip install -q $(TORCH))
	"$(PY)" -m pip install -q 'setuptools>=77' ninja
	"$(PY)" -m pip install -q --no-build-isolation -e '.[test]'
	mkdir -p build && touch $@

lint: $(STAMP)-dev
	"$(PY)" -m ruff check . && "$(PY)" -m ruff format --check .
	"$(PY)" -m mypy
	"$(dir $(PY))clang-format" --dry-run --Werror csrc/*.cpp csrc/*.cu csrc/*.h tests/*/*.cpp

format: $(STAMP)-dev
	"$(PY)" -m ruff check --fix . && "$(PY)" -m ruff format .
	"$(dir $(PY))clang-format" -i csrc/*.cpp csrc/*.cu csrc/*.h tests/*/*.cpp

$(STAMP)-dev: $(STAMP)
	"$(PY)" -m pip install -q --no-build-isolation -e '.[dev]'
	touch $@

clean:
	rm -rf build .venv dmfast/*.so *.egg-info
