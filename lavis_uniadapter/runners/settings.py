"""Keys of ``run:`` that this package's runner and launcher read, with their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Settings:
    """What LAVIS's runner does not read; null in a configuration stands for the default."""

    job_id: str = ""  # the time
    resume: str = ""
    cache_root: str = ""
    matmul_precision: str = "highest"
    weight_decay_on: str = "matrices"
    beta2: float = 0.999
    max_grad_norm: float = 0.0  # no clipping
    compile: bool = False
    checkpoint_freq: int = 500  # steps
    data_timeout: float = 300.0  # seconds
    unreadable_threshold: float = 0.01  # of an epoch's items
    max_skipped_steps: int = 20  # in a row
    check_files: bool = True

    @classmethod
    def from_run(cls, run: Mapping[str, Any]) -> Settings:
        given = {f.name: run.get(f.name) for f in fields(cls)}
        return cls(**{k: type(getattr(cls, k))(v) for k, v in given.items() if v is not None})
