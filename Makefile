# Everything but `make gpu` runs in a virtual environment that the first target makes; nothing is installed by hand.
# Its 14,000 modules are compiled on all cores: pip does it on one, and never is too late where nothing may be written.
PYTHON ?= python3
OUT ?= build/gpu
VENV := .venv
RUN := $(VENV)/bin/python
SPEAKING := .venv-indextts
INSTALL := -m pip install --quiet --no-compile --disable-pip-version-check -r
COMPILE := -m compileall -qq -j 0
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: demo test test-indextts style bench gpu soak demo-data

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) $(INSTALL) requirements.txt
	$(RUN) $(COMPILE) $(VENV)/lib || true  # a few files are templates
	touch $@

# Beside the first: it takes from there what both need.
$(SPEAKING)/.installed: $(VENV)/.installed requirements-indextts.txt
	$(PYTHON) -m venv $(SPEAKING)
	$(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$($(SPEAKING)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
	$(SPEAKING)/bin/python $(INSTALL) requirements-indextts.txt
	$(SPEAKING)/bin/python $(COMPILE) $(SPEAKING)/lib || true
	touch $@

demo: $(VENV)/.installed  ## train, kill, resume, listen; writes demo_output/
	$(RUN) -m tools.demo

test: $(VENV)/.installed  ## all tests but the long soak; those of the page need Debian's Chromium, else they are skipped
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -rs -n 2 --dist loadfile --no-loadscope-reorder -m "not indextts" tests

test-indextts: $(SPEAKING)/.installed  ## the tests that speak with the packages of IndexTTS2 and 2.5
	OMP_NUM_THREADS=1 $(SPEAKING)/bin/python -m pytest -q -rs -n 2 --dist loadfile -m indextts \
		tests/test_indextts2_sound.py tests/test_indextts25_sound.py

style: $(VENV)/.installed  ## lint and types
	$(RUN) -m ruff check .
	$(RUN) -m mypy trainers tools benchmarks webui webui_amharic.py

bench: $(VENV)/.installed  ## measure speed and sound quality, in under 15 minutes on two idle cores
	$(RUN) -m benchmarks.bench
	$(RUN) $(INSTALL) requirements-bench.txt
	$(RUN) -m benchmarks.codec_quality

gpu:  ## what the trainer does on this machine's GPU, with PYTHON's own torch; writes TABLE.txt to OUT (build/gpu)
	$(PYTHON) -m benchmarks.gpu --output "$(OUT)"

soak: $(VENV)/.installed  ## hundreds of kills, damaged files and signals, then every combination of stops and settings
	OMP_NUM_THREADS=1 $(RUN) tests/soak.py
	SOAK=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 tests/test_resume_exactly.py
	SOAK=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -q tests/test_webui_walk.py

demo-data: $(VENV)/.installed  ## rebuild processed_data/ and tokenizers/; needs espeak-ng
	$(RUN) -m tools.demo_data
