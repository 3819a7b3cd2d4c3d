"""Tasks, registered with LAVIS."""

from lavis_uniadapter.tasks.captioning import UniAdapterCaptionTask
from lavis_uniadapter.tasks.retrieval import UniAdapterRetrievalTask
from lavis_uniadapter.tasks.video_qa import VideoQATask

__all__ = ["UniAdapterCaptionTask", "UniAdapterRetrievalTask", "VideoQATask"]
