# `make demo` and `make test` each do everything on a fresh machine: environment, installation, run.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
DEMO := outputs/demo

.PHONY: install demo test reliability style quality

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# A real QLoRA run on drawn skin images: the same commands a user runs, from the annotation file to the evaluation's page.
demo: install
	rm -rf $(DEMO)
	$(BIN)/python -m demo.draw --out $(DEMO)/raw
	$(BIN)/python -m demo.tiny_model --annotations $(DEMO)/raw/annotations.json --out $(DEMO)/base
	$(BIN)/python -m data_prep convert --annotations $(DEMO)/raw/annotations.json --images $(DEMO)/raw/images --out $(DEMO)/data
	$(BIN)/accelerate launch --num_processes 1 train_sft.py --config configs/demo.yaml
	$(BIN)/python eval_sft.py --adapter $(DEMO)/adapter --dataset $(DEMO)/data --baseline --min-group 5 --max-new-tokens 16
	@echo "curves                    $(DEMO)/adapter/training_metrics.png"

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Runs that are really killed, many times, the slow tests, and ten minutes of fuzzing.
reliability: install
	$(BIN)/python -m benchmarks.reliability
	$(BIN)/python -m pytest -m slow
	FUZZ_EXAMPLES=14000 $(BIN)/python -m pytest tests/unit/test_fuzz.py

style: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
