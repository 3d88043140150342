# make demo   sets up .venv and runs the demo
# make test   sets up .venv and runs the suite: a quarter of every test's cases, one at least, others with every commit; no slow tests
# make test-all   the same with all cases, and the slow tests
#
# TORCH   what to install where no fitting torch is present, e.g. TORCH="torch==2.13.0 --index-url URL-of-a-CUDA-build"
# PYTHON  the interpreter that makes .venv
# VENV    where; VENV= (empty) uses PYTHON's own environment and leaves its torch alone

TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
CASES ?= --cases 0.25

PY := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
STAMP := $(if $(VENV),$(VENV)/.m3k,.m3k)
# -p no:cacheprovider: two runs below, one cache would mix them
PYTEST := $(PY) -m pytest -n $(shell nproc 2>/dev/null | awk '{print ($$1 < 8) ? $$1 : 8}') -p no:cacheprovider

# bytecode is written as modules are imported: compiling all that is installed takes longer than the install
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-all lint clean

demo: $(STAMP)-demo
	$(PY) -m m3kernels.cli demo $(ARGS)

# what runs kernels, and is therefore interpreted where there is no GPU; of models what is marked for it
KERNELS := tests/ops tests/parallel/test_cross_entropy.py tests/parallel/test_sharding_rules.py
MARKED := tests/models tests/test_hf_decode.py tests/parallel/test_model_parallel.py tests/parallel/test_adapters_sharded.py
INTERPRET := $(if $(shell command -v nvidia-smi 2>/dev/null),,TRITON_INTERPRET=1)

# kernels run in Triton's interpreter where there is no GPU; the rest of the suite takes the plain PyTorch references
test: $(STAMP)-test
	$(PYTEST) tests --ignore tests/ops $(CASES) $(ARGS)
	$(INTERPRET) $(PYTEST) $(KERNELS) $(CASES) $(ARGS)
	$(if $(INTERPRET),$(INTERPRET) $(PYTEST) $(MARKED) -m interpreter $(CASES) $(ARGS))

test-all:
	$(MAKE) test CASES=

lint:
	ruff check . && ruff format --check .

clean:
	rm -rf .venv build *.egg-info demo-output

ifneq ($(VENV),)
$(PY):
	$(PYTHON) -m venv $(VENV)
endif

# torch first and by itself: a bare requirement would take the newest CUDA build, of several GB
define install
	$(PY) -c "import torch, sys; sys.exit(tuple(map(int, torch.__version__.split('.')[:2])) < (2, 11))" 2>/dev/null || $(PY) -m pip install --no-compile $(TORCH)
	$(PY) -m pip install --no-compile -e '.[$(1)]' $(2)
	touch $@
endef

$(STAMP)-demo: $(if $(VENV),$(PY)) pyproject.toml setup.py
	$(call install,demo)

# triton 3.6.0 is what the kernels were measured with; a CUDA build of torch brings a triton of its own
$(STAMP)-test: $(if $(VENV),$(PY)) pyproject.toml setup.py
	$(call install,test,`$(PY) -c "import torch; print('' if torch.version.cuda or torch.version.hip else 'triton==3.6.0')"`)
