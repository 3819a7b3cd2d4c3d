"""Data sets of the plugin; importing this package registers their builders with LAVIS."""

from lavis_uniadapter.datasets.custom import (
    CustomCaptionBuilder,
    CustomQABuilder,
    CustomRetrievalBuilder,
)
from lavis_uniadapter.datasets.shapes.builders import (
    ShapesClipsBuilder,
    ShapesClipsCaptionBuilder,
    ShapesClipsQABuilder,
    ShapesStillsBuilder,
    ShapesStillsCaptionBuilder,
    ShapesStillsQABuilder,
)

__all__ = [
    "CustomCaptionBuilder",
    "CustomQABuilder",
    "CustomRetrievalBuilder",
    "ShapesClipsBuilder",
    "ShapesClipsCaptionBuilder",
    "ShapesClipsQABuilder",
    "ShapesStillsBuilder",
    "ShapesStillsCaptionBuilder",
    "ShapesStillsQABuilder",
]
