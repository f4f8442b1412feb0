# One environment (.venv), one command for each job. `make help` lists the jobs.

# Which Python to build .venv from, e.g. make PYTHON=python3.12; any from 3.10 will do
PYTHON ?=
# Tests and chapters that run at the same time
JOBS ?= 2
EXTRAS := book,test,dev

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
READY := $(VENV)/.ready
# One thread for each process: small recurrent steps run many times slower on a shared pool of threads.
ONE_THREAD := OMP_NUM_THREADS=1

# A broken interpreter (after an upgrade of the system's Python, say) makes the environment anew.
ifneq ($(shell $(PY) -c 'print(1)' 2>/dev/null),1)
.PHONY: $(READY)
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-print-directory

##@ Read
book: $(READY)                 ## execute the chapters and build the pages
	@$(ONE_THREAD) $(PY) tools/build_book.py --jobs $(JOBS)

lab: $(READY)                  ## open the chapters in JupyterLab
	@$(PY) -m jupyterlab $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS) book

serve: $(READY)                ## show the built book on localhost (PORT=8000 chooses the port)
	@test -f _build/html/index.html || $(MAKE) book
	@$(PY) tools/serve.py _build/html $(PORT)

##@ Check
test: test-unit test-notebooks test-pages   ## run every test: the three below

test-unit: $(READY)            ## ... the package: unit tests and doctests
	@printf '\n== Unit tests and doctests\n'
	@$(ONE_THREAD) $(PY) -m pytest -n $(JOBS) --dist loadfile --ignore=tests/notebooks --ignore=tests/pages $(ARGS)

test-notebooks: $(READY)       ## ... every cell of every chapter
	@printf '\n== Notebooks\n'
	@$(ONE_THREAD) $(PY) -m pytest -n $(JOBS) --dist loadfile --nbval-lax --nbval-cell-timeout=300 tests/notebooks book $(ARGS)

test-pages: book               ## ... the built pages in Chromium
	@printf '\n== Pages in Chromium\n'
	@$(PY) -m pytest tests/pages $(ARGS)

mutate: $(READY)               ## break the package one term at a time; tests must notice (ARGS="lstm" chooses)
	@$(ONE_THREAD) $(PY) tools/mutate.py $(ARGS)

lint: $(READY)                 ## check style, spelling, and that notebooks carry no stray output
	@tools/lint.sh check

format: $(READY)               ## repair what lint can repair
	@tools/lint.sh repair

bench: $(READY)                ## time rnnkernels against torch.nn on this machine
	@$(PY) -m benchmarks $(ARGS)

gpu-visit: $(READY)            ## on a machine with a GPU: checks, benchmarks, tuning; again, to go on
	@$(PY) benchmarks/gpu_visit.py $(ARGS)

##@ Maintain
env: $(READY)                  ## create .venv and install everything at the pinned versions
	@echo "The environment is ready: . $(BIN)/activate"

$(READY): pyproject.toml constraints.txt tools/environment.sh | space
	@PYTHON="$(PYTHON)" tools/environment.sh $(VENV) $(EXTRAS)
	@touch $@

# Checked before everything else, since few tools report a full disk well
space:
	@tools/check_space.sh 200

# uv keeps the versions that constraints.txt already has; UV_ARGS="--upgrade" or "--upgrade-package torch" renews them.
constraints: $(READY)          ## resolve constraints.txt anew from pyproject.toml, for all Pythons at once
	@$(PY) -m pip install --quiet uv
	@$(PY) -m uv pip compile --quiet --universal --python-version 3.10 --all-extras --no-annotate \
		--custom-compile-command "make constraints" $(UV_ARGS) pyproject.toml --output-file constraints.txt

clean:                         ## remove the built book and the tools' caches
	rm -rf _build .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find book rnnkernels tests benchmarks tools -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

distclean: clean               ## remove .venv as well
	rm -rf $(VENV)

help:                          ## list these commands
	@awk 'BEGIN { FS = ":.*##" } /^##@/ { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z-]+:.*##/ { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

.PHONY: bench book clean constraints distclean env format gpu-visit help lab lint mutate serve space test test-notebooks test-pages test-unit
