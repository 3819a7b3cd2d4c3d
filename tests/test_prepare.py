"""Annotations made from the published files: read back through LAVIS, or refused by name."""

import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from clips import spoil_from_frame, write_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from lavis.common.registry import registry
from lavis.tasks import setup_task
from lavis.tasks.captioning import CaptionTask
from torch.utils.data import DataLoader

from lavis_uniadapter.common.atomic import write_together
from lavis_uniadapter.common.config import load_config
from lavis_uniadapter.common.distributed import destroy_process_group, init_process_group
from lavis_uniadapter.datasets.building import check_built, make_buildable
from lavis_uniadapter.processors.decoding import VIDEO_EXTENSIONS
from lavis_uniadapter.tools import recipes
from lavis_uniadapter.tools.prepare import annotations, didemo, msrvtt, videos
from lavis_uniadapter.tools.prepare.__main__ import main
from lavis_uniadapter.tools.prepare.annotations import AnnotationFile

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


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_clip(path, num_frames=4)
    return path


class Workplace:
    """Miniature published files, and the command line over them."""

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
        self.options += ["--data", root_file(self, "data.json")]
        self.options += ["--test-csv", root_file(self, "test.csv")]
        self.save()

    def save(self, encoding="utf-8"):
        text = json.dumps(self.data, ensure_ascii=False)
        root_file(self, "data.json").write_text(text, encoding=encoding)
        write_csv(root_file(self, "test.csv"), self.test_rows, encoding)

    def train_csv(self, ids, encoding="utf-8"):
        path = root_file(self, "train.csv")
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
                self.options += [f"--{split}", root_file(self, f"{split}_data.json")]
        self.val = ["--val", root_file(self, "val_data.json")]
        self.save()

    def save(self, encoding="utf-8"):
        for split, records in self.records.items():
            text = json.dumps(records, ensure_ascii=False)
            root_file(self, f"{split}_data.json").write_text(text, encoding=encoding)


def root_file(workplace, name):
    return workplace.root / name


def write_csv(path, rows, encoding="utf-8"):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue(), encoding=encoding)


def snapshot(folder):
    """Contents and time of every file below a folder; None if there is no folder."""
    if not folder.exists():
        return None
    return {
        path.relative_to(folder): (path.is_dir() or path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


@pytest.fixture
def msr(tmp_path, clip, capsys):
    return MSRVTT(tmp_path, clip, capsys)


@pytest.fixture
def did(tmp_path, clip, capsys):
    return DiDeMo(tmp_path, clip, capsys)


# --- MSR-VTT, read back through LAVIS -------------------------------------------------------------


def training_pairs(dataset):
    return [(Path(item["video"]).stem, item["text_input"]) for item in dataset]


def evaluation_captions(dataset):
    for item in dataset:
        assert Path(item["video"]).is_file()
    return {
        Path(video).stem: [dataset.text[i] for i in dataset.img2txt[index]]
        for index, video in enumerate(dataset.image)
    }


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("listed", [True, False], ids=["train-csv", "no-train-csv"])
@pytest.mark.parametrize("split", TRAINING)
def test_msrvtt_retrieval_reads_back(msr, monkeypatch, split, listed, encoding):
    msr.save(encoding)
    shuffled = list(reversed(TRAINING[split]))
    train_csv = msr.train_csv(shuffled, encoding) if listed else []
    report = msr.succeed("--split", split, *train_csv)
    datasets = msr.datasets("msrvtt_retrieval", monkeypatch, ["train", "test"])
    order = shuffled if listed else TRAINING[split]
    assert training_pairs(datasets["train"]) == [(v, c) for v in order for c in captions_of(v)]
    assert evaluation_captions(datasets["test"]) == {v: [sentence_of(v)] for v in TEST_1K_A}
    assert set(msr.written("retrieval_train.json")[0]) == {"video", "caption"}
    assert not (msr.output / "retrieval_val.json").exists()
    assert "no retrieval_val.json: 1k-A has none" in report
    assert "'run.valid_splits=[]'" in report


def test_msrvtt_validation_is_held_out_of_training(msr, monkeypatch):
    report = msr.succeed("--num-val", 3)
    datasets = msr.datasets("msrvtt_retrieval", monkeypatch)
    val = evaluation_captions(datasets["val"])
    trained = {video for video, _ in training_pairs(datasets["train"])}
    assert len(val) == 3 and all(val[video] == captions_of(video) for video in val)
    assert not trained & set(val)
    assert trained | set(val) == set(TRAINING["9k"])
    assert "'run.valid_splits=[]'" not in report and "no retrieval_val.json" not in report


def test_the_seed_picks_the_validation_videos(msr):
    picks = []
    for seed in (42, 42, 43):
        msr.succeed("--num-val", 3, "--seed", seed, "--overwrite")
        picks.append({record["video"] for record in msr.written("retrieval_val.json")})
    assert picks[0] == picks[1] != picks[2]


def test_msrvtt_captioning_reads_back(msr, monkeypatch):
    msr.succeed()
    datasets = msr.datasets("msrvtt_caption", monkeypatch)
    pairs = [(v, caption) for v in SPLITS["train"] for caption in captions_of(v)]
    assert training_pairs(datasets["train"]) == pairs
    assert [r["image_id"] for r in msr.written("cap_train.json")][:4] == [0, 0, 0, 1]
    for split, official in (("val", "validate"), ("test", "test")):
        records = msr.written(f"cap_{split}.json")
        assert [record["caption"] for record in records] == list(map(captions_of, SPLITS[official]))
        # LAVIS's task takes int() of the batch's ids.
        batch = next(iter(DataLoader(datasets[split], batch_size=8)))
        task = CaptionTask(num_beams=1, max_len=1, min_len=1, evaluate=True)
        model = Namespace(generate=lambda samples, **_: [Path(v).name for v in samples["video"]])
        assert task.valid_step(model, batch) == [
            {"caption": f"{video}.mp4", "image_id": int(video.removeprefix("video"))}
            for video in SPLITS[official]
        ]


def test_retrieval_only_writes_no_captioning_and_needs_no_videos_of_it(msr):
    for video in ("video6", "video7"):  # of the official test split, and of no other list in 7k
        (msr.videos / f"{video}.mp4").unlink()
    message = msr.fail("--split", "7k")
    assert "(cap_test.json 2)" in message and "video6.mp4" in message
    msr.succeed("--split", "7k", "--retrieval-only")
    assert {path.name for path in msr.output.iterdir()} == {
        "retrieval_train.json",
        "retrieval_test.json",
    }


@settings(deadline=None)
@given(st.sets(st.integers(0, 999), min_size=3, max_size=40), st.integers(0, 5), st.data())
def test_the_pick_depends_on_nothing_but_seed_and_names(numbers, seed, data):
    names = [f"video{number}.mp4" for number in numbers]
    num_val = data.draw(st.integers(1, len(names) - 2))
    train = AnnotationFile("retrieval_train.json", True, {name: [name] for name in names})
    rest, val = msrvtt.hold_out(train, num_val, seed)
    assert len(val.captions) == num_val and not val.training
    assert {**rest.captions, **val.captions} == train.captions
    assert not set(rest.captions) & set(val.captions)
    # Order does not matter, nor the absence of a video that is not picked.
    absent = data.draw(st.sampled_from(sorted(rest.captions)))
    shuffled = data.draw(st.permutations([name for name in names if name != absent]))
    again = AnnotationFile("retrieval_train.json", True, {name: [name] for name in shuffled})
    assert set(msrvtt.hold_out(again, num_val, seed)[1].captions) == set(val.captions)


@pytest.mark.parametrize("num_val", [-1, 8, 9])
def test_validation_must_leave_something_to_train_on(msr, num_val):
    message = msr.fail("--num-val", num_val)
    assert f"--num-val is {num_val}; of 8 training videos it must be from 0 to 7" in message


def test_a_validation_file_of_another_run_is_not_left_beside(msr):
    msr.succeed("--num-val", 2)
    message = msr.fail("--overwrite")
    assert "retrieval_val.json is left from another run" in message
    (msr.output / "retrieval_val.json").unlink()
    msr.succeed("--overwrite")


# --- MSR-VTT, errors ------------------------------------------------------------------------------


def spoil_leak(msr):
    return msr.train_csv([*TRAINING["9k"], "video8"])


def spoil_7k_leak(msr):
    msr.test_rows[0]["video_id"] = "video2"
    msr.save()
    return ["--split", "7k"]


def spoil_train_name(msr):
    return msr.train_csv([*TRAINING["9k"], "video99"])


def spoil_test_name(msr):
    msr.test_rows[0]["video_id"] = "video99"
    msr.save()
    return []


def spoil_train_repetition(msr):
    return msr.train_csv([*TRAINING["9k"], "video0"])


def spoil_test_repetition(msr):
    msr.test_rows.append(dict(msr.test_rows[0], key="ret9"))
    msr.save()
    return []


def spoil_video_repetition(msr):
    msr.data["videos"].append(msr.data["videos"][0])
    msr.save()
    return []


def spoil_sentence_repetition(msr):
    msr.data["sentences"].append(msr.data["sentences"][0])
    msr.save()
    return []


def spoil_sentence_name(msr):
    msr.data["sentences"][0]["video_id"] = "video99"
    msr.save()
    return []


def spoil_split(msr):
    msr.data["videos"][0]["split"] = "training"
    msr.save()
    return []


def spoil_field(msr):
    del msr.data["sentences"][5]["caption"]
    msr.save()
    return []


def spoil_part(msr):
    del msr.data["videos"]
    msr.save()
    return []


def spoil_record(msr):
    msr.data["videos"][1] = "video1"
    msr.save()
    return []


def spoil_mapping(msr):
    msr.data = [1]
    msr.save()
    return []


def spoil_json(msr):
    root_file(msr, "data.json").write_text("{")
    return []


def spoil_json_encoding(msr):
    root_file(msr, "data.json").write_bytes(b'{"videos": "caf\xe9"}')
    return []


def spoil_path(msr):
    root_file(msr, "test.csv").unlink()
    return []


def spoil_column(msr):
    write_csv(root_file(msr, "test.csv"), [{"key": "ret0", "video": "video8", "sentence": "a"}])
    return []


def spoil_train_column(msr):
    path = root_file(msr, "train.csv")
    write_csv(path, [{"vid_key": "video0"}])
    return ["--train-csv", path]


def spoil_empty_csv(msr):
    root_file(msr, "test.csv").write_text("")
    return []


def spoil_cells(msr):
    root_file(msr, "test.csv").write_text("video_id,sentence\nvideo8,a man, singing\n")
    return []


def spoil_short_row(msr):
    root_file(msr, "test.csv").write_text("video_id,sentence\nvideo8,a\nvideo10\n")
    return []


def spoil_name(msr):
    msr.test_rows[0]["video_id"] = ""
    msr.save()
    return []


def spoil_data_path(msr):
    root_file(msr, "data.json").unlink()
    return []


def spoil_sentence(msr):
    msr.test_rows[1]["sentence"] = " "
    msr.save()
    return []


def spoil_captions(msr):
    msr.data["sentences"] = [s for s in msr.data["sentences"] if s["video_id"] != "video3"]
    msr.save()
    return []


def spoil_number(msr):
    for part in msr.data.values():
        for record in part:
            record["video_id"] = record["video_id"].replace("video3", "video03")
    msr.save()
    return []


def spoil_folder(msr):
    shutil.rmtree(msr.videos)
    return []


def spoil_official_split(msr):
    for record in msr.data["videos"]:
        record["split"] = record["split"].replace("validate", "train")
    msr.save()
    return []


MSRVTT_ERRORS = {
    spoil_leak: r"1 test videos of .*test.csv are also in .*train.csv: video8;",
    spoil_7k_leak: r"1 test videos of .*test.csv are also in the 7k training list: video2;",
    spoil_train_name: r"train.csv names 1 videos that are not .* of .*data.json: 'video99'",
    spoil_test_name: r"test.csv names 1 videos that are not .* of .*data.json: 'video99'",
    spoil_train_repetition: r"train.csv:10: has the video_id 'video0', as .*train.csv:2 has",
    spoil_test_repetition: r"test.csv:4: has the video_id 'video10', as .*test.csv:2 has",
    spoil_video_repetition: r"record 10: has the video_id 'video0', as .*record 0 has",
    spoil_sentence_repetition: r"record 30: has the video_id 'video0' and sen_id 0, as .*record 0",
    spoil_sentence_name: r"'sentences' of .*data.json names 1 videos that are not .*: 'video99'",
    spoil_split: r"record 0: needs train or validate or test under 'split', has 'training'",
    spoil_field: r"'sentences' of .*data.json, record 5: needs a string under 'caption', has N",
    spoil_part: r"'videos' of .*data.json: must be a list, .* and is None",
    spoil_record: r"'videos' of .*data.json, record 1: must be an object, .* and is 'video1'",
    spoil_mapping: r"data.json is not as it is published: it must be an object",
    spoil_json: r"data.json:1: is no valid JSON",
    spoil_json_encoding: r"data.json:1: is not UTF-8",
    spoil_path: r"test.csv: cannot be read \(No such file or directory\)",
    spoil_data_path: r"data.json: cannot be read .*No such file or directory",
    spoil_column: r"test.csv:1: has no column 'video_id', but 'key', 'video', 'sentence'",
    spoil_train_column: r"train.csv:1: has no column 'video_id', but 'vid_key'",
    spoil_empty_csv: r"test.csv: is empty",
    spoil_cells: r"test.csv:2: has 3 cells, and the header has 2",
    spoil_short_row: r"test.csv:3: has 1 cells, and the header has 2",
    spoil_name: r"test.csv:2: needs the name of a file, without folders, under 'video_id', has ''",
    spoil_sentence: r"1 videos of retrieval_test.json have no caption, .*: video8.mp4",
    spoil_captions: r"1 videos of cap_train.json have no caption, .*: video3.mp4",
    spoil_number: r"video_ids must be 'video<number>'; not so: video03\.",
    spoil_folder: r"There is no folder .*videos; correct --videos",
    spoil_official_split: r"cap_val.json would hold no video",
}


@pytest.mark.parametrize("spoil", MSRVTT_ERRORS, ids=lambda spoil: spoil.__name__)
def test_what_is_wrong_with_msrvtt_is_named(msr, spoil):
    options = spoil(msr)
    assert re.search(MSRVTT_ERRORS[spoil], msr.fail(*options))
    assert not msr.output.exists()


def test_retrieval_needs_no_numbers_in_names(msr):
    spoil_number(msr)
    (msr.videos / "video3.mp4").rename(msr.videos / "video03.mp4")
    msr.succeed("--retrieval-only")
    assert "video03.mp4" in {record["video"] for record in msr.written("retrieval_train.json")}


def test_empty_captions_are_left_out_and_counted(msr):
    msr.data["sentences"][0]["caption"] = " \n"  # video0
    msr.data["sentences"][4]["caption"] = ""  # video4: validation of captioning
    msr.save()
    assert "\n  data.json: 2 empty captions\n" in msr.succeed()
    kept = [r["caption"] for r in msr.written("cap_train.json") if r["video"] == "video0.mp4"]
    assert kept == captions_of("video0")[1:]
    assert msr.written("cap_val.json")[0]["caption"] == captions_of("video4")[1:]


def test_other_counts_than_the_published_are_all_named(msr):
    message = msr.fail(*msr.train_csv(TRAINING["9k"]), counts=None)
    for found, published, what in (
        (4, 6513, "videos of split 'train' in .*data.json"),
        (2, 497, "videos of split 'validate' in .*data.json"),
        (4, 2990, "videos of split 'test' in .*data.json"),
        (30, 200000, "captions in .*data.json"),
        (8, 9000, r"videos in .*train.csv \(--split 9k\)"),
        (2, 1000, "videos in .*test.csv"),
    ):
        assert re.search(rf"{what}: found {found}, published {published}\n", message)
    assert "--allow-other-counts" in message


@pytest.fixture
def undecoded(monkeypatch):
    """Pass over the decoding, whose cost for whole benchmarks would be minutes."""
    monkeypatch.setattr(videos, "files_with_problems", lambda *_: {})


def published_msrvtt(msr):
    """Stand-ins of the published numbers, in the published order of ids."""
    splits = [split for split, count in msrvtt.OFFICIAL.items() for _ in range(count)]
    msr.data["videos"] = [
        {"video_id": f"video{number}", "split": split} for number, split in enumerate(splits)
    ]
    msr.data["sentences"] = [
        {"video_id": f"video{number}", "caption": f"{number} {turn}", "sen_id": 20 * number + turn}
        for number in range(10_000)
        for turn in range(20)
    ]
    msr.test_rows = [
        {"video_id": f"video{number}", "sentence": "a query"} for number in range(7010, 8010)
    ]
    msr.save()
    for number in range(10_000):
        (msr.videos / f"video{number}.mp4").touch()


def test_the_published_numbers_of_msrvtt_pass(msr, undecoded):
    published_msrvtt(msr)
    report = msr.succeed("--num-val", 500, counts=None)
    assert counts_in(report) == {
        "retrieval_train.json": (8500, 170_000),
        "retrieval_val.json": (500, 10_000),
        "retrieval_test.json": (1000, 1000),
        "cap_train.json": (6513, 130_260),
        "cap_val.json": (497, 9940),
        "cap_test.json": (2990, 59_800),
    }
    (msr.output / "retrieval_val.json").unlink()
    report = msr.succeed("--split", "7k", "--overwrite", counts=None)
    assert counts_in(report)["retrieval_train.json"] == (7010, 140_200)
    # The 9k list under the name of the other.
    nine = msr.train_csv(f"video{n}" for n in [*range(7010), *range(8010, 10_000)])
    message = msr.fail("--split", "7k", *nine, counts=None)
    assert re.search(r"train.csv \(--split 7k\): found 9000, published 7010\n", message)


# --- DiDeMo ---------------------------------------------------------------------------------------


def test_didemo_paragraphs_read_back(did, monkeypatch):
    did.save("utf-8-sig")
    did.succeed(*did.val)
    datasets = did.datasets("didemo_retrieval", monkeypatch)
    pairs = training_pairs(datasets["train"])
    assert pairs == [("1@N00_a", "first part then más"), ("2@N00_b", "one only")]
    assert evaluation_captions(datasets["val"]) == {"3@N00_c": ["begins goes on ends"]}
    assert evaluation_captions(datasets["test"]) == {
        "4@N00_d": ["all of it"],
        "5@N00_e": ["half and half"],
    }


def test_didemo_without_validation(did, monkeypatch):
    report = did.succeed()
    assert "no retrieval_val.json: --val names no file" in report
    assert "'run.valid_splits=[]'" in report
    assert len(did.datasets("didemo_retrieval", monkeypatch, ["train", "test"])["train"]) == 2


def test_empty_descriptions_are_left_out_of_their_paragraph(did):
    did.records["val"][1]["description"] = "  "
    did.save()
    assert "\n  val_data.json: 1 empty captions\n" in did.succeed(*did.val)
    assert did.written("retrieval_val.json")[0]["caption"] == ["begins ends"]


def didemo_leak(did):
    did.records["train"].append(dict(did.records["test"][0], annotation_id=99))


def didemo_repetition(did):
    did.records["train"].append(did.records["train"][0])


def didemo_field(did):
    did.records["train"][0]["description"] = ["a list"]


def didemo_id(did):
    did.records["train"][0]["annotation_id"] = True


def didemo_list(did):
    did.records["train"] = {}


def didemo_empty(did):
    for record in did.records["val"]:
        record["description"] = ""


def didemo_no_records(did):
    did.records["train"] = []


DIDEMO_ERRORS = {
    didemo_leak: r"1 videos are both in retrieval_train.json and retrieval_test.json: 4@N00_d.mpg;",
    didemo_repetition: r"record 3: has the video '1@N00_a.avi' and annotation_id 0, as",
    didemo_field: r"data.json, record 0: needs a string under 'description', has \['a list'\]",
    didemo_id: r"data.json, record 0: needs a whole number or .* under 'annotation_id', has True",
    didemo_list: r"train_data.json: must be a list",
    didemo_empty: r"1 videos of retrieval_val.json have no caption, .*: 3@N00_c.3gp",
    didemo_no_records: r"train_data.json: holds no records",
}


@pytest.mark.parametrize("spoil", DIDEMO_ERRORS, ids=lambda spoil: spoil.__name__)
def test_what_is_wrong_with_didemo_is_named(did, spoil):
    spoil(did)
    did.save()
    assert re.search(DIDEMO_ERRORS[spoil], did.fail(*did.val))
    assert not did.output.exists()


def test_published_numbers_of_didemo(did, undecoded):
    message = did.fail(*did.val, counts=None)
    for split, found, published in (("train", 2, 8395), ("val", 1, 1065), ("test", 2, 1004)):
        assert re.search(rf"{split}_data.json: found {found}, published {published}\n", message)
    for split, count in didemo.PUBLISHED.items():
        did.records[split] = [
            {"video": f"{split}{n}.avi", "description": "a", "annotation_id": n}
            for n in range(count)
        ]
        for n in range(count):
            (did.videos / f"{split}{n}.mp4").touch()
    did.save()
    report = did.succeed(*did.val, counts=None)
    assert counts_in(report)["retrieval_train.json"] == (8395, 8395)


# --- video files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("present", "matched"),
    [
        (["a.b.avi"], "a.b.avi"),
        (["a.b.mp4"], "a.b.mp4"),
        (["a.b.MOV"], "a.b.MOV"),
        (["a.b.avi.mp4"], "a.b.avi.mp4"),  # what DiDeMo's download script makes
        (["a.b.avi", "a.b.mp4", "a.b.avi.mp4"], "a.b.avi"),
        (["a.b.3gp", "a.b.jpg", "a.b.mp4.part", "a.b", "a.mp4"], "a.b.3gp"),
        (["a.b", "a.b.jpg", "a.b.mp4.part", "a.mp4", "A.b.avi", "a.b.c.avi"], None),
    ],
)
def test_files_match_whatever_their_extension(tmp_path, present, matched):
    for name in present:
        (tmp_path / name).touch()
    (tmp_path / "a.b.webm").mkdir()  # no file
    assert videos.find_videos(tmp_path, ["a.b.avi"]) == ({"a.b.avi": matched} if matched else {})


@settings(deadline=None)
@given(
    st.text(min_size=1).filter(lambda name: videos.stem(name) == name and "/" not in name),
    st.lists(st.sampled_from(sorted(VIDEO_EXTENSIONS)), max_size=3),
)
def test_stem_takes_all_video_extensions_off_and_nothing_else(name, extensions):
    # A leading dot begins a hidden file's name, not an extension.
    assert videos.stem(f"x{name}" + "".join(extensions)) == videos.stem(f"x{name}")
    assert videos.stem(f"x{name}.txt") == f"x{name}.txt"


def test_several_files_of_one_video_are_named(did):
    (did.videos / "1@N00_a.avi").unlink()
    did.add_videos(["1@N00_a.mp4", "1@N00_a.webm"])
    message = did.fail()
    assert "1 videos have several files and none of the annotated name" in message
    assert "1@N00_a.avi: 1@N00_a.mp4, 1@N00_a.webm" in message


@pytest.mark.parametrize("present", ["1@N00_a.avi", "1@N00_a.mp4"])
def test_one_file_of_several_videos_is_named(did, present):
    did.records["test"].append({"video": "1@N00_a.mov", "description": "a", "annotation_id": 9})
    did.save()
    (did.videos / "1@N00_a.avi").rename(did.videos / present)
    message = did.fail()
    assert "1 files are all there is for several annotated videos" in message
    assert f"{present}: 1@N00_a.avi, 1@N00_a.mov" in message
    did.add_videos({"1@N00_a.avi", "1@N00_a.mov"} - {present})
    did.succeed()


def test_file_names_are_what_is_in_the_folder(msr, monkeypatch):
    for video in ("video0", "video8"):
        (msr.videos / f"{video}.mp4").rename(msr.videos / f"{video}.webm")
    msr.succeed()
    for builder in ("msrvtt_retrieval", "msrvtt_caption"):
        splits = ["train", "test"]
        datasets = msr.datasets(builder, monkeypatch, splits)
        assert Path(datasets["train"][0]["video"]).name == "video0.webm"
        names = {Path(item["video"]).name for item in datasets["test"]}
        assert "video8.webm" in names and "video8.mp4" not in names
        for split in splits:
            assert all(Path(item["video"]).is_file() for item in datasets[split])


def test_missing_and_undecodable_videos_are_counted_and_the_first_twenty_named(did):
    names = [f"{index:02d}.mp4" for index in range(46)]
    did.records["train"] = [
        {"video": name, "description": "a", "annotation_id": 0} for name in names
    ]
    did.save()
    did.add_videos(names[22:])
    for name in names[22:44]:
        did.replace_video(name, b"no video")
    message = did.fail()
    assert "22 of 48 videos are missing from" in message
    assert "22 of 48 videos cannot be decoded" in message
    named = [name in message for name in names]
    assert named == [True] * 20 + [False] * 2 + [True] * 20 + [False] * 4
    assert message.count("and 2 more") == 2
    assert "44 of them are for training only: --skip-missing leaves them out" in message
    assert "validation or test" not in message


def test_training_videos_can_be_left_out_and_are_counted(msr, monkeypatch):
    (msr.videos / "video0.mp4").unlink()
    msr.spoil_last_frame("video2.mp4")
    assert "video2.mp4: decord says" in msr.fail()
    report = msr.succeed("--skip-missing", "--num-val", 2)
    assert "\n  2 videos, missing or undecodable: video0.mp4, video2.mp4\n" in report
    for file in ("retrieval_train.json", "cap_train.json"):
        assert f"\n    of {file} 2 videos with 6 captions\n" in report
    assert "of retrieval_test" not in report
    datasets = msr.datasets("msrvtt_retrieval", monkeypatch)
    left = {video for video, _ in training_pairs(datasets["train"])}
    assert left | set(evaluation_captions(datasets["val"])) == {
        video for video in TRAINING["9k"] if video not in ("video0", "video2")
    }
    assert evaluation_captions(datasets["test"]) == {v: [sentence_of(v)] for v in TEST_1K_A}


@pytest.mark.parametrize("damage", ["missing", "undecodable"])
def test_evaluation_videos_cannot_be_left_out(did, damage):
    for name in ("1@N00_a.avi", "3@N00_c.3gp", "5@N00_e.mp4"):
        if damage == "missing":
            (did.videos / name).unlink()
        else:
            did.spoil_last_frame(name)
    message = did.fail(*did.val, "--skip-missing")
    assert re.search(r"2 of 5 videos (are missing|cannot be decoded)", message)
    assert "(retrieval_val.json 1, retrieval_test.json 1)" in message
    assert "1@N00_a.avi" not in message and "training only" not in message
    message = did.fail(*did.val)
    assert re.search(r"3 of 5 videos (are missing|cannot be decoded)", message)
    assert "1 of them are for training only: --skip-missing" in message


def test_a_video_trained_on_here_and_tested_on_there_is_not_left_out(msr):
    (msr.videos / "video6.mp4").unlink()  # 9k training of retrieval, test of captioning
    message = msr.fail("--skip-missing")
    assert "(cap_test.json 1)" in message and "video6.mp4" in message
    report = msr.succeed("--skip-missing", "--retrieval-only")
    assert "\n  1 videos, missing or undecodable: video6.mp4\n" in report
    assert "\n    of retrieval_train.json 1 videos with 3 captions\n" in report


def test_something_must_be_left_to_train_on(did):
    for name in did.descriptions["train"]:
        (did.videos / name).unlink()
    assert "retrieval_train.json would hold no video" in did.fail("--skip-missing")


def test_every_video_is_decoded_at_its_end_and_once(msr, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        videos, "frames_problem", lambda path, choose: decoded.append((path, choose(7)))
    )
    msr.succeed()
    assert sorted(decoded) == sorted((str(msr.videos / f"{v}.mp4"), [6]) for v in IDS)


# --- writing --------------------------------------------------------------------------------------

CONTENTS = {"a.json": b"new", "b.json": b"neu", "c.json": b"3"}


@pytest.fixture
def folder(tmp_path):
    """An output folder with a foreign file and an old version of one file."""
    (tmp_path / "a.json").write_text("old")
    (tmp_path / "foreign.txt").write_text("keep")
    return tmp_path


def contents_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_contents(folder):
    write_together({folder / name: content for name, content in CONTENTS.items()})


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize(("function", "call"), [("fsync", 1), ("fsync", 3), ("replace", 1)])
def test_an_error_while_writing_leaves_all_as_it_was(folder, monkeypatch, function, call, error):
    before = contents_of(folder)
    original, calls = getattr(os, function), []

    def fail_once(*args):
        calls.append(args)
        if len(calls) == call:
            raise error
        return original(*args)

    monkeypatch.setattr(os, function, fail_once)
    with pytest.raises(type(error)):
        write_contents(folder)
    assert len(calls) == call
    assert contents_of(folder) == before


@pytest.mark.parametrize("call", [1, 2])
def test_a_killed_process_leaves_no_annotations(tmp_path, call):
    child = os.fork()
    if child == 0:
        calls = []

        def kill(_):
            calls.append(None)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = kill
        write_contents(tmp_path)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert not list(tmp_path.glob("*.json"))


def test_written_files_are_synchronised_before_they_take_their_place(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *a: (events.append("replace"), replace(*a)))
    write_contents(tmp_path)
    assert events == ["fsync"] * 3 + ["replace"] * 3
    assert contents_of(tmp_path) == {"a.json": b"new", "b.json": b"neu", "c.json": b"3"}


def test_other_contents_are_replaced_only_when_told_to(msr):
    msr.succeed()
    before = snapshot(msr.output)
    report = msr.succeed()  # the same again: nothing is touched
    assert report.count("(was there already)") == len(counts_in(report)) == 5
    assert snapshot(msr.output) == before
    msr.data["sentences"][0]["caption"] = "another"  # video0
    msr.save()
    message = msr.fail()
    assert "holds other contents in retrieval_train.json, cap_train.json." in message
    report = msr.succeed("--overwrite")
    assert report.count("(was there already)") == 3
    assert msr.written("cap_train.json")[0]["caption"] == "another"


@pytest.mark.parametrize("below", ["", "annotations"])
def test_an_output_that_cannot_be_written_is_an_error(msr, below):
    msr.output.write_text("a file")
    status, out, err = msr.run("--output", msr.output / below)
    assert (status, out) == (2, "")
    assert "error: " in err and str(msr.output / below) in err
    assert msr.output.read_text() == "a file"


@settings(deadline=None)
@given(st.lists(st.text()))
def test_any_caption_survives_in_any_locale(captions):
    records = AnnotationFile("a.json", True, {"a.mp4": captions}).records({"a.mp4": "a.mov"})
    read = json.loads(annotations.encode(records).decode("ascii"))
    assert read == [{"video": "a.mov", "caption": caption} for caption in captions]


# --- the report -----------------------------------------------------------------------------------


def counts_in(report):
    lines = re.findall(r"^  (\w+\.json) +(\d+) videos +(\d+) captions", report, re.MULTILINE)
    return {name: (int(videos), int(captions)) for name, videos, captions in lines}


def counts_of(workplace):
    counts = {}
    for path in workplace.output.iterdir():
        records = json.loads(path.read_text())
        captions = [r["caption"] for r in records]
        captions = sum(([c] if isinstance(c, str) else c for c in captions), [])
        counts[path.name] = (len({r["video"] for r in records}), len(captions))
    return counts


def test_the_report_counts_what_the_files_hold(msr):
    (msr.videos / "video1.mp4").unlink()
    msr.data["sentences"][3]["caption"] = ""  # video3
    msr.save()
    report = msr.succeed("--skip-missing", "--num-val", 2)
    assert counts_in(report) == counts_of(msr)
    assert counts_in(report)["cap_train.json"] == (3, 8)


def test_the_report_of_didemo_counts_what_the_files_hold(did):
    report = did.succeed(*did.val)
    assert counts_in(report) == counts_of(did)
    assert counts_in(report)["retrieval_test.json"] == (2, 2)


def printed_commands(report):
    lines = report.split("next:\n")[1].replace("\\\n", " ").splitlines()
    return {words[2]: words for words in map(shlex.split, lines)}


@pytest.fixture
def process_group():
    yield
    destroy_process_group()


def built(command, workplace, monkeypatch):
    """The datasets of a printed command, as a run builds and checks them."""
    assert command[:2] == ["uniadapter", "train"]
    config = load_config(recipes.find(command[2], recipes.runs()), command[3:])
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", str(workplace.root / "elsewhere"))
    init_process_group("cpu")
    run = config.run_cfg
    splits = [*run.train_splits, *run.valid_splits, *run.test_splits]
    make_buildable(config.datasets_cfg, splits)
    datasets = setup_task(config).build_datasets(config)
    check_built(datasets, config.datasets_cfg)
    (datasets,) = datasets.values()
    assert set(datasets) == set(splits)
    assert datasets["train"][0]["video"].shape[1:] == (8, 224, 224)
    return datasets


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("num_val", [0, 2])
def test_the_next_commands_of_msrvtt_find_the_files(msr, monkeypatch, num_val):
    monkeypatch.chdir(msr.root)  # relative paths are the command line's, not LAVIS's
    msr.options[1], msr.options[3] = "cache/msrvtt/videos", "cache/msrvtt/annotations"
    commands = printed_commands(msr.succeed("--num-val", num_val))
    assert list(commands) == ["msrvtt_retrieval", "msrvtt_caption"]
    datasets = built(commands["msrvtt_retrieval"], msr, monkeypatch)
    assert set(datasets) == {"train", "test"} | ({"val"} if num_val else set())
    assert len(datasets["train"]) == 3 * (8 - num_val)
    datasets = built(commands["msrvtt_caption"], msr, monkeypatch)
    assert {split: len(d) for split, d in datasets.items()} == {"train": 12, "val": 2, "test": 4}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("validated", [True, False])
def test_the_next_command_of_didemo_finds_the_files(did, monkeypatch, validated):
    commands = printed_commands(did.succeed(*(did.val if validated else [])))
    assert list(commands) == ["didemo_retrieval"]
    datasets = built(commands["didemo_retrieval"], did, monkeypatch)
    expected = {"train": 2, "test": 2} | ({"val": 1} if validated else {})
    assert {split: len(dataset) for split, dataset in datasets.items()} == expected


# --- the command line -----------------------------------------------------------------------------


def test_the_command_runs_as_a_module(msr):
    command = [
        sys.executable,
        "-m",
        "lavis_uniadapter.prepare",
        "msrvtt",
        *map(str, msr.options),
    ]
    failed = subprocess.run(command, capture_output=True, text=True)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: MSR-VTT cannot be prepared:\n- ")


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    listed = capsys.readouterr().out
    assert re.findall(r"^ {4}(\w+) +\S+: ", listed, re.MULTILINE) == ["msrvtt", "didemo"]


@pytest.mark.parametrize("argv", [[], ["msrvt"], ["msrvtt"], ["didemo", "--train", "a"]])
def test_incomplete_command_lines_say_what_is_missing(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert re.search("required: |invalid choice: 'msrvt'", capsys.readouterr().err)
