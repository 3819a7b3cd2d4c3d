"""A clip of twenty frames of noise."""

import pytest
from clips import noise_frames, write_frames


@pytest.fixture(scope="session")
def noise_clip(tmp_path_factory):
    return write_frames(tmp_path_factory.mktemp("clips") / "noise.mp4", noise_frames(20))
