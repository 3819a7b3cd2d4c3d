"""The runner, registered with LAVIS, and what a run needs."""

from lavis_uniadapter.runners.runner import RunnerUniAdapter

__all__ = ["RunnerUniAdapter"]
