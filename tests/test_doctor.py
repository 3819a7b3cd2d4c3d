"""The doctor, in this environment and in ones with something broken first on the path."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lavis_uniadapter import doctor

ROOT = Path(__file__).resolve().parent.parent
LAVIS_SET = {
    **{module: "1.0" for module in doctor.DISTRIBUTIONS},
    **{"lavis": "1.0.2", "torch": "2.14.1", "torchvision": "0.29.1", "transformers": "4.26.1"},
    **{"huggingface_hub": "0.36.2", "timm": "0.4.12", "numpy": "1.26.4", "cv2": "4.5.5.64"},
}
MODERN_SET = {
    **LAVIS_SET,
    **{"transformers": "4.55.4", "timm": "1.0.31", "numpy": "2.4.6", "cv2": "5.0.0.93"},
}


def consult(first_on_path: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **variables}
    folders = [str(ROOT)] if first_on_path is None else [str(first_on_path), str(ROOT)]
    environment["PYTHONPATH"] = os.pathsep.join(folders)
    return subprocess.run(
        [sys.executable, "-m", "lavis_uniadapter.doctor"],
        cwd=first_on_path or ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def line_of(check: str, output: str) -> tuple[str, str]:
    """What is said of a check, and of its mend."""
    lines = output.splitlines()
    at = next(i for i, line in enumerate(lines) if line[9:].startswith(f"{check} "))
    mended = at + 1 < len(lines) and lines[at + 1].lstrip().startswith("->")
    return lines[at], lines[at + 1] if mended else ""


def test_a_healthy_environment(tmp_path):
    """In which no tokenizer has been fetched yet."""
    done = consult(HF_HOME=str(tmp_path), TRANSFORMERS_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    assert "\n0 problem(s)" in done.stdout
    checks = "Python dependencies torch distributed LAVIS lavis_uniadapter video image".split()
    for check in checks:
        assert line_of(check, done.stdout)[0].startswith("ok "), done.stdout
    assert "blip_uniadapter_retrieval" in line_of("lavis_uniadapter", done.stdout)[0]
    found, mend = line_of("tokenizer", done.stdout)
    assert found.startswith("warning ") and "BertTokenizer.from_pretrained(" in mend
    for check in ("Java", "C++ compiler", "disk"):
        assert re.match("ok |warning ", line_of(check, done.stdout)[0])


@pytest.mark.parametrize(
    "files, check, culprit, mend",
    [
        # another file of the name hides what is installed
        ({"decord.py": "raise ImportError('no codec')"}, "LAVIS", "no codec", "decord.py stands"),
        ({"lavis/__init__.py": "1 / 0"}, "LAVIS", "ZeroDivisionError", "lavis/__init__.py stands"),
        (
            {"iopath.py": "raise ModuleNotFoundError(\"No module named 'iopath'\", name='iopath')"},
            *("LAVIS", "No module named 'iopath'", "pip install iopath"),
        ),
        ({"torch.py": "raise OSError('libcudart.so')"}, "torch", "libcudart.so", "torch.py stands"),
        ({"torch.py": "import os; os.abort()"}, "torch", "SIGABRT", "constraints/lavis.txt"),
    ],
    ids=["decord", "lavis", "iopath", "torch", "crash"],
)
def test_a_broken_module_is_named_with_its_mend(tmp_path, files, check, culprit, mend):
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content + "\n")
    done = consult(tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr and not done.stderr
    found, how = line_of(check, done.stdout)
    assert found.startswith("problem ") and culprit in found, done.stdout
    assert mend in how, done.stdout
    assert line_of("shared memory", done.stdout), "it must go on to the end"


@pytest.mark.parametrize(
    "module, file, missing, mend",
    [
        ("cv2", "x/site-packages/lavis/a.py", True, "pip install opencv-python-headless"),
        ("lavis", "lavis_uniadapter/__init__.py", True, "--no-deps salesforce-lavis==1.0.2"),
        ("transformers", "x/site-packages/lavis/models/med.py", False, "constraints/modern.txt"),
        ("decord", "x/site-packages/decord/_ffi.py", False, "--force-reinstall --no-deps decord"),
        ("decord", "x/dist-packages/decord/__init__.py", False, "--force-reinstall"),
        ("decord", "elsewhere/decord/__init__.py", False, "decord/__init__.py stands before"),
        ("unheard", "x/site-packages/unheard/a.py", False, "constraints/lavis.txt"),
    ],
)
def test_mends(module, file, missing, mend):
    assert mend in doctor.mend_of({"module": module, "file": file, "missing": missing})


# --- versions -----------------------------------------------------------------------------------


def check(versions, python=(3, 11), wanted="2.14.1"):
    return doctor.check_versions(python, versions, wanted)


@pytest.mark.parametrize("python", [(3, 10), (3, 11)])
@pytest.mark.parametrize("kind, versions", [("lavis", LAVIS_SET), ("modern", MODERN_SET)])
def test_tested_sets_are_well(python, kind, versions):
    findings = check(versions, python)
    assert {f.level for f in findings} == {"ok"}
    assert any(f"'{kind}'" in f.found for f in findings)


@pytest.mark.parametrize(
    "changes, found, mend",
    [
        ({"transformers": "4.57.0"}, "4.57.0 lacks what LAVIS imports", "transformers==4.55.4"),
        ({"transformers": "5.24.0", "huggingface_hub": "1.2.0"}, "lacks", "huggingface_hub<1"),
        ({"huggingface_hub": "1.0.1"}, "1.0.1, which transformers 4.55.4", "huggingface_hub<1"),
        ({"transformers": "4.26.1"}, "built for NumPy 1: transformers 4.26.1", "numpy<2"),
        ({"transformers": "4.40.2"}, "built for NumPy 1: transformers 4.40.2", "numpy<2"),
        ({"cv2": "4.5.5.64"}, "built for NumPy 1: OpenCV 4.5.5.64", "numpy<2"),
        ({"torch": "2.2.2"}, "torch 2.2.2", "numpy<2"),
        ({"torch": "2.15.0"}, "built for torch 2.14.1, and torch is 2.15.0", "torch==2.14.1"),
        ({"iopath": None}, "not installed", "pip install iopath"),
        ({"cv2": None}, "not installed", "pip install opencv-python-headless"),
        ({"lavis": None}, "not installed", "--no-deps salesforce-lavis==1.0.2"),
    ],
)
def test_bad_combinations(changes, found, mend):
    problems = [f for f in check({**MODERN_SET, **changes}) if f.level == "problem"]
    assert any(found in f.found and mend in f.mend for f in problems), problems


@pytest.mark.parametrize(
    "versions, python, level",
    [
        (MODERN_SET, (3, 9), "problem"),
        (MODERN_SET, (3, 14), "problem"),
        (LAVIS_SET, (3, 12), "problem"),
        (MODERN_SET, (3, 12), "ok"),
        (MODERN_SET, (3, 13), "ok"),
    ],
)
def test_pythons(versions, python, level):
    (finding,) = (f for f in check(versions, python) if f.check == "Python")
    assert finding.level == level and bool(finding.mend) == (level != "ok")


@pytest.mark.parametrize(
    "versions", [{**LAVIS_SET, "transformers": "4.33.2"}, {**LAVIS_SET, "lavis": "1.1.0"}]
)
def test_what_is_untested_is_a_warning(versions):
    assert {f.level for f in check(versions)} == {"ok", "warning"}


def test_versions_that_are_not_told():
    """LAVIS from a checkout on the path; a torchvision that names no torch; builds of torch."""
    assert {f.level for f in check({**MODERN_SET, "lavis": ""}, wanted=None)} == {"ok"}
    assert {f.level for f in check({**MODERN_SET, "torch": "2.14.1+cpu"})} == {"ok"}


@pytest.mark.parametrize(
    "version, expected",
    [("2.14.1+cu130", (2, 14, 1)), ("4.5.5.64", (4, 5, 5)), ("2.15.0a0", (2, 15, 0)), ("", ())],
)
def test_release(version, expected):
    assert doctor.release(version) == expected


# --- the machine --------------------------------------------------------------------------------


def test_space_is_told_once_a_disk_and_names_what_moves_it(tmp_path):
    folders = {"data": tmp_path / "not/there/yet", "temporary files": tmp_path}
    (finding,) = doctor.check_space(folders, least=0)
    assert finding.level == "ok" and str(tmp_path) in finding.found
    (finding,) = doctor.check_space(folders, least=1 << 60)
    assert finding.level == "warning" and "run.cache_root" in finding.mend


def test_shared_memory(tmp_path):
    (finding,) = doctor.check_shared_memory(tmp_path, least=1 << 60)
    assert finding.level == "warning" and "--shm-size" in finding.mend
    assert not list(doctor.check_shared_memory(tmp_path / "absent"))


def test_programs_that_are_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert [f.level for f in doctor.check_programs()] == ["warning", "warning"]
