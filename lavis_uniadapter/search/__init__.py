"""Search one's own images and clips by text: index, query, page."""

from lavis_uniadapter.search.index import Hit, Index

__all__ = ["Hit", "Index"]
