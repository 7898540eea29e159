# Every target builds the environment it needs; a second call starts at once.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SEED ?= 1

.PHONY: demo teach quick test test-all test-lowest fuzz kill system lint format bars algorithms curves bench growth headline architecture clean
demo: $(VENV)/.installed
	$(BIN)/deep-rlhf demo --seed=$(SEED)

# Teach a small language model your taste in the browser. TEACH takes flags, as in make teach TEACH=--port=9000.
teach: $(VENV)/.installed
	$(BIN)/deep-rlhf teach $(TEACH)

# Tests, in three sizes. What each marker means is in pyproject.toml; how long each target takes, in CONTRIBUTING.md.
# Workers take whole files, so that what a file's tests share is built once.
WORKERS ?= 2
QUICK = not (slow or browser or postgres or processes or learning or timing)
IN_PARALLEL = --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder --durations=10

# While programming: unit tests, the store on SQLite, the page without a browser.
quick: $(VENV)/.installed
	$(BIN)/pytest $(IN_PARALLEL) -m '$(QUICK)'

# Before a commit.
test: $(VENV)/.installed
	$(BIN)/pytest $(IN_PARALLEL) -m 'not (slow or timing)'

# Before a release: every case, and what measures time with nothing beside it.
test-all: $(VENV)/.installed
	$(BIN)/pytest $(IN_PARALLEL) -m 'not timing'
	$(BIN)/pytest -m timing

# Commands on damaged input, 1,000 cases chosen by a seed. FUZZ takes options, as in
# make fuzz FUZZ='--seed 7 --cases 200 --kinds stores,flags', or FUZZ='--case 7:123 --keep' to repeat one case.
FORKED = PYTHONPATH=tests OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true JE_ARROW_MALLOC_CONF=background_thread:false
fuzz: $(VENV)/.installed
	$(FORKED) $(BIN)/python -m fuzz $(FUZZ)

# Training commands killed 50 times at random moments, continued and compared with undisturbed runs, bit for bit.
# KILL takes options, as in make kill KILL='--seed 7 --chains dpo'.
kill: $(VENV)/.installed
	$(FORKED) $(BIN)/python -m fuzz.kills $(KILL)

# The browser and the database server that some tests need, and skip without; on Debian, as root.
system:
	@command -v chromium > /dev/null && ls /usr/lib/postgresql/*/bin/initdb > /dev/null || \
		{ apt-get update --quiet=2 && apt-get install --yes --quiet=2 --no-install-recommends \
			chromium fonts-dejavu-core postgresql; }

# The quick tests with the lowest versions that pyproject.toml allows, in an environment of its own. torch stays at the
# pinned version, which pip installs first: of another one, PyPI has only the build with 3 GB of CUDA libraries.
# `make test-lowest TORCH=2.10.0` takes that.
TORCH ?= $(shell sed -n 's/^torch==\([^ ]*\).*/\1/p' constraints.txt)
test-lowest: .venv-lowest/.installed
	.venv-lowest/bin/python -m pytest $(IN_PARALLEL) -m '$(QUICK)'
	sha256sum pyproject.toml > .ci/lowest.sha256

.venv-lowest/.installed: pyproject.toml
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv torch==$(TORCH)
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct \
		--editable '.[all]' torch==$(TORCH)
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --editable '.[dev]'
	touch $@

# The demo at three seeds against its bars.
bars: $(VENV)/.installed
	$(BIN)/python benchmarks/demo_seeds.py

# Every algorithm on the task whose optimum is known, and the pictures of docs/algorithms.md.
algorithms: $(VENV)/.installed
	$(BIN)/python benchmarks/algorithms.py

# What a label is worth: the judge's score against the number of labels, online and offline, by each choice of questions.
curves: $(VENV)/.installed
	$(BIN)/python benchmarks/curves.py $(CURVES)

# This project and TRL side by side: docs/speed.md. BENCH takes options, as in make bench BENCH='--jobs ppo-fp32'.
bench: $(VENV)/.installed .peers/ppo/.installed .peers/reward/.installed
	$(BIN)/python benchmarks/speed.py $(BENCH)

# Time and memory of PPO against batch size, response length and prompt length: docs/growth.md.
growth: $(VENV)/.installed
	$(BIN)/python benchmarks/growth.py

# The original's PPO command with whole prompts in 8 GiB. HEADLINE takes flags of ppo.py, as in HEADLINE=--precision=fp32.
headline: $(VENV)/.installed
	$(BIN)/python benchmarks/headline.py $(HEADLINE)

# The picture of docs/architecture.md, drawn from the imports.
architecture: $(VENV)/.installed
	$(BIN)/python docs/draw_architecture.py

# torch first and alone, by the same constraints as the project's own, so that both sides run the same build.
.peers/%/.installed: benchmarks/peers/requirements-%.txt constraints.txt
	$(PYTHON) -m venv .peers/$*
	.peers/$*/bin/python -m pip install --quiet --constraint constraints.txt torch
	.peers/$*/bin/python -m pip install --quiet --constraint constraints.txt --requirement $<
	touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-lowest .peers outputs .mypy_cache .ruff_cache .pytest_cache
