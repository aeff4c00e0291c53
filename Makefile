# make demo: set up, make the synthetic corpus, run the three stages, print the report
# make test: set up, run all tests
PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: demo test lint clean

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: .venv/ready
	PYTHON=$(RUN) sh recipes/demo.sh

# a file of tests on each core, four at most, each on one thread
test: .venv/ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: .venv/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf .venv data/demo
