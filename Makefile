# make serve, make test: the two commands of the README. Everything is installed into .venv by plain pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Bytecode is written for what is used, when it is used first: a quarter of the installed size otherwise. (venv writes pip's.)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
SOURCES := pyproject.toml CMakeLists.txt README.md $(shell find quire -type f -not -name '*.pyc' -not -name '*.so')
MODEL ?= embedded

# Two processes, a file each: most tests wait for a server or use one core.
TWO := -n 2 --dist loadfile

.PHONY: help serve test test-again test-oracle test-page test-clients test-emulated test-sanitized lint clean preflight

help:
	@echo "make serve        install into $(VENV) and serve the embedded model on 127.0.0.1:8000 (MODEL=folder for another)"
	@echo "make test         install what the tests need and run them"
	@echo "make test-again   what failed in make test, by itself"
	@echo "make test-oracle  the checks against transformers, and the CUDA backend without a GPU (installs PyTorch and Triton)"
	@echo "make test-page    the page in headless Chromium (a part of make test, where Chromium is)"
	@echo "make test-clients  the tests with clients that are heavy to install: LiteLLM, LangChain, lm-evaluation-harness, vllm-router (850 MB); Claude Code, Codex and opencode where they are on the PATH"
	@echo "make test-emulated the AVX-512 kernels' tests on any machine with AVX2; installs cmake, ninja and nanobind into $(VENV)"
	@echo "make test-sanitized the kernels' tests with GCC's address and undefined-behaviour sanitizers; SANITIZE=thread: with its race detector"
	@echo "make test-fuzz    20,000 requests made up from the OpenAPI document; make test-chaos: engines killed under 300 streams"
	@echo "make lint         ruff and mypy"
	@echo "make clean        remove $(VENV) and build folders"

preflight:
	@$(PYTHON) -c '' 2>/dev/null || { echo "$(PYTHON) is missing or does not run: install Python 3.11 or newer (Debian, Ubuntu: apt-get install python3 python3-venv python3-dev)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$($(PYTHON) --version) is too old: install Python 3.11 or newer, or name one with make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is missing: install it (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h")).close()' 2>/dev/null || { echo "Python's headers are missing: install them (Debian, Ubuntu: apt-get install python3-dev)"; exit 1; }
	@test -z "$$CXX" || command -v $$CXX >/dev/null || { echo "CXX names a C++ compiler that is missing, $$CXX: install it, or leave CXX unset"; exit 1; }
	@test -n "$$CXX" || command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { echo "A C++ compiler is missing: install one (Debian, Ubuntu: apt-get install g++)"; exit 1; }

# pip is written last: where it is, the environment is whole.
$(BIN)/pip: | preflight
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(SOURCES) | preflight $(BIN)/pip
	@echo "Installing Quire into $(VENV) (compiles its native code, about a minute) ..."
	@$(PIP) .
	@$(BIN)/python -m pip uninstall --quiet --yes setuptools 2>/dev/null || true
	@find $(VENV)/lib*/python*/site-packages/pip -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
	@$(BIN)/python -P -c 'import quire.llm, quire.server.launch, quire.server.uvicorn_server, quire.server.app'
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	@$(PIP) 'quire[test]'
	@touch $@

$(VENV)/.oracle: $(VENV)/.tested
	@$(PIP) 'torch==2.13.0'
	@$(PIP) 'quire[oracle]'
	@touch $@

$(VENV)/.clients: $(VENV)/.tested
	@$(PIP) 'quire[clients]'
	@touch $@

$(VENV)/.emulated: $(VENV)/.tested
	@$(PIP) cmake ninja 'nanobind>=2.4'
	@touch $@

$(VENV)/.linted: $(VENV)/.installed
	@$(PIP) 'quire[lint]'
	@touch $@

test-fuzz: $(VENV)/.tested
	$(BIN)/python benchmarks/fuzz_api.py

test-chaos: $(VENV)/.tested
	$(BIN)/python benchmarks/chaos.py
	$(BIN)/python benchmarks/soak.py

serve: $(VENV)/.installed
	@exec $(BIN)/quire serve $(MODEL)

test: $(VENV)/.tested
	$(BIN)/pytest $(TWO) --ignore=tests/oracle --ignore=tests/clients

test-again: $(VENV)/.tested
	$(BIN)/pytest --last-failed --last-failed-no-failures none --ignore=tests/oracle --ignore=tests/clients

test-page: $(VENV)/.tested
	$(BIN)/pytest tests/server/page

test-oracle: $(VENV)/.oracle
	$(BIN)/pytest $(TWO) tests/oracle tests/backends/cuda

test-clients: $(VENV)/.clients
	$(BIN)/pytest tests/clients

# The module that emulates is in a copy of its own, and tests find that one first.
EMULATED := $(CURDIR)/build/emulated
test-emulated: $(VENV)/.emulated
	@echo "Compiling the AVX-512 kernels out of AVX2 into build/emulated (two minutes the first time) ..."
	@$(BIN)/cmake -S . -B $(EMULATED) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DQUIRE_EMULATE_AVX512=ON -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python > /dev/null
	@$(BIN)/cmake --build $(EMULATED) -- --quiet
	@rm -rf $(EMULATED)/python && mkdir $(EMULATED)/python && cp -r quire $(EMULATED)/python/
	@$(BIN)/cmake --install $(EMULATED) --prefix $(EMULATED)/python > /dev/null
	@PYTHONPATH=$(EMULATED)/python $(BIN)/python -P -c 'import sys; from quire.backends.cpu import _native as n; sys.exit(None if n.__file__.startswith(sys.argv[1]) and "avx512bf16" in n.available_isas() else "The AVX-512 kernels are emulated with AVX2, FMA and F16C, which this CPU lacks: it has kernels for " + ", ".join(n.available_isas()))' $(EMULATED)
	PYTHONPATH=$(EMULATED)/python $(BIN)/pytest -k avx512 tests/backends/cpu

# With GCC's sanitizers, in a copy too; without the tests that limit the memory, which sanitizers need more of. SANITIZE=thread looks for
# data races.
SANITIZE := address
SANITIZED := $(CURDIR)/build/$(SANITIZE)
SANITIZER := $(if $(filter thread,$(SANITIZE)),thread,address$(shell printf ,)undefined)
test-sanitized: $(VENV)/.emulated
	@echo "Compiling the native code with -fsanitize=$(SANITIZER) into build/$(SANITIZE) (four minutes the first time) ..."
	@$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="-O1 -g1 -fsanitize=$(SANITIZER) -fno-sanitize-recover=all -fno-omit-frame-pointer" -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python > /dev/null
	@$(BIN)/cmake --build $(SANITIZED) -- --quiet
	@rm -rf $(SANITIZED)/python && mkdir $(SANITIZED)/python && cp -r quire $(SANITIZED)/python/
	@$(BIN)/cmake --install $(SANITIZED) --prefix $(SANITIZED)/python > /dev/null
	LD_PRELOAD="$$(g++ -print-file-name=lib$(if $(filter thread,$(SANITIZE)),t,a)san.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED)/python $(BIN)/pytest -k 'not without_memory' tests/backends/cpu

lint: $(VENV)/.linted
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build
