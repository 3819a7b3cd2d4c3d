"""The queue of momentum features that BLIP contrasts a batch with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lavis.models.base_model import concat_all_gather
from torch import Tensor, nn

EMPTY_ID = -100


class ContrastiveQueueMixin(nn.Module):
    """Buffers named as in LAVIS's ``BlipRetrieval``, and a queue of any length.

    LAVIS's ``SharedQueueMixin`` asserts that the global batch divides the queue; here the queue
    wraps around.
    """

    def _init_queue(self, embed_dim: int, queue_size: int) -> None:
        self.queue_size = queue_size
        for name in ("image_queue", "text_queue"):
            self.register_buffer(name, F.normalize(torch.randn(embed_dim, queue_size), dim=0))
        self.register_buffer("idx_queue", torch.full((1, queue_size), EMPTY_ID))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def _dequeue_and_enqueue(self, image_feat: Tensor, text_feat: Tensor, idx: Tensor) -> None:
        """Replace the oldest entries by all ranks' (batch, embed_dim) features, ids (batch, 1).

        Features that are not finite leave the old entry: one bad batch must not spoil the next.
        """
        if not self.queue_size:
            return
        image_feat, text_feat, idx = (
            concat_all_gather(x.contiguous())[-self.queue_size :]
            for x in (image_feat, text_feat, idx)
        )
        places = (self.queue_ptr + torch.arange(len(idx), device=idx.device)) % self.queue_size
        finite = (torch.isfinite(image_feat) & torch.isfinite(text_feat)).all(dim=1)
        for queue, new in (
            (self.image_queue, image_feat.T),
            (self.text_queue, text_feat.T),
            (self.idx_queue, idx.T),
        ):
            queue[:, places] = torch.where(finite, new.to(queue.dtype), queue[:, places])
        self.queue_ptr.add_(len(idx)).remainder_(self.queue_size)
