"""The pipeline's programs, one per step: `python -m tools.NAME --help` shows each one's first command."""

import os

# Read when torch loads OpenMP: threads that spin for long while they wait slow each other down on a CPU in shared use.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
