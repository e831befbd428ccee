"""Speed against named peers. `python -m bench` measures all and makes docs/benchmarks.md; see bench/report.py."""
