"""The doctor, in this environment and in ones with something broken first on the path."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from uniadapter_cli import doctor

ROOT = Path(__file__).resolve().parents[2]
LAVIS_SET = {
    **{"torch": "2.14.1", "torchvision": "0.29.1", "transformers": "4.26.1"},
    **{"huggingface-hub": "0.36.2", "timm": "0.4.12", "numpy": "1.26.4"},
    **{"opencv-python-headless": "4.5.5.64", "salesforce-lavis": "1.0.2"},
}
MODERN_SET = {
    **LAVIS_SET,
    **{"transformers": "4.55.4", "timm": "1.0.31", "numpy": "2.4.6"},
    "opencv-python-headless": "5.0.0.93",
}


def line_of(check: str, output: str) -> tuple[str, str]:
    """The lines of a check and of its fix."""
    lines = output.splitlines()
    at = next(i for i, line in enumerate(lines) if line[9:].startswith(f"{check} "))
    has_fix = at + 1 < len(lines) and lines[at + 1].lstrip().startswith("->")
    return lines[at], lines[at + 1] if has_fix else ""


def test_a_healthy_environment(tmp_path):
    """In which no tokenizer has been fetched yet."""
    done = subprocess.run(
        [sys.executable, "-m", "uniadapter_cli", "doctor"],
        env={
            **{**os.environ, "PYTHONPATH": str(ROOT)},
            **{"HF_HOME": str(tmp_path), "TRANSFORMERS_CACHE": str(tmp_path)},
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    assert "\n0 problem(s)" in done.stdout
    checks = "dependencies torch LAVIS video".split()
    for check in checks:
        assert line_of(check, done.stdout)[0].startswith("ok "), done.stdout
    assert "blip_uniadapter_retrieval" in line_of("LAVIS", done.stdout)[0]
    found, fix = line_of("tokenizer", done.stdout)
    assert found.startswith("warning ") and "BertTokenizer.from_pretrained(" in fix
    assert line_of("Java", done.stdout)[0].startswith("ok " if shutil.which("java") else "warning ")
    for check in ("disk, data", "disk, weights", "shared memory"):
        assert re.match("ok |warning ", line_of(check, done.stdout)[0])


@pytest.mark.parametrize(
    "content, culprit, fix",
    [
        ("import nothing_of_this_name", "No module named", "install nothing_of_this_name"),
        ("raise OSError('libcudart.so')", "torch.py", "rename that file"),
        ("import os; os.abort()", "SIGABRT", "constraints/lavis.txt"),
        ("import time; time.sleep(60)", "Timeout (0:00:0", "constraints/lavis.txt"),
    ],
    ids=["missing", "broken", "crash", "hanging"],
)
def test_a_broken_module_is_named_with_its_fix(tmp_path, monkeypatch, content, culprit, fix):
    (tmp_path / "torch.py").write_text(content + "\n")
    monkeypatch.setattr(doctor, "TIMEOUT", 0.3 if "sleep" in content else doctor.TIMEOUT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    (finding,) = doctor.check_imports()
    assert (finding.level, finding.check) == ("problem", "torch")
    assert culprit in finding.found and fix in finding.fix


TRACEBACK = 'Traceback (most recent call last):\n  File "{}", line 3, in <module>\n{}\n'
MISSING = "ModuleNotFoundError: No module named '{}'"


@pytest.mark.parametrize(
    "file, error, fix",
    [
        ("x/site-packages/lavis/a.py", MISSING.format("cv2"), "install opencv-python-headless"),
        ("x/lavis_uniadapter/a.py", MISSING.format("lavis.models"), "salesforce-lavis==1.0.2"),
        ("x/site-packages/transformers/a.py", "ImportError: x", "constraints/modern.txt"),
        ("elsewhere/decord/__init__.py", "OSError: x", "rename that file"),
        ("x/cv2/__init__.py", "ImportError: libGL.so.1: no such file", "opencv-python-headless"),
        ("x/lavis/a.py", "AttributeError: module 'cv2' has no attribute 'x'", "all opencv-*"),
    ],
)
def test_fixes(file, error, fix):
    found, suggested = doctor.explain(1, TRACEBACK.format(file, error))
    assert error in found and file in found
    assert fix in suggested


# --- versions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, versions", [("lavis", LAVIS_SET), ("modern", MODERN_SET)])
def test_tested_sets_are_recognised(kind, versions):
    finding = doctor.check_versions(versions)
    assert finding.level == "ok" and f"'{kind}'" in finding.found


def test_an_untested_set_is_a_warning():
    finding = doctor.check_versions({**LAVIS_SET, "transformers": "4.33.2"})
    assert finding.level == "warning" and "constraints/modern.txt" in finding.fix


PIP_SAYS = """\
lavis-uniadapter 0.2.0 has requirement transformers<4.57, but you have transformers 4.57.0.
lavis-uniadapter 0.2.0 has requirement numpy<2; python_version < "3.12", but you have numpy 2.4.6.
lavis-uniadapter 0.2.0 requires opencv-python-headless, which is not installed.
lavis-uniadapter 0.2.0 requires salesforce-lavis, which is not installed.
salesforce-lavis 1.0.2 has requirement timm==0.4.12, but you have timm 1.0.31.
torchvision 0.29.1 has requirement torch==2.14.1, but you have torch 2.15.0.
transformers 4.55 has requirement huggingface-hub<1.0,>=0.34.0, but you have huggingface-hub 1.0.
"""


def test_requirements_that_are_not_met_are_problems():
    fixes = [
        finding.fix.removeprefix(doctor.PIP) for finding in doctor.check_requirements(PIP_SAYS)
    ]
    assert fixes == [
        " 'transformers<4.57'",
        " --no-deps salesforce-lavis==1.0.2",
        " 'torch==2.14.1'",
        " 'huggingface-hub<1.0,>=0.34.0'",
    ]


def test_without_pip_requirements_are_not_said_to_be_met(monkeypatch, capsys):
    missing = "/usr/bin/python: No module named pip"
    monkeypatch.setattr(doctor.subprocess, "getoutput", lambda command: missing)
    for name in ("check_imports", "check_machine"):
        monkeypatch.setattr(doctor, name, lambda: [])
    assert doctor.main([]) == 0
    found, fix = line_of("pip", capsys.readouterr().out)
    assert found.startswith("warning ") and "ensurepip" in fix


# --- the machine --------------------------------------------------------------------------------


def test_little_space_and_missing_programs_are_warnings(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    findings = {finding.check: finding for finding in doctor.check_machine()}
    assert {finding.level for finding in findings.values()} == {"warning"}
    assert "run.cache_root" in findings["disk, data"].fix
    assert "--shm-size" in findings["shared memory"].fix
    assert "default-jre" in findings["Java"].fix


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("proc/driver/nvidia/version", "NVRM 470", "too old"),
        ("sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n", "missing"),
        ("sys/bus/pci/devices/0000:01:00.0/vendor", "0x8086\n", ""),
    ],
)
def test_a_gpu_that_pytorch_cannot_use(tmp_path, monkeypatch, file, content, expected):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(content)
    problem = doctor.driver_problem(f"{tmp_path}/")
    assert expected in problem and bool(problem) == bool(expected)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "driver_problem", lambda: problem)
    found, fix = doctor.probe_torch()
    assert (expected in found) and (("latest driver" in fix) == bool(expected))


def test_unknown_arguments_are_refused(capsys):
    with pytest.raises(SystemExit) as end:
        doctor.main(["--all"])
    assert end.value.code == 2 and "--all" in capsys.readouterr().err
