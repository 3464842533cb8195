# Two commands do everything on a fresh machine: `make train` and `make test`. They make .venv themselves.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu*)

.PHONY: test train examples studies bench rivals lint asan faults sass format clean

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup

train: $(VENV)/.train
	$(BIN)/python examples/train_gpt.py $(ARGS)

# The examples under examples/frameworks, in these frameworks; one that is missing is a failure.
examples: $(VENV)/.test $(VENV)/.examples
	FUSEDOPT_NO_SKIPS=1 $(BIN)/python -m pytest -q -n 2 tests/test_frameworks.py

# The experiments under examples/studies, on one page: studies/index.html.
studies: $(VENV)/.studies
	$(BIN)/python examples/studies/page.py $(ARGS)

bench: $(VENV)/.train
	$(BIN)/python -m benchmarks.cpu $(ARGS)

# Other libraries' optimizers beside ours, each installed in an environment of its own under .rivals: gigabytes.
rivals: $(VENV)/.train
	$(BIN)/python -m benchmarks.rivals install
	$(BIN)/python -m benchmarks.rivals $(ARGS)

# Style, types and formatting; the source is not changed (`make format` does that).
lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu*' 'tests/*.cpp' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu*' 'tests/*.cpp' | xargs $(BIN)/clang-format -i

# The whole suite with the native core under AddressSanitizer and UndefinedBehaviorSanitizer.
asan: $(VENV)/.test
	$(BIN)/python tests/sanitize.py

# Every deliberate fault under tests/faults must turn its test red.
faults: $(VENV)/.test
	$(BIN)/python tests/faults/run.py

# The CUDA kernels' machine code, for all architectures: needs nvcc, but no GPU.
sass: $(VENV)/.torch
	$(BIN)/python -m pip install -q 'nvidia-cuda-nvdisasm>=13,<14'
	$(BIN)/python tests/check_sass.py

clean:
	rm -rf build fusedopt/_C*.so *.egg-info

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(TORCH) numpy
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install -q --no-deps -e .
	touch $@

# What an extra needs, by name: to install '.[test]' would build the package again. Torch stays what it is.
extra = $(BIN)/python -c 'import sys; from importlib.metadata import requires, version; \
	needs = [r.split(";")[0] for r in requires("fusedopt") if "\"%s\"" % sys.argv[1] in r]; \
	print("torch==" + version("torch"), *needs, sep="\n")' $(1) \
	| $(BIN)/python -m pip install -q -r /dev/stdin

$(VENV)/.test: $(VENV)/.built
	$(call extra,test)
	touch $@

$(VENV)/.train: $(VENV)/.built
	$(call extra,train)
	touch $@

$(VENV)/.studies: $(VENV)/.built
	$(call extra,studies)
	touch $@

$(VENV)/.examples: $(VENV)/.built
	$(call extra,examples)
	touch $@

$(VENV)/.lint: $(VENV)/.torch
	$(BIN)/python -m pip install -q $$($(PYTHON) -c "import re; print(' '.join(re.findall(r'\"([a-z-]+==[0-9.]+)\"', open('pyproject.toml').read())))")
	touch $@
