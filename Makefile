# `make demo` and `make test` set themselves up: all they need is Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin
PORT ?= 3000
NODES ?= 2
TARGET ?= desk
IMAGE ?= mlpipes$(if $(filter-out desk,$(TARGET)),-$(TARGET)):0.1.0
DOCKER ?= docker

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "mlpipes needs Python 3.11 or newer; name one: make PYTHON=python3.12 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: install demo dev test quick test-long test-all test-cluster test-week test-docker test-gpu checks definitions format lint types bench bench-page chaos chaos-cluster cluster cluster-down cluster-programs images hashes clean
install: .venv/.installed

demo: install
	$(BIN)/mlpipes demo

dev: install
	$(BIN)/mlpipes dev --port $(PORT) $(if $(MLFLOW),--mlflow)

# A module's tests share fixtures, so they stay together; the longest modules go first.
PYTEST = $(BIN)/pytest --dist loadfile --no-loadscope-reorder --durations 15

# What a change of code can break. What takes seconds first; types, which take a minute of one core, beside the tests.
test: lint definitions
	$(MAKE) --jobs types quick

# Four processes for two cores, for Ray and Dagster wait a lot; browsers do not.
quick: install
	$(PYTEST) -n 4 -m "not (long or slurm or browser or chaos or documents or cluster or docker or gpu)"

# What a laptop, a Slurm and a browser can show, in minutes each; what a program is missing for is skipped, and says so.
test-long: install
	$(PYTEST) -n 2 -m "(long or slurm or browser or chaos or documents) and not (cluster or docker or gpu)"

# All but the Kubernetes cluster, Docker and a GPU.
test-all: export FUZZ_FILES = 4000
test-all:
	$(MAKE) test
	$(MAKE) test-long

# On a real Kubernetes, which this builds (once, about 20 CPU-minutes) and starts.
test-cluster: install cluster-programs
	$(BIN)/pytest -m cluster

# What any cluster has every week, in one training; builds only the programs that it needs.
test-week: install
	$(BIN)/pytest -m cluster mlpipes_tests/integration/test_kubernetes_week.py

# The images, which this builds, and compose.yaml, with a Docker daemon of its own.
test-docker: install
	$(BIN)/pytest -m docker

# Where there is a GPU.
test-gpu: install
	$(BIN)/pytest -m gpu

# Beside each other: types take as long as the rest, on one core.
checks: install
	$(MAKE) --jobs --output-sync lint types definitions

# Without a trace in the checkout, where tests that run meanwhile look for such.
definitions: install
	home=$$(mktemp -d) && trap 'rm -r $$home' EXIT && DAGSTER_HOME=$$home $(BIN)/dagster definitions validate -w workspace.yaml

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/pyright

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# All benchmarks, or PARTS="vision text"; with AGAINST=<commit>, in turns with that one's.
bench: install
	$(BIN)/python -m mlpipes_tests.benchmarks $(PARTS) $(if $(AGAINST),--against $(AGAINST)) --rounds $(or $(ROUNDS),1)

# docs/benchmarks.md and its pictures, from what `make bench` found.
bench-page: install
	$(BIN)/python -m mlpipes_tests.benchmarks.page benchmarks.json

chaos: install
	$(BIN)/python -m mlpipes_tests.chaos $(or $(N),1)

# A desk and its trainings on a real Kubernetes, struck N times by whatever a cluster can lose; as root.
chaos-cluster: install cluster-programs
	$(BIN)/python -m mlpipes_tests.chaos.kubernetes $(or $(N),1)

# A Kubernetes of one's own to look at; it stays until `make cluster-down`.
cluster: install
	$(BIN)/python -m mlpipes_tests.cluster up $(NODES)

cluster-down: install
	$(BIN)/python -m mlpipes_tests.cluster down

cluster-programs: install
	$(BIN)/python -m mlpipes_tests.cluster.build

# The image of a desk's and a cluster's parts, or `TARGET=serve`, `batch`, `sagemaker`; BUILD has more options of `docker build`, such
# as --build-arg BASE=….
images:
	$(DOCKER) build --target $(TARGET) --build-arg REVISION=$(shell git rev-parse HEAD 2>/dev/null) $(BUILD) --tag $(IMAGE) \
		--file deploy/docker/Dockerfile .

# The digests of what images are made of, for machines and a Python like these; after a change of requirements or constraints.
hashes: install
	$(BIN)/pip install --quiet --dry-run --ignore-installed --report - -c constraints.txt '.[kubernetes,minilm]' \
		| $(BIN)/python deploy/docker/hashed.py > .venv/hashes.txt
	mv .venv/hashes.txt deploy/docker/hashes/$(shell uname -m)-$(shell $(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
