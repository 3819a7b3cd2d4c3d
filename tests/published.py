"""Miniature published files of MSR-VTT and DiDeMo, and `uniadapter prepare` over them."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path

from clips import spoil_from_frame
from lavis.common.registry import registry

from lavis_uniadapter.tools.prepare.command import main

SPLITS = {
    "train": ["video0", "video1", "video2", "video3"],
    "validate": ["video4", "video5"],
    "test": ["video6", "video7", "video8", "video10"],
}
IDS = [video for split in SPLITS.values() for video in split]
TEST_1K_A = ["video10", "video8"]
TRAINING = {"9k": [video for video in IDS if video not in TEST_1K_A], "7k": IDS[:6]}


def captions_of(video):
    return [f"{video} shows a café", f"{video}, seen again", f"{video} shows a café"]


def sentence_of(video):
    return f"the query, of {video}"


class Workplace:
    """A folder of published files, videos and annotations, and the command over them."""

    def __init__(self, root, clip, capsys):
        self.root = root
        self.clip = clip
        self.capsys = capsys
        self.videos = root / "cache" / self.name / "videos"
        self.output = root / "cache" / self.name / "annotations"
        self.videos.mkdir(parents=True)
        self.options = ["--videos", self.videos, "--output", self.output]

    def add_videos(self, names):
        for name in names:
            os.link(self.clip, self.videos / name)

    def replace_video(self, name, content):
        (self.videos / name).unlink()
        (self.videos / name).write_bytes(content)

    def spoil_last_frame(self, name):
        self.replace_video(name, self.clip.read_bytes())
        spoil_from_frame(self.videos / name, 3)

    def run(self, *options, counts="--allow-other-counts"):
        argv = [self.name, *self.options, *options, *([counts] if counts else [])]
        status = main(list(map(str, argv)))
        printed = self.capsys.readouterr()
        return status, printed.out, printed.err

    def succeed(self, *options, **kwargs):
        status, out, err = self.run(*options, **kwargs)
        assert status == 0, err
        return out

    def fail(self, *options, **kwargs):
        """The error message, once it is certain that nothing has been written."""
        before = snapshot(self.output)
        status, out, err = self.run(*options, **kwargs)
        assert (status, out) == (2, "")
        assert snapshot(self.output) == before
        assert "error: " in err
        return err[err.index("error: ") :]

    def written(self, name):
        return json.loads((self.output / name).read_text(encoding="ascii"))

    def datasets(self, builder, monkeypatch, splits=("train", "val", "test")):
        """What LAVIS's builder makes of the cache folder, by its own configuration."""
        monkeypatch.setitem(registry.mapping["paths"], "cache_root", str(self.root / "cache"))
        cls = registry.get_builder_class(builder)
        config = cls().config
        for split in {"train", "val", "test"}.difference(splits):
            del config.build_info.annotations[split]
        return cls(config).build_datasets()


class MSRVTT(Workplace):
    name = "msrvtt"

    def __init__(self, *args):
        super().__init__(*args)
        self.data = {
            "videos": [{"video_id": v, "split": s, "id": 1} for s in SPLITS for v in SPLITS[s]],
            # As published, the captions of a video do not stand together.
            "sentences": [
                {"video_id": video, "caption": captions_of(video)[turn], "sen_id": 10 * turn + i}
                for turn in range(3)
                for i, video in enumerate(IDS)
            ],
        }
        self.test_rows = [
            {"key": f"ret{i}", "vid_key": "msr", "video_id": v, "sentence": sentence_of(v)}
            for i, v in enumerate(TEST_1K_A)
        ]
        self.add_videos(f"{video}.mp4" for video in IDS)
        self.options += ["--data", self.root / "data.json", "--test-csv", self.root / "test.csv"]
        self.save()

    def save(self, encoding="utf-8"):
        text = json.dumps(self.data, ensure_ascii=False)
        (self.root / "data.json").write_text(text, encoding=encoding)
        write_csv(self.root / "test.csv", self.test_rows, encoding)

    def train_csv(self, ids, encoding="utf-8"):
        path = self.root / "train.csv"
        write_csv(path, [{"video_id": video} for video in ids], encoding)
        return ["--train-csv", path]


class DiDeMo(Workplace):
    name = "didemo"
    descriptions = {
        "train": {"1@N00_a.avi": ["first part", "then más"], "2@N00_b.mov": ["one only"]},
        "val": {"3@N00_c.3gp": ["begins", "goes on", "ends"]},
        "test": {"4@N00_d.mpg": ["all of it"], "5@N00_e.mp4": ["half", "and half"]},
    }

    def __init__(self, *args):
        super().__init__(*args)
        self.records = {}
        for split, by_video in self.descriptions.items():
            # By turns, so that the descriptions of a video do not stand together.
            self.records[split] = [
                {"video": v, "description": d[turn], "annotation_id": 10 * turn + i, "times": []}
                for turn in range(3)
                for i, (v, d) in enumerate(by_video.items())
                if turn < len(d)
            ]
            self.add_videos(by_video)
            if split != "val":
                self.options += [f"--{split}", self.root / f"{split}_data.json"]
        self.val = ["--val", self.root / "val_data.json"]
        self.save()

    def save(self, encoding="utf-8"):
        for split, records in self.records.items():
            text = json.dumps(records, ensure_ascii=False)
            (self.root / f"{split}_data.json").write_text(text, encoding=encoding)


def write_csv(path, rows, encoding="utf-8"):
    with open(path, "w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def snapshot(folder):
    """Contents of every file below a folder; None if there is no folder."""
    if not folder.exists():
        return None
    return {
        path.relative_to(folder): path.is_dir() or path.read_bytes() for path in folder.rglob("*")
    }


def training_pairs(dataset):
    return [(Path(item["video"]).stem, item["text_input"]) for item in dataset]


def evaluation_captions(dataset):
    for item in dataset:
        assert Path(item["video"]).is_file()
    return {
        Path(video).stem: [dataset.text[i] for i in dataset.img2txt[index]]
        for index, video in enumerate(dataset.image)
    }


def counts_in(report):
    """Numbers of videos and captions that a report states, by file."""
    lines = re.findall(r"^  (\w+\.json) +(\d+) videos +(\d+) captions", report, re.MULTILINE)
    return {name: (int(videos), int(captions)) for name, videos, captions in lines}
