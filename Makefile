# `make demo` and `make test` are the two commands of this project; both work from a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/pytest -n auto --dist worksteal --durations=15
STAMP := .venv/installed
PEERS := diffusers optimum-onnx optimum-intel openvino-genai
BUILT_PEERS := stable-diffusion-cpp

.PHONY: demo test coverage compiled adapters types peers interop clean

demo: $(STAMP)
	$(BIN)/anamorph demo --out out/demo.png

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory types
	$(PYTEST)

# Apart from `test`: watching every line takes nearly as long as running it.
coverage: $(STAMP)
	$(PYTEST) --cov=anamorph --cov-report=term:skip-covered

# Every pipeline by torch.compile, too, and what is demanded of engines that compile: an hour of a C++ compiler.
compiled: $(STAMP)
	ANAMORPH_COMPILED=1 $(BIN)/pytest -k 'compile or aotinductor' tests/test_tasks_exported.py \
		tests/test_sdxl_exported.py tests/test_conditioned.py tests/test_unconditional.py tests/test_lora.py \
		tests/test_compiled_nets.py tests/test_torch_formats.py
	$(BIN)/python -m anamorph.testing compile aotinductor

# The table of tasks, adapters and engines: most of the hour is spent in C++ compilers. Stopped, it goes on from there.
adapters: $(STAMP)
	$(BIN)/python tests/adapter_table.py

# Type checkers cannot follow the editable finder, so what ships is installed into a folder and checked there.
types: $(STAMP)
	rm -rf build/typecheck build/lib
	$(BIN)/pip install -q . --no-deps --no-build-isolation --target build/typecheck
	MYPYPATH=build/typecheck $(BIN)/mypy -p anamorph

# Other tools, each in an environment of its own: their packages exclude one another. `anamorph bench` measures them.
# Those of BUILT_PEERS are compiled, which takes minutes.
peers: $(PEERS:%=build/peers/%/installed) $(BUILT_PEERS:%=build/peers/%/installed)

# They open our folders and we theirs.
interop: $(STAMP) $(PEERS:%=build/peers/%/installed)
	$(BIN)/python -m anamorph.benchmarks.interop

# The lists are complete, so nothing is resolved: a resolver would bring in torch's packages for CUDA.
build/peers/%/installed: benchmarks/peers/%.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q --no-deps -r $<
	touch $@

# The stamp is written last: an interrupted installation starts again.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[all,test]'
	touch $(STAMP)

clean:
	rm -rf .venv build out .mypy_cache .ruff_cache .pytest_cache .coverage
