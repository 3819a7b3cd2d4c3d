"""Number formats of a run: what autocast computes in, and how exact matrix products are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_amp(requested: str | None, device: str) -> str | None:
    """What ``run.amp`` means on a device: ``auto`` takes bf16 where the hardware computes with it.

    Elsewhere bf16 is emulated, which is slower than float32.
    """
    if requested != "auto":
        return requested
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else None


def set_matmul_precision(precision: str) -> None:
    """Let float32 products and convolutions on CUDA round their inputs to TF32 (high), or not."""
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision == "high"


def describe(run_cfg: Mapping[str, Any]) -> str:
    """The number format of a run."""
    amp = run_cfg.amp or "float32"
    tf32 = run_cfg.matmul_precision == "high" and run_cfg.device == "cuda"
    return f"{amp} (TF32)" if tf32 else amp
