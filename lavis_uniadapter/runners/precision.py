"""The number format of a run."""

from __future__ import annotations

import torch
from omegaconf import DictConfig

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


def autocast(amp: str | None, device: torch.device) -> torch.autocast:
    """Inside, compute as ``run.amp`` says."""
    dtype = AMP_DTYPES.get(amp or "")
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def describe(run_cfg: DictConfig) -> str:
    """The format's name, such as float32 or bf16."""
    amp = run_cfg.amp or "float32"
    tf32 = run_cfg.matmul_precision == "high" and run_cfg.device == "cuda"
    return f"{amp} (TF32)" if tf32 else amp
