"""The pipeline's programs, one per step: `python -m tools.NAME --help` shows each one's first command."""
