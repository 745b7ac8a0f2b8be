"""Timing scripts for developers: `python -m benchmarks --help`. Not part of the wheel."""
