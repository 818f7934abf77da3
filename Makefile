# Every target sets up what it needs, in .venv inside the tree, and is quick when that is already done.
#   make demo       fine-tune a real language model with offload.AdamW (an accelerator is used if there is one)
#   make test       the default test suite            make test-slow   the longer sweeps
#   make lint       ruff, mypy --strict, clang-format make format      let ruff and clang-format rewrite
#   make soak       2,000 steps with faults and kills        make sanitize    the CPU kernel under ASan, UBSan and TSan
#   make deletions  each handling of a fault taken out, and its test seen to fail
#   make examples   the small examples, on an accelerator or the emulated one
#   make docs       the site, in out/site             make dist        sdist and wheel, in dist
#   make clean      remove what the targets above made, the downloaded model and text included

PYTHON ?= python3
PYTEST_ARGS ?= --numprocesses=2 --dist=loadfile --no-loadscope-reorder
DEMO_ARGS ?=
EMULATED ?= $(if $(wildcard /proc/driver/nvidia),,--emulated)

VENV := .venv
BIN := $(VENV)/bin
CSRC := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.inl)
ENVIRONMENT := $(VENV)/.environment
INSTALLED := $(VENV)/.installed

# Tests start hundreds of processes: none of them compiles Python modules that another has compiled.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo examples test test-slow soak deletions sanitize lint format docs dist clean

help:
	@sed -n '2,9s/^#//p' Makefile

# Virtual environment and torch: rarely changes, and its own stamp, so that an edit of the sources never touches torch.
$(ENVIRONMENT): scripts/make_environment.py
	$(PYTHON) scripts/make_environment.py $(VENV)
	@touch $@

# The package (editable, with its C++ extension) and every dependency of the tests and of the demo.
$(INSTALLED): $(ENVIRONMENT) pyproject.toml setup.py $(filter csrc/cpu_adam/%,$(CSRC))
	$(BIN)/python -m pip install --quiet --editable ".[dev,demo]"
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/fetch_demo_assets.py .cache/demo
	$(BIN)/python examples/finetune.py $(DEMO_ARGS)

examples: $(INSTALLED)
	$(BIN)/python examples/plain_loop.py
	$(BIN)/python examples/trainer_finetune.py --tiny $(EMULATED) --output out/trainer
	$(BIN)/python examples/trainer_finetune.py --tiny --lora $(EMULATED) --output out/trainer_lora
	$(BIN)/python examples/vision.py
	$(BIN)/python examples/mixture_of_experts.py
	$(BIN)/python examples/diffusion_streaming.py
	$(BIN)/python examples/pipeline_stages.py

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

soak: $(INSTALLED)
	$(BIN)/python -m pytest -m slow tests/test_soak.py -s

deletions: $(INSTALLED)
	$(BIN)/python -m pytest -m slow tests/test_deletions.py --numprocesses=2

# Without contraction, as the extension is built. The thread sanitizer wants fixed addresses for the program.
SANITIZED := -std=c++17 -O1 -g -ffp-contract=off -pthread -fno-sanitize-recover=all -Wno-maybe-uninitialized
sanitize:
	@mkdir -p out
	$(CXX) $(SANITIZED) -fsanitize=address,undefined tests/sanitize/cpu_adam.cpp -o out/cpu_adam_asan
	./out/cpu_adam_asan
	$(CXX) $(SANITIZED) -fsanitize=thread tests/sanitize/cpu_adam.cpp -o out/cpu_adam_tsan
	setarch $$(uname -m) -R ./out/cpu_adam_tsan

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(CSRC),$(BIN)/clang-format --dry-run -Werror $(CSRC))

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CSRC),$(BIN)/clang-format -i $(CSRC))

docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The library of the wheel must be there: without a compiler this fails.
dist: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[release]"
	rm -rf dist
	OFFLOAD_REQUIRE_CPP=1 $(BIN)/python -m build --outdir dist/plain
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m auditwheel repair --wheel-dir dist dist/plain/*.whl
	mv dist/plain/*.tar.gz dist && rm -r dist/plain

clean:
	rm -rf $(VENV) .cache out build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f offload/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
