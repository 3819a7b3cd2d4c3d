"""A fault of the machine is no unreadable file, which another item would replace."""

from __future__ import annotations

import builtins
import errno
import json
import zipfile

import pytest
import torch
from clips import write_clip
from lavis.datasets.datasets.retrieval_datasets import VideoRetrievalEvalDataset
from PIL import Image

from lavis_uniadapter.datasets import reading
from lavis_uniadapter.datasets.preflight import unreadable_files
from lavis_uniadapter.datasets.reading import EvaluationItems, TrainingItems
from lavis_uniadapter.datasets.records import DatasetError
from lavis_uniadapter.processors.decoding import frames_problem
from lavis_uniadapter.processors.extracted_frames import (
    EXTRACTED_SUFFIX,
    read_about,
    write_extracted_frames,
)
from lavis_uniadapter.processors.images import image_problem
from lavis_uniadapter.processors.video import BlipVideoEvalProcessor

FAULTS = (
    MemoryError(),
    PermissionError(errno.EACCES, "Permission denied"),
    OSError(errno.EMFILE, "Too many open files"),
)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(reading, "RETRY_AFTER", 0.0)


@pytest.fixture
def dataset(tmp_path):
    """A clip, and one of which only extracted frames are there."""
    write_clip(tmp_path / "a.mp4")
    archive = f"{tmp_path / 'b.mp4'}{EXTRACTED_SUFFIX}"
    write_extracted_frames(archive, torch.zeros(4, 32, 32, 3).byte(), 4, (1, 1, ""))
    records = [{"video": name, "caption": ["x"]} for name in ("a.mp4", "b.mp4")]
    (tmp_path / "val.json").write_text(json.dumps(records))
    processor = BlipVideoEvalProcessor(image_size=32, n_frms=2)
    return VideoRetrievalEvalDataset(processor, str, str(tmp_path), [str(tmp_path / "val.json")])


@pytest.fixture
def failing(monkeypatch):
    """Make the opening of files whose name has this ending fail."""

    def fail(ending, error):
        original = builtins.open

        def refuse(path, *args, **kwargs):
            if str(path).endswith(ending):
                raise error
            return original(path, *args, **kwargs)

        monkeypatch.setattr(builtins, "open", refuse)
        monkeypatch.setattr("io.open", refuse)

    return fail


@pytest.mark.parametrize("error", FAULTS, ids=["memory", "permission", "open files"])
@pytest.mark.parametrize(("index", "ending"), [(0, "a.mp4"), (1, EXTRACTED_SUFFIX)])
def test_training_stops_and_names_the_file(dataset, failing, error, index, ending):
    failing(ending, error)
    name = ("a.mp4", "b.mp4")[index]
    with pytest.raises(DatasetError, match=f"{name}' cannot be read") as at:
        TrainingItems(dataset, 0).try_to_read(index)
    assert type(error).__name__ in str(at.value) and "\n" not in str(at.value)


def test_memory_that_runs_out_within_an_archive_is_not_its_fault(dataset, monkeypatch):
    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr(zipfile.ZipFile, "read", exhausted)
    with pytest.raises(MemoryError):
        read_about(f"{dataset.vis_root}/b.mp4{EXTRACTED_SUFFIX}")
    with pytest.raises(DatasetError, match="MemoryError"):
        EvaluationItems(dataset, 0, allow_missing=True).try_to_read(1)


def test_what_may_not_be_read_is_listed_before_a_run_and_counted_where_that_is_allowed(
    dataset, tmp_path, failing
):
    Image.new("L", (8, 8)).save(tmp_path / "c.png")
    failing("", FAULTS[1])
    for problem in (
        frames_problem(f"{tmp_path}/a.mp4", lambda n: [0]),
        frames_problem(f"{tmp_path}/b.mp4{EXTRACTED_SUFFIX}", lambda n: [0]),
        image_problem(f"{tmp_path}/c.png", whole=False),
    ):
        assert "Permission denied" in problem
    problems = unreadable_files(dataset, "val").values()
    assert len(problems) == 2 and all("Permission denied" in problem for problem in problems)
    unreadable = EvaluationItems(dataset, 0, allow_missing=True).try_to_read(0)[1]
    assert "Permission denied" in unreadable.reason


def test_a_member_that_claims_more_than_its_archive_is_damage(dataset):
    """Memory for it would run out, or not, by the machine."""
    path = f"{dataset.vis_root}/b.mp4{EXTRACTED_SUFFIX}"
    with open(path, "rb") as file:
        content = bytearray(file.read())
    entry = content.index(b"about.json", content.index(b"PK\1\2")) - 46
    for place in (20, 24):  # compressed and whole size
        content[entry + place : entry + place + 4] = (2**31).to_bytes(4, "little")
    with open(path, "wb") as file:
        file.write(content)
    with pytest.raises(ValueError, match="larger than the archive"):
        read_about(path)
