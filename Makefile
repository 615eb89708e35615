# What a person types. `make setup` is a prerequisite of the rest, so a fresh clone needs only `make demo`.
#
#   make demo                                   engines of the demo checkpoint, and text from them
#   make test                                   the tests
#   make engines MODEL=<checkpoint directory> [TARGET=cpu|cuda|sm_120|…] [OUT=<engine directory>]
#   make engines MODEL=<config.json> TARGET=sm_120 WEIGHTS=none    engines of TensorRT alone, which hold no weights
#   make accuracy MODEL=<checkpoint directory> [TARGET=…] [OUT=…]   ONNX Runtime and engines against torch
#   make report                                 what was measured, with plots: build/report/index.html
#   make full-size                              the same for Qwen3.6-35B-A3B: time, memory and size

PYTHON ?= python3
BIN    := .venv/bin
TARGET ?= cpu
DEMO   := build/demo/cpu

export PYTHONPATH := .
export MODEL TARGET OUT WEIGHTS  # the shell reads them from its environment: names may hold blanks and quotes

.PHONY: setup demo test lint bench report engines accuracy full-size clean

setup: .venv/ready

.venv/ready: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'error: Tandem needs Python 3.11 or newer: make PYTHON=…')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@for d in .venv/lib/python3*/site-packages/tensorrt_rtx_libs; do test ! -d $$d || ln -sf libtensorrt_rtx.so.1 $$d/libtensorrt_rtx.so; done  # what its parser opens
	touch $@

engines: setup
	$(if $(MODEL),,$(error MODEL is missing: make engines MODEL=<checkpoint directory>))
	$(BIN)/python -m engines.build --model "$$MODEL" --target "$$TARGET" $${OUT:+--out "$$OUT"} $${WEIGHTS:+--weights "$$WEIGHTS"}

accuracy: setup
	$(if $(MODEL),,$(error MODEL is missing: make accuracy MODEL=<checkpoint directory>))
	@OUT="$${OUT:-build/$$(basename "$$(realpath "$$MODEL")" .json)/$$TARGET}"; test -e "$$OUT" || \
		$(BIN)/python -m engines.build --model "$$MODEL" --target "$$TARGET" --out "$$OUT" || exit; \
		$(BIN)/python -m runtime.accuracy --engines "$$OUT"

full-size: setup
	$(BIN)/python -m engines.build --model demo/qwen3.6-35b-a3b.json --weights none --target sm_120

$(DEMO)/manifest.json: .venv/ready $(wildcard demo/checkpoint/*) $(wildcard export/*.py plugins/*.py plugins/*/*.py engines/*.py)
	$(BIN)/python -m engines.build --model demo/checkpoint --target cpu --out $(DEMO)

demo: $(DEMO)/manifest.json
	@cat demo/prompt.txt
	@$(BIN)/python -m runtime.decode --engines $(DEMO) --prompt-file demo/prompt.txt --max-new-tokens 150 \
		--mtp-k 2 --temperature 0.6 --top-p 0.95 --seed 4

test: setup
	$(BIN)/python -m pytest -q -n 2 tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

bench: $(DEMO)/manifest.json
	$(BIN)/python -m runtime.bench --engines $(DEMO) --model demo/checkpoint --out build/bench.json

build/bench.json: $(DEMO)/manifest.json
	$(BIN)/python -m runtime.bench --engines $(DEMO) --repeats 2 --out $@

report: build/bench.json
	$(BIN)/python -m runtime.report

clean:
	rm -rf build
