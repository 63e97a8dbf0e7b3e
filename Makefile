PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PIP_AS_TESTED := $(PIP) --constraint constraints.txt
OLDEST_PEFT := 0.21.0
ENGINES := vllm==0.33.0 sglang==0.5.23
LLAMA := .cache/engines/llama
NODE_LLAMA_CPP := 3.22.1
LLAMA_CPP_PYTHON := 0.3.36
RAY := $(CURDIR)/$(VENV)/ray

.PHONY: demo test engines llama ray lint format docs clean

# The main job on the embedded fixture: a real 0.26M-parameter Llama and a LoRA trained on it.
demo: $(VENV)/ready
	$(BIN)/lorapack compress fixtures/adapter --base fixtures/stories260k \
		--data fixtures/tinyshakespeare/calibration.jsonl --eval-data fixtures/tinyshakespeare/heldout.jsonl \
		--budget 50% --out demo-out --overwrite

# All tests; those of the compact format once more with the oldest PEFT of the supported range.
test: $(VENV)/ready-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal --quiet --durations 12
	PYTHONPATH=$(VENV)/peft-oldest $(BIN)/python -m pytest -n 2 --quiet tests/test_compact.py

# The serving engines' own code on what `lorapack expand` writes for them; 0.4 GB to download, nothing is installed.
engines: $(VENV)/ready-dev
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
		--python-version 3.11 --dest .cache/engines $(ENGINES)
	$(BIN)/python -m pytest --quiet tests/engines

# What `convert` makes for llama.cpp, loaded by llama.cpp (an npm package that ships its binary), and compared with what
# llama.cpp's own converter makes (in the source package of llama-cpp-python, which is not built).
llama: $(VENV)/ready-dev
	npm install --prefix $(LLAMA) --no-audit --no-fund --ignore-scripts --omit=optional \
		node-llama-cpp@$(NODE_LLAMA_CPP) @node-llama-cpp/linux-x64@$(NODE_LLAMA_CPP)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
		--dest $(LLAMA) llama-cpp-python==$(LLAMA_CPP_PYTHON)
	mkdir -p $(LLAMA)/llama.cpp
	tar --extract --gzip --file $(LLAMA)/llama_cpp_python-$(LLAMA_CPP_PYTHON).tar.gz --strip-components=3 \
		--directory $(LLAMA)/llama.cpp --wildcards '*/vendor/llama.cpp/conver*' '*/vendor/llama.cpp/gguf-py/*'
	$(BIN)/python -m pytest --quiet tests/engines/test_llama_cpp.py

# A hundred adapters on a Ray cluster of two nodes whose workers are killed; Ray (0.3 GB) is put beside the environment, not into it.
ray: $(VENV)/ready-dev
	$(PIP_AS_TESTED) --upgrade --target $(RAY) 'ray>=2.40'
	PYTHONPATH=$(RAY):$(CURDIR) $(BIN)/python -m pytest --quiet -rP tests/test_fleet_on_ray.py

lint: $(VENV)/ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/ready-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/ready
	$(BIN)/python docs/generate_cli.py > docs/cli.md
	$(BIN)/python benchmarks/quality/page.py

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_AS_TESTED) --editable .
	touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(PIP_AS_TESTED) --editable '.[dev]'
	$(PIP) --no-deps --upgrade --target $(VENV)/peft-oldest peft==$(OLDEST_PEFT)
	touch $@

clean:
	rm -rf $(VENV) demo-out
