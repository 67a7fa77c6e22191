# Every target does its own set-up; `setup` does nothing where nothing changed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: setup demo test test-unit verify generate lint lock sbom faults matrix clean
.PHONY: bench bench-operator bench-trainer bench-prepare bench-sizing bench-recovery

setup: $(STAMP)

# torch comes first and alone: resolved together with others, a newer CUDA build could be chosen. DeepSpeed's sdist
# imports torch while it builds, so it is built in this environment, without its CUDA operators.
$(STAMP):
	$(PYTHON) -m venv .venv
	$(PIP) setuptools wheel packaging hatchling editables
	$(PIP) torch==2.13.0
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	$(PIP) --no-build-isolation --editable '.[trainer,sandbox,dev]'
	@rm -f .venv/installed-* && touch $@

demo: setup
	$(BIN)/python examples/demo/demo.py

# Most tests wait more than they compute; those with ranks of their own do not.
test: setup
	$(BIN)/python -m pytest -n 3 --dist loadfile -m "not gang"
	$(BIN)/python -m pytest -n 2 --dist loadfile -m gang tests/e2e tests/integration tests/faults

test-unit: setup
	$(BIN)/python -m pytest tests/unit tests/contract

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/hadolint operator/Dockerfile trainer_image/Dockerfile

generate: setup
	$(BIN)/finetune crds --directory crds
	cp crds/*.yaml charts/finetune-operator/crds/
	$(BIN)/python tools/dashboards.py
	$(BIN)/python tools/filemap.py
	$(BIN)/python tools/deploy.py

verify: lint generate
	@test -z "$$(git status --porcelain -- crds charts deploy README.md)" || \
	  { git diff -- crds charts deploy README.md; git status --short -- crds charts deploy README.md; \
	    echo "generated files differ from their sources: run make generate and commit what it writes" >&2; exit 1; }

# What the images install, with hashes: after a change of constraints.txt.
lock: setup
	$(BIN)/python tools/lock.py

sbom: setup
	$(BIN)/python tools/lock.py --sbom dist

# Every case instead of the sample of `make test`; `make faults ONLY=tests/faults/test_api_verbs.py` runs a part again.
faults: setup
	$(BIN)/python -m pytest --whole --write-report $(or $(ONLY),tests/faults)

# What benchmarks/matrix/results.json has already is not run again: `make matrix ONLY='dpo-* kto-*'`, or AGAIN=1.
matrix: setup
	$(BIN)/python benchmarks/matrix/run.py $(if $(ONLY),--only $(ONLY)) $(if $(AGAIN),--again)

bench: bench-operator bench-trainer bench-prepare bench-sizing bench-recovery

bench-recovery: setup
	$(BIN)/python benchmarks/recovery/bench.py --keep

bench-operator: setup
	$(BIN)/python benchmarks/operator/bench.py --jobs 200 2000 --idle 10000

# PEERS="llamafactory=/path/to/its/python": LLaMA-Factory pins other versions than ours, so it lives in its own environment.
bench-trainer: setup
	$(BIN)/python benchmarks/trainer/bench.py $(foreach peer,$(PEERS),--peer $(peer))

bench-prepare: setup
	$(BIN)/python benchmarks/prepare/bench.py --mib 256 2048 --keep

bench-sizing: setup
	$(BIN)/python benchmarks/sizing/measure.py --keep

clean:
	rm -rf .venv .sandbox build dist
