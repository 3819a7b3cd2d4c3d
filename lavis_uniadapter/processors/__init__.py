"""Video processors, registered with LAVIS, and the decoding behind them."""

from lavis_uniadapter.processors import video

__all__ = ["video"]
