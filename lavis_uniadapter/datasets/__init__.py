"""Data sets of the plugin; importing this package registers their builders with LAVIS."""

from lavis_uniadapter.datasets.builders import ShapesClipsBuilder, ShapesStillsBuilder

__all__ = ["ShapesClipsBuilder", "ShapesStillsBuilder"]
