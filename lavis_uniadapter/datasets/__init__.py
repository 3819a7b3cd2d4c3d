"""Data sets of the plugin; importing this package registers their builders with LAVIS."""

from lavis_uniadapter.datasets import custom
from lavis_uniadapter.datasets.shapes import builders

__all__ = ["builders", "custom"]
