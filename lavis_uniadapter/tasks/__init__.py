"""Tasks, registered with LAVIS."""

from lavis_uniadapter.tasks.retrieval import UniAdapterRetrievalTask

__all__ = ["UniAdapterRetrievalTask"]
