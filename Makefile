# Two commands matter: `make demo` and `make test`. Everything lives in .venv; nothing is installed elsewhere.
PYTHON ?= python3
BIN := .venv/bin
# Which tests: `make test PYTEST_MARKS=` runs the slow ones too.
PYTEST_MARKS ?= not slow
PYTEST_ARGS ?=
export HF_HUB_OFFLINE = 1
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: setup demo test interop lint bench clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make setup PYTHON=python3.12" >&2; exit 1; }
	@command -v cc >/dev/null && command -v c++ >/dev/null \
		|| { echo "A C++ compiler is needed to build llama.cpp: apt-get install build-essential, or xcode-select --install" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[genai,llamacpp,openvino,dev]"
	@touch $@

demo: setup
	$(BIN)/edgewright run examples/demo.yaml

# Two processes: four runtimes that each bring threads of their own, and then a training run that is stopped by signals,
# crashed together in one.
test: setup
	@status=0; for rooms in "tests/compress tests/optim tests/sdk" tests/export; do \
		$(BIN)/pytest -m "$(PYTEST_MARKS)" $(PYTEST_ARGS) $$rooms || status=1; \
	done; exit $$status

# Our ONNX folders in optimum, which pins an older transformers and so gets an environment of its own.
interop: setup .venv-interop/installed
	$(BIN)/python tests/interop/make_folders.py build/interop
	.venv-interop/bin/python tests/interop/check_optimum.py build/interop

.venv-interop/installed: tests/interop/requirements.txt
	$(PYTHON) -m venv .venv-interop
	.venv-interop/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# The three rooms are one package only once installed, so mypy gets a tree of links in the shape of the package.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/types && mkdir -p build/types/edgewright
	@cd build/types/edgewright && ln -s ../../../sdk/* . && ln -s ../../../compress ../../../export .
	MYPYPATH=build/types $(BIN)/mypy --cache-dir build/mypy -p edgewright

bench: setup
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf build .venv/installed .venv-interop .pytest_cache .ruff_cache .mypy_cache
