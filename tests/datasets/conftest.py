"""The embedded data set, generated once."""

import pytest
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
