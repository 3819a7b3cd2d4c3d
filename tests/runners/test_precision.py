"""What a run computes in: chosen for the device, reported, and kept."""

from __future__ import annotations

import json

import pytest
import torch
from omegaconf import OmegaConf

from lavis_uniadapter.runners import run_folders
from lavis_uniadapter.runners.precision import choose_amp, describe


@pytest.fixture
def processor(monkeypatch):
    """Make this processor one that computes in bf16, or one that does not."""

    def arrange(avx512_bf16=False, amx=False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)

    return arrange


def test_auto_is_bf16_where_the_device_computes_in_it(processor, monkeypatch):
    processor()
    assert choose_amp("auto", "cpu") is None
    processor(avx512_bf16=True)
    assert choose_amp("auto", "cpu") == "bf16"
    processor(amx=True)
    assert choose_amp("auto", "cpu") == "bf16"
    # such as a V100: PyTorch emulates bf16 on it
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert choose_amp("auto", "cuda") == "bf16"
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert choose_amp("auto", "cuda") is None
    for amp in ("bf16", "fp16", None, True):
        assert choose_amp(amp, "cpu") == amp


def test_auto_is_kept_as_what_was_used(run, processor, caplog):
    """So a run does not go on in another precision, and a comparison can tell runs apart."""
    processor(amx=True)
    options = ("run.amp=auto", "run.max_epoch=1", "run.test_splits=[]")
    with caplog.at_level("INFO"):
        result = run("shapes_retrieval", *options)
    assert result.runner.amp == "bf16"
    assert caplog.text.count("precision bf16") == 1
    folder = result.output_dir
    assert run_folders.read(folder).precision == "bf16"
    config = json.loads((folder / run_folders.CONFIG).read_text())
    assert config["run"]["amp"] == "bf16"

    (folder / run_folders.SUMMARY).unlink()  # as if it had been stopped
    assert run_folders.find_unfinished_run(folder.parent, config) == folder
    processor()
    with caplog.at_level("INFO"):
        other = run("shapes_retrieval", *options, "run.resume=auto")
    assert other.output_dir != folder
    assert "it has another run.amp" in caplog.text
    assert run_folders.read(other.output_dir).precision == "float32"


def test_matrix_products_are_exact_unless_asked_otherwise(run):
    for options, precision in ((("run.matmul_precision=high",), "high"), ((), "highest")):
        result = run("shapes_retrieval", *options, evaluate=True)
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.allow_tf32 is (precision == "high")
        assert run_folders.read(result.output_dir).precision == "float32"  # a CPU has no TF32


@pytest.mark.parametrize(
    ("run_cfg", "expected"),
    [
        ({}, "float32"),
        ({"amp": "fp16"}, "fp16"),
        ({"matmul_precision": "high"}, "float32 (TF32)"),
    ],
)
def test_precision_has_a_name(run_cfg, expected):
    default = {"device": "cuda", "amp": None, "matmul_precision": "highest"}
    assert describe(OmegaConf.create({**default, **run_cfg})) == expected
