"""Data sets of the plugin; importing this package registers their builders with LAVIS."""

from lavis_uniadapter.datasets.builders import (
    ShapesClipsBuilder,
    ShapesClipsCaptionBuilder,
    ShapesClipsQABuilder,
    ShapesStillsBuilder,
    ShapesStillsCaptionBuilder,
    ShapesStillsQABuilder,
)
from lavis_uniadapter.datasets.custom import (
    CustomCaptionBuilder,
    CustomQABuilder,
    CustomRetrievalBuilder,
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
