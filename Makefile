# Everything a clone needs is set up by the targets themselves; see tools/workspace.py.
#   PYTHON=python3.12   the interpreter, from 3.10 to 3.13 (default: the first that will do)
#   PYTEST_ARGS="-k x"  handed to pytest
#   REFERENCE=0         without torch, and without the tests that compare with it
#   FUZZ="--limit 540"  options of tools/fuzz.py, for make fuzz
#   GPU_BENCH="--quick"  options of tools/gpu_benchmarks.py, for make gpu-bench
.PHONY: help demo test test-long fuzz test-fast test-oldest lint setup gpu-test gpu-bench clean

export PYTHON
NO_REFERENCE = $(if $(filter 0,$(REFERENCE)),--no-reference)

help:
	@echo "make demo   a lifecycle node answers robot commands, token by token"
	@echo "make test   all tests that need no GPU, on two cores"
	@echo "make test-long  the same with thousands of fuzz cases, all fields and architectures; an hour or more"
	@echo "make fuzz   20,000 cases for each fuzz test on all cores; figures go to benchmarks/results/fuzz.jsonl (FUZZ=--help)"
	@echo "make test-fast  the style check and the quick tests of the core, in less than a minute"
	@echo "make test-oldest  the core's tests with the oldest versions that the requirements allow"
	@echo "make lint   the checks of style and types alone"
	@echo "make gpu-test  the tests that need an NVIDIA GPU; outcomes go to benchmarks/results/gpu_tests.jsonl"
	@echo "make gpu-bench  the benchmarks of an NVIDIA GPU; figures go to benchmarks/results/gpu_bench.jsonl (GPU_BENCH=--help)"
	@echo "make clean  remove everything these made"

demo:
	@tools/start demo

test test-long test-fast:
	@tools/start $(NO_REFERENCE) $@ $(PYTEST_ARGS)

fuzz:
	@tools/start $(NO_REFERENCE) $@ $(FUZZ)

test-oldest:
	@$(or $(PYTHON),python3) tools/oldest.py test $(PYTEST_ARGS)

lint setup:
	@tools/start $(NO_REFERENCE) $@

gpu-test:
	@tools/start $(NO_REFERENCE) setup
	@tools/start $(NO_REFERENCE) run tools/gpu_tests.py $(PYTEST_ARGS)

gpu-bench:
	@tools/start $(NO_REFERENCE) setup
	@tools/start $(NO_REFERENCE) run tools/gpu_benchmarks.py $(GPU_BENCH)

clean:
	rm -rf build install log .venv .venv-* .demo .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
