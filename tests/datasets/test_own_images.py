"""Own images are read upright and scaled to 8 bits; LAVIS's data sets as LAVIS reads them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from lavis.common.registry import registry
from lavis.datasets.datasets import caption_datasets, retrieval_datasets
from lavis.processors.base_processor import BaseProcessor
from omegaconf import OmegaConf
from PIL import ExifTags, Image

from lavis_uniadapter.datasets.preflight import unreadable_files
from lavis_uniadapter.datasets.reading import EvaluationItems
from lavis_uniadapter.tools.prepare.check import examine


@pytest.fixture
def folder(tmp_path):
    """Three images: turned by EXIF (4 x 8, black on the left), 16-bit grey, and an ordinary one."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turn it by 90 degrees, clockwise
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 4:] = 255
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    deep = np.arange(0, 65536, 2048, dtype=np.uint16).reshape(4, 8)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.effect_noise((8, 4), 90).convert("RGB").save(tmp_path / "plain.png")
    Image.fromarray(np.full((4, 8), 7.5, np.float32)).save(tmp_path / "float.tiff")
    return tmp_path


def own(folder, task, split, names):
    records = [{"image": name, "caption": "a", "question": "b", "answer": "c"} for name in names]
    (folder / "own.json").write_text(json.dumps(records))
    config = {
        "data_type": "images",
        "build_info": {
            "annotations": {split: {"storage": str(folder / "own.json")}},
            "images": {"storage": str(folder)},
        },
    }
    if task == "qa":
        config["build_info"]["annotations"]["answer_list"] = {"storage": str(folder / "own.json")}
    return registry.get_builder_class(f"custom_{task}")(OmegaConf.create(config)).build()[split]


@pytest.mark.parametrize("task", ["retrieval", "caption", "qa"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_own_images_are_upright_and_deep_ones_scaled(folder, task, split):
    dataset = own(folder, task, split, ["turned.png", "deep.png", "plain.png"])
    turned, deep, plain = (np.asarray(dataset[i]["image"]) for i in range(3))
    assert turned.shape == (8, 4, 3)
    assert turned[:4].max() == 0 and turned[4:].min() == 255
    expected = np.rint(np.arange(0, 65536, 2048) / 257).reshape(4, 8)
    assert (deep == expected[..., None]).all()
    assert (plain == np.asarray(Image.open(folder / "plain.png"))).all()


def test_an_own_image_whose_pixels_mean_something_else_is_named(folder):
    dataset = own(folder, "retrieval", "test", ["float.tiff"])
    reason = EvaluationItems(dataset, 0).try_to_read(0)[1].reason
    assert "pixels (mode F) are outside 0 to 1" in reason
    path = str(folder / "float.tiff")
    assert unreadable_files(dataset, "test")[path] in reason
    assert examine((path, True), thorough=False) in reason


@pytest.mark.parametrize(
    ("task", "split", "cls"),
    [
        ("retrieval", "train", retrieval_datasets.RetrievalDataset),
        ("retrieval", "test", retrieval_datasets.RetrievalEvalDataset),
        ("caption", "train", caption_datasets.CaptionDataset),
        ("caption", "test", caption_datasets.CaptionEvalDataset),
    ],
)
def test_items_are_those_of_lavis_whose_own_data_sets_stay_as_they_are(folder, task, split, cls):
    mine = own(folder, task, split, ["plain.png", "turned.png"])
    (folder / "lavis.json").write_text(json.dumps(mine.annotation))
    base = BaseProcessor()
    theirs = cls(base, base, str(folder), [str(folder / "lavis.json")])
    expected, item = theirs[0], mine[0]
    for key in expected:
        same = np.asarray(expected[key]) == np.asarray(item[key])
        assert np.all(same), key
    with Image.open(folder / "turned.png") as stored:
        assert (np.asarray(theirs[1]["image"]) == np.asarray(stored)).all()
    assert theirs[1]["image"].size == (8, 4) and mine[1]["image"].size == (4, 8)
