"""Separate adapters: a bottleneck of its own for each modality, nothing shared.

The baseline of arXiv 2302.06605, section 4: no query residual, no norm in the cross-modal branch,
no key/value adapter.
"""

from __future__ import annotations

from lavis_uniadapter.adapters.geometry import BackboneGeometry
from lavis_uniadapter.adapters.uniadapter import UniAdapterSet
from lavis_uniadapter.common.schema.methods import AdapterConfig, BottleneckConfig

NOTHING_SHARED = {
    **{"share": "none", "reuse_textual_up": False},
    **{"query_residual": False, "kv_bottleneck": 0},
}


class SeparateAdapterSet(UniAdapterSet):
    """A bottleneck of its own for each modality (``tuning: adapter``)."""

    norm_cross_modal = False

    def build(self, config: BottleneckConfig, geometry: BackboneGeometry) -> None:
        super().build(AdapterConfig(**config.model_dump(), **NOTHING_SHARED), geometry)
