# The commands of this project. `make demo` shows it, `make test` tests it; both set themselves up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-servers test-rest test-full coverage lint clean

demo: $(VENV)/installed
	$(BIN)/seedvc-train --demo

# Side by side: the servers' tests mostly wait, the others mostly compute.
test: $(VENV)/installed
	$(MAKE) --jobs=2 test-servers test-rest

test-servers: $(VENV)/installed
	$(BIN)/pytest tests/remote

test-rest: $(VENV)/installed
	$(BIN)/pytest --ignore=tests/remote

test-full: $(VENV)/installed
	$(BIN)/pytest --full --reliability

coverage: $(VENV)/installed
	$(BIN)/pytest --cov --cov-report=term

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	-tests/faults/install_tools
	-tests/remote/install_servers
	-tests/train/fetch_seedvc_wheel
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
