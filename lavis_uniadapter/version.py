"""The version, readable without importing LAVIS."""

__version__ = "0.2.0"
