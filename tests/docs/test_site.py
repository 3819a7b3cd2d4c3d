"""The documentation: it builds, its links lead somewhere, its code runs."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import yaml

from lavis_uniadapter.adapters.methods import TUNING_METHODS
from lavis_uniadapter.version import __version__

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


@pytest.mark.processes
def test_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "configuration/index.html").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    text = re.sub(r"<!--.*?-->|```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 12_000


def test_readme_maps_ideas_to_files_that_exist():
    table = re.search(r"\| Idea \|.*?\n\n", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    names = re.findall(r"`([\w/{},]+(?:\.py|/))`", table)
    assert len(names) > 10
    files = [file for name in names for file in _expand(name)]
    package = ROOT / "lavis_uniadapter"
    assert [file for file in files if not (package / file).exists()] == []


def _expand(name: str) -> list[str]:
    """``a/{b,c}.py`` as a shell reads it."""
    parts = re.split(r"\{(.*?)\}", name)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(choice) for choice in product(*choices)]


def test_versions_agree():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert newest == __version__


def test_the_method_of_the_tutorial_trains(build_model, video_batch, monkeypatch):
    page = (ROOT / "docs/adding-a-method.md").read_text()
    code = re.search(r"```python title=\"\S+attention_bias.py\"\n(.*?)```", page, re.DOTALL)[1]
    namespace: dict = {}
    exec(compile(code, "adding-a-method.md", "exec"), namespace)
    # under the name of a method without options, as names are fixed when the schema is imported
    monkeypatch.setitem(TUNING_METHODS, "bitfit", namespace["AttentionBiasSet"])
    model = build_model(tuning="bitfit").train()
    model(video_batch).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    biases = [name for name in trained if "/" in name]
    assert any("crossattention" in name for name in biases)
    assert any("blocks" in name for name in biases)
    assert not any("mlp" in name or "intermediate" in name for name in biases)
    assert all(p.grad is not None for p in trained.values())
