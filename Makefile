# make demo   sets everything up, compresses the bundled model, checks it, reloads it, serves it, prints one table
# make test   sets everything up and runs all checks and tests
# make gpu    sets everything up and runs what needs CUDA; skips it without
#
# PYTHON names the interpreter that the environments are made with (3.10 or later; the pins are for 3.11).

PYTHON ?= python3
export PYTHON
export HF_HUB_OFFLINE = 1

MODEL_ENV = .venv/ready
SERVING_ENV = .venv-vllm/ready

.PHONY: demo test lint fast serving gpu browser clean

demo: $(MODEL_ENV) $(SERVING_ENV)
	.venv/bin/python scripts/demo.py

test: lint fast serving

lint: $(MODEL_ENV)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

fast: $(MODEL_ENV) browser
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -m "not serving and not gpu" -n 2 --dist worksteal

browser:
	scripts/ensure-browser.sh

serving: $(MODEL_ENV) $(SERVING_ENV)
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -m serving -n 2 --dist loadfile --no-loadscope-reorder

gpu: $(MODEL_ENV)
	.venv/bin/python -m pytest -q -s -m gpu tests/gpu

$(MODEL_ENV): scripts/make-env.sh constraints/reference.txt pyproject.toml
	@echo "Making .venv (some minutes the first time)"
	scripts/make-env.sh
	@touch $@

$(SERVING_ENV): scripts/make-vllm-env.sh constraints/vllm.txt serving/pyproject.toml $(wildcard serving/src/*/*.py)
	@echo "Making .venv-vllm (some minutes the first time)"
	scripts/make-vllm-env.sh
	@touch $@

clean:
	rm -rf .venv .venv-vllm out
