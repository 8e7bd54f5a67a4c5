"""Measurements. `pytest benchmarks/` for every op and model, `python -m benchmarks.report` for the goals."""
