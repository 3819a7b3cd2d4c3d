"""The embedded data set, generated once, and a folder of a user's own data."""

import pytest
from custom_data import write_files
from shapes_data import CLIPS, STILLS

from lavis_uniadapter.datasets.shapes.generation import ensure_generated


@pytest.fixture(scope="session")
def stills(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "stills"
    ensure_generated(STILLS, folder)
    return folder


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "clips"
    ensure_generated(CLIPS, folder)
    return folder


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A current folder with a folder `mine`, where the images and videos are."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path / "mine")
    return tmp_path / "mine"
