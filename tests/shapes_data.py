"""The embedded data set as tests read it."""

import json

import decord
import lavis  # noqa: F401  (populates the registry)

from lavis_uniadapter.common.schema.shapes import Clips, Stills
from lavis_uniadapter.datasets.shapes.contents import SIZES

TRAIN_CONTENTS = 176 * len(SIZES)  # 576 combinations less the 100 of val and the 300 of test
STILLS = Stills(num_train=TRAIN_CONTENTS + 20, num_val=12, num_test=12)
CLIPS = Clips(num_train=12, num_val=5, num_test=16)


def replace(config, **changes):
    return config.model_copy(update=changes)


FEW = [
    replace(STILLS, num_train=5, num_val=2, num_test=2),
    replace(CLIPS, num_train=2, num_val=1, num_test=2),
]


def records(folder, split, task=""):
    """Records of retrieval, or of the task "cap_" or "qa_"."""
    return json.loads((folder / "annotations" / f"{task}{split}.json").read_text())


def file_name(record):
    return record["image"] if "image" in record else record["video"]


def content(record):
    """(colour, shape, position, size) of the one object that a record describes."""
    (thing,) = record["objects"]
    return tuple(thing[key] for key in ("colour", "shape", "position", "size"))


def decoded(path):
    """RGB frames, int of shape (frames, height, width, 3)."""
    reader = decord.VideoReader(str(path))
    # LAVIS makes decord return torch tensors.
    return reader.get_batch(range(len(reader))).numpy().astype(int)
