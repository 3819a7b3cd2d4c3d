"""The wheel, installed away from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest
from tiny_runs import ROOT, TINY_CLIPS, TINY_RUN

from lavis_uniadapter.runners.run_checkpoints import BEST
from lavis_uniadapter.tools import recipes

PARTS = ("lavis_uniadapter", "uniadapter_cli", "projects")
FILES = ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtual environment with the wheel in it, which sees this one's dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for part in PARTS:
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(ROOT / file, source / file)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheel = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    subprocess.run([*pip, *wheel, str(source)], check=True, capture_output=True)
    shutil.rmtree(source)

    place = folder / "environment"
    venv.create(place)
    scripts = place / ("Scripts" if os.name == "nt" else "bin")
    (built,) = folder.glob("*.whl")
    install = ["--python", str(scripts / "python"), "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, *install, str(built)], check=True, capture_output=True)
    variables = {"base": str(place), "platbase": str(place)}
    packages = sysconfig.get_path("purelib", "venv", vars=variables)
    # after the wheel, and without the editable installation that may be there
    with open(os.path.join(packages, "dependencies.pth"), "w") as file:
        file.write(sysconfig.get_path("purelib") + "\n")
    return scripts


@pytest.fixture
def uniadapter(environment, tmp_path):
    """Run the installed command in an empty folder."""
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*arguments):
        return subprocess.run(
            [str(environment / "uniadapter"), *map(str, arguments)],
            cwd=tmp_path,
            env={**variables, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.processes
def test_recipes_come_with_the_wheel(uniadapter, environment, tmp_path):
    listed = uniadapter("ls")
    assert listed.returncode == 0, listed.stderr
    for name in (*recipes.runs(), *recipes.comparisons(), *recipes.model_types()):
        assert f"  {name} " in listed.stdout
    copied = uniadapter("cp", "compare/shapes_methods", "my.yaml")
    assert copied.returncode == 0, copied.stderr
    assert "cfg_path: shapes_retrieval" in (tmp_path / "my.yaml").read_text()


@pytest.mark.processes
def test_a_recipe_trains_from_the_wheel(uniadapter, tmp_path):
    assert uniadapter("cp", "shapes_retrieval", "my.yaml").returncode == 0
    trained = uniadapter("train", "my.yaml", *TINY_CLIPS, *TINY_RUN, "run.job_id=clips")
    assert trained.returncode == 0, trained.stderr
    folder = tmp_path / "output/shapes_retrieval/clips"
    assert (folder / BEST).is_file()
    assert "t2v_r1" in json.loads((folder / "summary.json").read_text())["metrics"]["test"]
