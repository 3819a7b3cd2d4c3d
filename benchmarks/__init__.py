"""Benchmarks: ``python -m benchmarks.<name>``, each with ``--help``. Not part of the package."""
