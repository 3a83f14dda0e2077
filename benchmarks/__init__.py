"""Benchmarks against other ways of saving; see `python -m benchmarks --help`."""
