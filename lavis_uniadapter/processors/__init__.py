"""Video processors, registered with LAVIS; frames that were extracted before."""

from lavis_uniadapter.processors import video

__all__ = ["video"]
