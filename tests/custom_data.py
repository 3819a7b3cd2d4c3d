"""Files of a user's own data, and the builders that read them."""

import csv
import io
import json
from pathlib import Path

import pytest
from clips import write_clip
from lavis.common.registry import registry
from omegaconf import OmegaConf
from PIL import Image

from lavis_uniadapter.datasets.records import DatasetError

TASKS = ("retrieval", "qa", "caption")
KINDS = ("images", "videos")
FORMATS = ("json", "jsonl", "csv", "tsv")
KEY = {"images": "image", "videos": "video"}
SUFFIX = {"images": "png", "videos": "mp4"}
# Commas, quotes, tabs, a line break and letters beyond ASCII, that formats treat in their own way.
CAPTIONS = ['A "red" disc, left', "ein blauer\nKreis – ☃", "one\tmore"]
QUESTIONS = ["Which colour,\n exactly?", 'Is it "red"?', "How many?"]
ANSWERS = ["red", "yes", "red"]


def write(path, rows):
    """Write rows (dicts of the same keys) in the format that the path's ending names."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        text = json.dumps(rows, indent=1)
    elif path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        buffer = io.StringIO(newline="")
        dialect = {".csv": "excel", ".tsv": "excel-tab"}[path.suffix]
        writer = csv.DictWriter(buffer, rows[0], dialect=dialect)
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    path.write_bytes(text.encode())
    return path


def rows_of(task, kind):
    """Three rows on two files, the first and the last on the same."""
    names = [f"sub/one.{SUFFIX[kind]}", f"two.{SUFFIX[kind]}", f"sub/one.{SUFFIX[kind]}"]
    if task == "qa":
        columns = zip(names, QUESTIONS, ANSWERS, strict=True)
        return [{KEY[kind]: n, "question": q, "answer": a} for n, q, a in columns]
    return [{KEY[kind]: n, "caption": c} for n, c in zip(names, CAPTIONS, strict=True)]


def write_files(folder):
    for name in ("sub/one", "two"):
        path = folder / "videos" / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_clip(path)
        path = folder / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 10), 200).save(path)


def config_of(kind, annotations, **section):
    """A dataset section; annotations: by split, what goes below `storage`."""
    processor = {"name": f"blip_{KEY[kind]}_eval", "image_size": 32}
    if kind == "videos":
        processor["n_frms"] = 2
    return OmegaConf.create(
        {
            "data_type": kind,
            "vis_processor": {"train": processor, "eval": processor},
            "build_info": {
                "annotations": {key: {"storage": path} for key, path in annotations.items()},
                kind: {"storage": f"mine/{kind}"},
            },
            **section,
        }
    )


def builder_of(task, config):
    return registry.get_builder_class(f"custom_{task}")(config)


def build(task, kind, annotations, **section):
    return builder_of(task, config_of(kind, annotations, **section)).build_datasets()


def error_of(task, kind, annotations, **section):
    """The message of the DatasetError that both checking and building raise."""
    builder = builder_of(task, config_of(kind, annotations, **section))
    with pytest.raises(DatasetError) as checked:
        builder.prepare()
    with pytest.raises(DatasetError) as built:
        builder.build_datasets()
    assert str(checked.value) == str(built.value)
    return str(built.value)


def records(dataset):
    return [{k: v for k, v in r.items() if k != "instance_id"} for r in dataset.annotation]


def snapshot(folder):
    return {path: path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


def answered(mine, name, answers, **more):
    rows = [{"image": "two.png", "question": f"{i}?", "answer": a} for i, a in enumerate(answers)]
    return str(write(mine / name, rows))
