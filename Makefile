# setup demo test lint rooms bench gpu; PYTHON and TORCH may be overridden: make setup TORCH="torch==2.11.0"
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= triton>=3.7,<3.8
OUT ?= runs/gpu
# Seconds: of the GPU run, and of the CPU suite (plots and the table come on top).
BUDGET ?= 480
BENCH_BUDGET ?= 575
# The environment of `setup` comes first where it exists; without it, the machine's own python.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: setup build demo example test lint rooms format bench gpu clean

setup: $(VENV)/.ready build

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	pip install --quiet "$(TORCH)" "$(TRITON)" "setuptools>=77" wheel pybind11
	SPPO_KERNELS_NATIVE=0 pip install --quiet --no-build-isolation --editable ".[test,lint,bench]"  # `build` compiles
	touch $@

build: $(VENV)/.ready
	python setup.py --quiet build_ext --inplace

demo: setup
	sppo demo

# A plain PyTorch loop of under 100 lines on real responses with human comparisons.
example: setup
	python examples/train_llama.py

test: setup
	OMP_NUM_THREADS=1 python -m pytest -n auto --dist loadfile

lint: setup
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu')

# Lines of each room, and a failure on an import that the table of rooms does not allow.
rooms: setup
	python -m tests.test_rooms

format: setup
	ruff check --fix .
	ruff format .
	clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu')

# Everything on this machine, under ten minutes on two cores: benchmarks/results/<machine>/.
bench: setup
	python -m benchmarks run --budget $(BENCH_BUDGET)

# No network and no virtual environment: the machine's own python, torch and triton.
gpu:
	$(PYTHON) -m benchmarks gpu --out "$(OUT)" --budget $(BUDGET)

clean:
	rm -rf build dist *.egg-info sppo_kernels/*.so
