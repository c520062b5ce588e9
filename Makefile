# The virtual environment, a local coordinator, the tests, the linters. CONTRIBUTING.md lists the targets.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

SHELL = /bin/bash
.SHELLFLAGS = -o pipefail -c

# The tests start hundreds of programs, which would compile what they import each time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run fly test test-unit test-integration test-e2e coverage load soak proof chaos api overshoot bench lock images image-test engines-test engines-chaos matrix lint format clean

run: $(VENV)/installed
	@echo
	@echo "  bfaas is starting on this machine. In another terminal, try:"
	@echo
	@echo "      curl -sN localhost:8000/run -d uptime"
	@echo
	WORKER_APP=$${WORKER_APP:-mock} MAXREQTIME=$${MAXREQTIME:-10s} MAXPERCLIENT=$${MAXPERCLIENT:-1000} POOLSIZE=$${POOLSIZE:-4} \
	POOL_STANDBY=$${POOL_STANDBY:-$${POOLSIZE:-4}} $(BIN)/twistd -n --pidfile= bfaas-coord

# The same, configured as on Fly, with an emulator of the Machines API on this host.
fly: $(VENV)/installed
	@echo
	@echo "  The Machines API, its proxy and a coordinator are starting. In another terminal, try:"
	@echo
	@echo "      curl -sN localhost:8000/run -d uptime"
	@echo "      FLY_TOKEN=local WORKER_APP=workers FLY_FLAPS_BASE_URL=http://127.0.0.1:4280 $(BIN)/bfaas machines"
	@echo
	trap 'kill 0' EXIT; \
	FLY_TOKEN=local $(BIN)/twistd -n --pidfile= bfaas-machines & \
	FLY_TOKEN=local WORKER_APP=workers WORKER_IMAGE=basher:local FLY_REGION=local \
	FLY_MACHINE_ID=$${FLY_MACHINE_ID:-coord-1} MAXREQTIME=$${MAXREQTIME:-10s} \
	PRIVATE=$$($(BIN)/bfaas genkey | sed -n 's/^PRIVATE=//p') \
	FLY_FLAPS_BASE_URL=http://127.0.0.1:4280 WORKER_URL=http://127.0.0.1:4281 \
	$(BIN)/twistd -n --pidfile= bfaas-coord --listen tcp:8000:interface=127.0.0.1

# Trial runs its own cases, pytest (with pytest-twisted) the end-to-end tests, side by side: most of these wait. The
# output of each appears at its end, with its ten slowest tests. UNIT_TRIAL runs the unit tests, which `.ci/run` measures
# the coverage of.
TRIAL = $(BIN)/trial
UNIT_TRIAL = $(TRIAL)
SLOWEST = 2>&1 | $(BIN)/python -m tests.support.slowest
test: $(VENV)/installed-test
	$(MAKE) --no-print-directory --jobs=3 --output-sync=target test-unit test-integration test-e2e

test-unit: $(VENV)/installed-test
	$(UNIT_TRIAL) --reporter=timing tests.unit $(SLOWEST)

test-integration: $(VENV)/installed-test
	$(TRIAL) --reporter=timing tests.integration tests.project tests.simulation $(SLOWEST)

test-e2e: $(VENV)/installed-test
	$(BIN)/python -m pytest --numprocesses=4 --dist=worksteal --durations=10 tests/e2e

# Statement and branch coverage of bfaas/ by all tests, in every process that exits normally: build/coverage/html.
coverage: $(VENV)/installed-test
	$(BIN)/python -m tests.project.measure_coverage

# The long form of the end-to-end tests.
load: $(VENV)/installed-test
	BFAAS_RUNS=500 BFAAS_MEGABYTES=200 BFAAS_CONNECTIONS=2000 $(BIN)/python -m pytest tests/e2e

# The simulation's long form: ten thousand episodes, or as many as SEEDS says.
soak: $(VENV)/installed-test
	$(BIN)/python -m tests.simulation.run $(or $(SEEDS),10000)

# The rest of the simulation: the exhaustive search, the coverage of the pool's lines, the mutants.
proof: $(VENV)/installed-test
	$(BIN)/python -m tests.simulation.exhaustive 6
	$(BIN)/python -m tests.simulation.coverage_search
	$(BIN)/python -m tests.simulation.mutants

# A hundred rounds of killed and stopped coordinators, workers and emulators; BFAAS_SEED chooses others.
chaos: $(VENV)/installed-test
	BFAAS_ROUNDS=$${BFAAS_ROUNDS:-100} $(BIN)/python -m pytest -s tests/e2e/test_chaos.py

# docs/openapi.yaml against a coordinator: two hundred requests of each kind, chosen by schemathesis.
api: $(VENV)/installed-test
	BFAAS_EXAMPLES=$${BFAAS_EXAMPLES:-200} $(BIN)/python -m pytest tests/e2e/test_openapi.py -k schemathesis

# How long after MAXREQTIME clients receive the end of their runs, on a busy host. Takes minutes.
overshoot: $(VENV)/installed-test
	$(BIN)/python -m benchmarks.overshoot

# All benchmarks, in a quarter of an hour. Prints tables; JSON and plots are in build/bench.
bench: $(VENV)/installed-test
	$(BIN)/python -m benchmarks

# The packages of the images: the versions that are installed here.
lock: $(VENV)/installed-test
	$(BIN)/python -m tests.project.lock > requirements.lock

# The images, built with docker, or with buildah: BUILD="buildah build --isolation chroot".
images:
	$(or $(BUILD),docker build) --target coord --tag bfaas-coord .
	$(or $(BUILD),docker build) --target basher --tag bfaas-basher .

# Check the images that buildah has built. As root.
image-test: $(VENV)/installed-test
	$(BIN)/python -m tests.project.images

# Containers on a real Docker and a real Podman, each with its own image, as root. Both are built at first, in minutes.
engines-test: $(VENV)/installed-test
	set -e; for engine in docker podman; do \
	    $(BIN)/python -m tests.support.engines $$engine $(BIN)/trial tests.integration.test_containers; \
	    $(BIN)/python -m tests.support.engines $$engine $(BIN)/python -m pytest tests/e2e/test_engine.py; \
	done

# Rounds in which these engines, the coordinator, or both are killed under load.
engines-chaos: $(VENV)/installed-test
	set -e; for engine in docker podman; do \
	    BFAAS_ROUNDS=$${BFAAS_ROUNDS:-15} $(BIN)/python -m tests.support.engines $$engine \
	        $(BIN)/python -m pytest -s tests/e2e/test_engine.py -k engine_and_coordinator_are_killed; \
	done

# The trial cases on each supported Python that is installed, with the lowest and the newest versions of what
# pyproject.toml declares. PYTHONS="python3.12 ..." chooses others.
matrix: $(VENV)/installed-test
	$(BIN)/python -m tests.project.matrix $(PYTHONS)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# venv installs pip last. Without Debian's python3-venv it is missing, so the next make tries again.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is required: set PYTHON")'
	$(PYTHON) -m venv --clear $(VENV)

$(VENV)/installed: $(VENV)/bin/pip pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/bin/pip pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis _trial_temp* build dist
