"""What tests of the comparison share."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny_runs import TRAIN


@pytest.fixture
def plan_file(tmp_path):
    def write(**changes) -> Path:
        content = {
            "cfg_path": str(TRAIN / "shapes_retrieval.yaml"),
            "output_dir": str(tmp_path / "out"),
            "metrics": ["t2v_r1", "v2t_r1"],
            "seeds": [1],
            "runs": {"linear": {"options": ["model.tuning=linear"]}},
            **changes,
        }
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
        return path

    return write
