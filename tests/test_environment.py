"""``run_scripts/environment.sh``, with a Python that only writes down what it is asked to do."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "run_scripts/environment.sh"


@pytest.fixture
def source(tmp_path):
    """Source the script in a virtual environment of a given Python; returns what it asked pip."""
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    asked = tmp_path / "asked"

    def run(version: str, dependencies: str | None = None):
        python.write_text(f'#!/bin/bash\necho {version}\necho "$@" >> "{asked}"\n')
        python.chmod(0o755)
        asked.write_text("")
        environment = {**os.environ, "VIRTUAL_ENV": str(tmp_path)}
        environment.pop("DEPENDENCIES", None)
        if dependencies is not None:
            environment["DEPENDENCIES"] = dependencies
        done = subprocess.run(
            ["bash", "-c", f"source {SCRIPT}; echo set: $DEPENDENCIES in $PWD"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        pip = [line for line in asked.read_text().splitlines() if line.startswith("-m pip")]
        return done, pip

    return run


@pytest.mark.parametrize(
    "version, dependencies, expected",
    [
        ("3.10", None, "lavis"),
        ("3.11", None, "lavis"),
        ("3.11", "modern", "modern"),
        ("3.12", None, "modern"),
        ("3.13", "modern", "modern"),
    ],
)
def test_set_of_a_python(source, version, dependencies, expected):
    done, pip = source(version, dependencies)
    assert done.returncode == 0, done.stderr
    assert f"set: {expected} in {ROOT}" in done.stdout
    assert f"constraints/{expected}.txt" in pip[0]
    if expected == "lavis":
        assert len(pip) == 1 and "-e .[test]" in pip[0]
    else:
        assert len(pip) == 2 and "--no-deps -e . salesforce-lavis==1.0.2" in pip[1]
    done, pip = source(version, dependencies)
    assert done.returncode == 0 and not pip, "it must find itself installed"


@pytest.mark.parametrize(
    "version, dependencies, words",
    [
        ("3.9", None, ("Python 3.9", "3.10 to 3.13", "PYTHON=")),
        ("3.14", "modern", ("Python 3.14", "3.10 to 3.13")),
        ("3.12", "lavis", ("Python 3.12", "DEPENDENCIES=modern")),
        ("3.11", "newest", ("'newest'", "lavis or modern")),
        ("", None, ("does not run",)),
    ],
)
def test_refusals_name_the_fix(source, version, dependencies, words):
    done, pip = source(version, dependencies)
    assert done.returncode == 1 and not pip
    for word in words:
        assert word in done.stderr


def test_an_environment_keeps_its_set(source):
    assert source("3.11", "modern")[0].returncode == 0
    done, pip = source("3.11")
    assert done.returncode == 1 and not pip
    assert "'modern'" in done.stderr and "deactivate" in done.stderr


def test_constraints_name_the_direct_dependencies():
    """What setup.cfg asks for is pinned, but for PyTorch, which goes by the CUDA driver."""
    import configparser
    import re

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    needed = setup["options"]["install_requires"] + setup["options.extras_require"]["test"]
    names = {re.split(r"[^\w.-]", line)[0].lower() for line in needed.split("\n") if line.strip()}
    for name in ("lavis", "modern"):
        text = (ROOT / f"constraints/{name}.txt").read_text()
        pinned = {p.lower() for p in re.findall(r"^([\w.-]+)==", text, re.MULTILINE)}
        bounded = {"torch", "torchvision"} | ({"salesforce-lavis"} if name == "modern" else set())
        assert names - pinned == bounded & names, name
