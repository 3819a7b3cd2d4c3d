"""The golden files of the released implementation, and the models that they are compared with.

tests/golden/ holds weights, inputs, outputs and gradients of RERV/UniAdapter (commit 796c124).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import BatchEncoding

from lavis_uniadapter.backbone.build import build_text_encoder, build_visual_encoder
from lavis_uniadapter.checkpoints.released import load_released_checkpoint
from lavis_uniadapter.common.schema.methods import AdapterConfig
from lavis_uniadapter.models.retrieval import BlipUniAdapterRetrieval

GOLDEN = Path(__file__).parent / "golden"


class GivenTokens:
    """Stands for a tokenizer: gives back the token ids of the golden batch."""

    pad_token_id = 0

    def __init__(self, input_ids, attention_mask, enc_token_id):
        self._tokens = {"input_ids": input_ids, "attention_mask": attention_mask}
        self.enc_token_id = enc_token_id

    def __call__(self, texts, **kwargs):
        return BatchEncoding(dict(self._tokens))


class Case:
    def __init__(self, name: str):
        with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
            self.about = json.loads(file.metadata()["case"])
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {
            key.removeprefix(prefix): value
            for key, value in self.tensors.items()
            if key.startswith(prefix)
        }

    def encoders(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        dims = self.about["dims"]
        vit = {
            "width": dims["hidden"],
            "depth": dims["depth"],
            "num_heads": dims["heads"],
            "patch_size": dims["patch"],
            "mlp_ratio": dims["mlp_ratio"],
        }
        return (
            build_visual_encoder("custom", dims["image_size"], vit),
            build_text_encoder(self.about["med_config"], dims["hidden"]),
        )

    def model(self, **options) -> BlipUniAdapterRetrieval:
        dims, config = self.about["dims"], self.about["config"]
        tokenizer = GivenTokens(self["in.input_ids"], self["in.attention_mask"], dims["enc"])
        model = BlipUniAdapterRetrieval(
            *self.encoders(),
            tokenizer,
            queue_size=dims["queue"],
            alpha=self.about["alpha"],
            embed_dim=dims["embed"],
            negative_all_rank=dims.get("neg_all", False),
            **options,
        )
        model.attach_tuning(
            "uniadapter",
            AdapterConfig(
                bottleneck=config["adapter_dim"],
                kv_bottleneck=(
                    config["video_key_adapter_dim"] if config["video_key_adapter"] else 0
                ),
                frame_aware=config["frame_aware_attention"],
            ),
        )
        load_released_checkpoint(model, self.under("state."))
        return model

    def visual(self) -> torch.Tensor:
        visual = self["in.visual"]
        return visual if self.about["frames"] is None else visual.transpose(1, 2)

    def samples(self) -> dict:
        return {
            "image" if self.about["frames"] is None else "video": self.visual(),
            "text_input": ["", ""],
            "image_id": self["in.idx"],
            # past the ramp-up, so that alpha is the case's own
            "epoch": 5,
            "iters": 0,
            "num_iters_per_epoch": 1,
        }


def assert_close(actual, expected, relative, floor=1e-6):
    """Largest difference, relative to the largest expected magnitude, or to the floor if larger."""
    assert actual.shape == expected.shape
    limit = relative * max(expected.abs().max().item(), floor)
    assert (actual - expected).abs().max().item() <= limit
