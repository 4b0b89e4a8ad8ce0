# make book        build the HTML book, print where it is
# make book-student   the same without solutions, and such notebooks, for a class
# make slides      the decks of reveal.js, into the folder of the built book (make book does it, too)
# make handouts    a PDF of each chapter, into build/handouts (SITE=_build/student/html: without solutions)
# make usb         one zip for a room without a network, into build/ (WHEELS=no: a small one)
# make test        lint, types, unit tests, every notebook at budget smoke
# make coverage    the tests of `make test`, and the share of lines that they run, with a floor
# make test-slow   the tests that take more than some seconds, and a fault in every function
# make test-site   open every page of the book in a browser
# make test-cpu    every notebook at budget cpu (minutes each)
# make attack      ten thousand damaged inputs, from a seed (COUNT=, SEED=; about four minutes)
# make notebooks   execute the notebooks at budget cpu and write them (NAMES="01 03" for some)
# make bench       speed and memory beside other libraries, into results/ (under ten minutes)
# make gpu-results all tables of Sun (2025) in 3D on a GPU, into results/; run again, it goes on
#                  (DATA=folder: the tables of a prepared set; MINUTES=10: a piece of ten minutes)
# make gpu-ten-minutes  what a GPU can measure in ten minutes, into results/
#                  (both with VENV=no PYTHON=python3: in an environment that is there, as in Colab)
# make gift        the quizzes of the chapters for Moodle, into build/quizzes/
# make wheel       wheel and source distribution, into dist/
# make wheel-test  install the wheel alone into a clean environment and register with it (minutes)
# make colab-test  each notebook alone in an empty folder, with Colab's versions and the wheel
#                  (NAMES="08" for some; 6 GB, most of it PyTorch, and about ten minutes)
# make lint        what CI says about style and types; make format repairs the style
# make clean       remove what was built; .venv stays
#
# Each target sets up .venv by itself, again when pyproject.toml or constraints.txt change.

SHELL := /bin/bash
BIN := .venv/bin
READY := .venv/.ready
# The first of these that works makes .venv: make PYTHON=... chooses another.
PYTHON ?= python3.11 python3.12 python3.13 python3
EXTRAS := train,notebook,book,baselines,compare,data,dev
NBVAL := --nbval-lax --nbval-current-env --nbval-sanitize-with=tests/nbval.ini

# Notebooks train in a folder of their own, so that none goes on from a run of older code.
FRESH := home=$$(mktemp -d) && trap 'rm -rf "$$home"' EXIT && REGKIT_HOME=$$home

BENCH := -m pytest benchmarks/bench.py --disable-warnings --quiet -p no:cacheprovider \
    --benchmark-columns=min,median,rounds --benchmark-sort=fullname

# Percent of the lines of regkit/ that `make coverage` runs, at least: today it is 96.2, and machines differ.
COVERAGE := 95.5

.DEFAULT_GOAL := help
.PHONY: help book book-student slides handouts usb test unit coverage test-slow test-site test-cpu attack \
    notebooks bench gpu-results gpu-ten-minutes lint format gift wheel wheel-test colab-test clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(READY): pyproject.toml constraints.txt
	@rm -f $@; \
	if ! [ -x $(BIN)/python ]; then \
	    found=; \
	    for python in $(PYTHON); do \
	        if $$python -c 'import ensurepip, sys; assert (3, 11) <= sys.version_info < (3, 14)' \
	            >/dev/null 2>&1; then found=$$python; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "No Python 3.11 to 3.13 with venv is here (tried: $(PYTHON)): install one." >&2; exit 1; \
	    fi; \
	    if [ $$found != python3.11 ]; then echo "No python3.11 here: .venv is made with $$found."; fi; \
	    $$found -m venv .venv || exit 1; \
	fi
	@echo "Setting up .venv (about 2.5 GB, some minutes the first time)."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@touch $@

book: $(READY)
	@rm -rf _build  # an incremental build does not copy changed static files
	$(BIN)/jupyter-book build -W -n --keep-going .
	@$(BIN)/python book/tools/slides.py _build/html >/dev/null
	@echo "The book: $(CURDIR)/_build/html/index.html"

# What is shipped stands in html and notebooks; Sphinx's own copies of the sources do not stay.
book-student: $(READY)
	@rm -rf _build/student
	$(BIN)/python book/tools/notebooks.py student _build/student/notebooks
	REGKIT_STUDENT=1 $(BIN)/jupyter-book build -W -n --keep-going --path-output _build/student \
	    --toc _build/student/notebooks/_toc.yml .
	@mv _build/student/_build/html _build/student/html && rm -rf _build/student/_build
	@rm _build/student/notebooks/_toc.yml
	@echo "The book without solutions: $(CURDIR)/_build/student/html/index.html"

slides: $(READY)
	$(BIN)/python book/tools/slides.py _build/html $(NAMES)

SITE ?=
handouts: $(READY) $(if $(SITE),,book)
	$(BIN)/python book/tools/handouts.py $(or $(SITE),_build/html) build/handouts $(NAMES)

# Pages, slides, notebooks, regkit, and the wheels of its libraries, unless WHEELS=no: for the Python
# and the system of .venv, or for USB_PLATFORM (such as win_amd64) and USB_PYTHON (such as 3.12).
# A class gets the book without solutions: make book-student, and then
# make usb SITE=_build/student/html NOTEBOOKS=_build/student/notebooks (the book is not built again).
WHEELS ?= yes
NOTEBOOKS ?= notebooks
USB_PLATFORM ?=
USB_PYTHON ?= 3.11
ELSEWHERE := $(if $(USB_PLATFORM),--platform $(USB_PLATFORM) --python-version $(USB_PYTHON) \
    --only-binary=:all:)
usb: $(READY) $(if $(SITE),,book) wheel
	@$(BIN)/python book/tools/slides.py $(or $(SITE),_build/html) >/dev/null
	$(if $(filter no,$(WHEELS)),,$(BIN)/pip download --quiet --disable-pip-version-check --dest build/wheels \
	    --constraint constraints.txt $(ELSEWHERE) "$$(ls dist/*.whl)[notebook]" jupyterlab)
	$(BIN)/python book/tools/usb.py build/regkit-course.zip dist/*.whl --site $(or $(SITE),_build/html) \
	    --notebooks $(NOTEBOOKS) $(if $(filter no,$(WHEELS)),,--wheels build/wheels)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint unit

# One thread and two workers; the cells of one notebook stay on one worker.
unit: $(READY)
	$(FRESH) REGKIT_BUDGET=smoke OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
	    -n 2 --dist loadfile $(NBVAL) --nbval-cell-timeout=300 -m 'not slow' \
	    $(COV) --ignore=tests/site tests notebooks

# The same, with the lines that it runs.
coverage: COV := --cov=regkit --cov-report=term:skip-covered --cov-fail-under=$(COVERAGE)
coverage: unit

test-slow: $(READY)
	REGKIT_BUDGET=smoke OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
	    -n 2 --dist load -m slow --ignore=tests/site tests

COUNT ?= 10000
SEED ?= 0
attack: $(READY)
	REGKIT_BUDGET=smoke OMP_NUM_THREADS=1 $(BIN)/python tests/attack.py --count $(COUNT) --seed $(SEED)

test-cpu: $(READY)
	$(FRESH) REGKIT_BUDGET=cpu $(BIN)/python -m pytest \
	    $(NBVAL) --nbval-cell-timeout=1200 --timeout=1800 notebooks

test-site: book book-student
	$(BIN)/python -m pytest tests/site

notebooks: $(READY)
	REGKIT_BUDGET=cpu $(BIN)/python book/tools/notebooks.py execute --force $(NAMES)

# Alone on the machine: another busy process halves the speed of two threads, not of one.
bench: $(READY)
	$(BIN)/python $(BENCH) --out results/bench-cpu.json
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	    $(BIN)/python $(BENCH) --device cuda --out results/bench-gpu.json; fi

# What is in results/ and runs/ is not done again. BUDGET=paper is the published protocol;
# DATA=folder is a prepared set, for all tables that have a protocol for it. A piece that ends
# because its MINUTES have passed says so, with exit code 75 (of make: 2). VENV=no needs a checkout
# that PYTHON can import regkit from: `pip install -e ".[train]"` leaves torch and numpy as they are.
BUDGET ?= gpu
DATA ?=
MINUTES ?=
VENV ?= yes
ON_GPU := $(if $(filter no,$(VENV)),$(firstword $(PYTHON)),$(BIN)/python)
OF_GPU := $(if $(filter no,$(VENV)),,$(READY))
gpu-results: $(OF_GPU)
	$(ON_GPU) -m regkit benchmark all $(if $(DATA),--data "$(DATA)",--ndim 3) --budget $(BUDGET) \
	    --device cuda $(if $(MINUTES),--minutes $(MINUTES))

gpu-ten-minutes: $(OF_GPU)
	$(ON_GPU) studies/gpu_first.py

format: $(READY)
	$(BIN)/python book/tools/notebooks.py sync
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

gift: $(READY)
	$(BIN)/python book/tools/gift.py build/quizzes

# From an empty build/: setuptools would pack what an earlier build has left there.
wheel: $(READY)
	@rm -rf build dist *.egg-info/SOURCES.txt
	$(BIN)/python -c "from setuptools import build_meta as b; b.build_sdist('dist'); \
	    b.build_wheel('dist')" >/dev/null
	@ls -l dist; test $$(cat dist/*.whl | wc -c) -lt 12000000 || \
	    { echo "The wheel is larger than 12 MB." >&2; exit 1; }

# `pip check` and no extra: what the wheel names is all that the demonstration needs.
wheel-test: wheel
	@rm -rf build/clean
	$(BIN)/python -m venv build/clean
	build/clean/bin/pip install --quiet --disable-pip-version-check \
	    --constraint constraints.txt dist/*.whl
	build/clean/bin/pip check
	cd build/clean && env -u PYTHONPATH bin/regkit demo --size small --device cpu --out demo
	cd build/clean && test -s demo/synthetic_2d/disp.nii.gz && du -sh .

# Colab's Python, without regkit: the setup cell of each notebook installs it from the wheel.
COLAB_PYTHON ?= python3.13
colab-test: wheel
	@rm -rf build/colab
	$(COLAB_PYTHON) -m venv build/colab
	build/colab/bin/pip install --quiet --disable-pip-version-check --requirement tests/colab.txt
	OMP_NUM_THREADS=1 build/colab/bin/python tests/alone.py dist/*.whl $(NAMES)

clean:
	rm -rf _build build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
