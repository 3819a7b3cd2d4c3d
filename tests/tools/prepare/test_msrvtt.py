"""MSR-VTT's annotations: read back through LAVIS, or refused by name."""

import re
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lavis.tasks.captioning import CaptionTask
from published import (
    SPLITS,
    TEST_1K_A,
    TRAINING,
    captions_of,
    counts_in,
    evaluation_captions,
    sentence_of,
    training_pairs,
    write_csv,
)
from torch.utils.data import DataLoader

from lavis_uniadapter.tools.prepare import benchmarks, videos
from lavis_uniadapter.tools.prepare.annotations import hold_out
from lavis_uniadapter.tools.prepare.benchmarks import Split


@pytest.mark.parametrize("listed", [True, False], ids=["train-csv", "no-train-csv"])
@pytest.mark.parametrize("split, encoding", [("9k", "utf-8"), ("7k", "utf-8-sig")])
def test_retrieval_reads_back(msr, monkeypatch, split, listed, encoding):
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
    assert "'run.valid_splits=[]'" in report


@pytest.fixture
def not_decoded(monkeypatch):
    """Call it to make decoding an error."""

    def refuse(*_):
        raise AssertionError("a video is decoded before the output is checked")

    return lambda: monkeypatch.setattr(videos, "frames_problem", refuse)


def test_validation_is_held_out_of_training(msr, monkeypatch, not_decoded):
    report = msr.succeed("--num-val", 3)
    datasets = msr.datasets("msrvtt_retrieval", monkeypatch)
    val = evaluation_captions(datasets["val"])
    trained = {video for video, _ in training_pairs(datasets["train"])}
    assert len(val) == 3 and all(val[video] == captions_of(video) for video in val)
    assert not trained & set(val)
    assert trained | set(val) == set(TRAINING["9k"])
    assert "'run.valid_splits=[val]'" in report
    # without validation, its videos are trained on
    not_decoded()
    for options in ((), ("--overwrite",)):
        assert "retrieval_val.json was written by another run" in msr.fail(*options)
    assert (msr.output / "retrieval_val.json").exists()


def test_the_seed_picks_the_validation_videos(msr):
    picks = []
    for seed in (42, 42, 43):
        msr.succeed("--num-val", 3, "--seed", seed, "--overwrite")
        picks.append({record["video"] for record in msr.written("retrieval_val.json")})
    assert picks[0] == picks[1] != picks[2]


@settings(deadline=None)
@given(st.sets(st.integers(0, 999), min_size=3, max_size=40), st.integers(0, 5), st.data())
def test_the_pick_depends_on_nothing_but_seed_and_names(numbers, seed, data):
    names = [f"video{number}.mp4" for number in numbers]

    def split(videos):
        return Split("msrvtt_retrieval", "train", {v: [v] for v in videos}, "", (0, 0))

    num_val = data.draw(st.integers(1, len(names) - 2))
    rest, val = hold_out(split(names), num_val, seed)
    assert len(val.captions) == num_val and val.name == "val"
    assert {**rest.captions, **val.captions} == split(names).captions
    assert not set(rest.captions) & set(val.captions)
    # Order does not matter, nor the absence of a video that is not picked.
    absent = data.draw(st.sampled_from(sorted(rest.captions)))
    shuffled = data.draw(st.permutations([name for name in names if name != absent]))
    assert set(hold_out(split(shuffled), num_val, seed)[1].captions) == set(val.captions)


@pytest.mark.parametrize("num_val", [-1, 8])
def test_validation_must_leave_something_to_train_on(msr, num_val, not_decoded):
    not_decoded()
    message = msr.fail("--num-val", num_val)
    assert f"--num-val is {num_val}; of 8 training videos it must be from 0 to 7" in message


def test_captioning_reads_back(msr, monkeypatch):
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
    assert "2 of them are for validation or test" in message and "video6.mp4" in message
    msr.succeed("--split", "7k", "--retrieval-only")
    files = {path.name for path in msr.output.iterdir()}
    assert files == {"retrieval_train.json", "retrieval_test.json"}


# --- errors ---------------------------------------------------------------------------------------


def rename_video3(msr):
    for record in (*msr.data["videos"], *msr.data["sentences"]):
        record["video_id"] = record["video_id"].replace("video3", "../video3")


def without_captions_of_video3(msr):
    msr.data["sentences"] = [s for s in msr.data["sentences"] if s["video_id"] != "video3"]


def without_official_validation(msr):
    for record in msr.data["videos"]:
        record["split"] = record["split"].replace("validate", "train")


# What is changed, which may return options, and the message.
ERRORS = {
    "leak": (
        lambda m: m.train_csv([*TRAINING["9k"], "video8"]),
        r"1 videos are both in .*train.csv and in .*test.csv: video8.mp4;",
    ),
    "leak of 7k": (
        lambda m: m.test_rows[0].update(video_id="video2") or ["--split", "7k"],
        r"1 videos are both in the 7k training list and in .*test.csv: video2.mp4;",
    ),
    "unknown in training": (
        lambda m: m.train_csv([*TRAINING["9k"], "video99"]),
        r"1 videos of retrieval_train.json have no caption: video99.mp4",
    ),
    "unknown in the test": (
        lambda m: m.test_rows[0].update(video_id="video99"),
        r"(?s)1 of 11 videos in .* cannot be used:.*video99.mp4: missing",
    ),
    "repeated in training": (
        lambda m: m.train_csv([*TRAINING["9k"], "video0"]),
        r"train.csv:10: repeats the video_id 'video0' of .*train.csv:2",
    ),
    "repeated in the test": (
        lambda m: m.test_rows.append(m.test_rows[0]),
        r"test.csv:4: repeats the video_id 'video10' of .*test.csv:2",
    ),
    "repeated video": (
        lambda m: m.data["videos"].append(m.data["videos"][0]),
        r"record 10: repeats the video_id 'video0' of .*record 0",
    ),
    "split": (
        lambda m: m.data["videos"][0].update(split="training"),
        r"record 0: needs train or validate or test under 'split', has 'training'",
    ),
    "field": (
        lambda m: m.data["sentences"][5].pop("caption") and [],
        r"'sentences' of .*data.json, record 5: needs a string under 'caption', has N",
    ),
    "part": (lambda m: m.data.pop("videos") and [], "data.json is not .*'videos'.*; download it"),
    "record": (
        lambda m: m.data["videos"].append("video1"),
        r"'videos' of .*data.json, record 10: must be an object, .* not 'video1'",
    ),
    "empty name": (
        lambda m: m.test_rows[0].update(video_id=""),
        r"test.csv:2: needs 'video<number>' under 'video_id', has ''",
    ),
    "name": (rename_video3, r"record 3: needs 'video<number>' under 'video_id', has '../video3'"),
    "query": (
        lambda m: m.test_rows[1].update(sentence=" "),
        r"1 videos of retrieval_test.json have no caption: video8.mp4",
    ),
    "captions": (
        without_captions_of_video3,
        r"1 videos of cap_train.json have no caption: video3.mp4",
    ),
    "official split": (without_official_validation, r"cap_val.json would hold no video"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_what_is_wrong_is_named(msr, what):
    change, message = ERRORS[what]
    options = change(msr) or []
    msr.save()
    assert re.search(message, msr.fail(*options))
    assert not msr.output.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.json", b"{", r"data.json is not .* line 1 column 2"),
        ("data.json", b"[1]", r"data.json is not .*download it again"),
        ("data.json", b'{"videos": "caf\xe9"}', r"data.json is not .*UnicodeDecodeError"),
        ("data.json", b'{"videos": null, "sentences": []}', r"'videos' of .*: must be a list"),
        ("data.json", None, r"data.json is not .*No such file"),
        ("test.csv", None, r"test.csv: cannot be read \(No such file or directory\)"),
        ("test.csv", b"", r"test.csv: is empty"),
        ("test.csv", b"video,sentence\nvideo8,a\n", r"test.csv:1: has no column 'video_id'"),
        ("test.csv", b"video_id,sentence\nvideo8,a, b\n", r"test.csv:2: has 3 cells"),
        ("test.csv", b"video_id,sentence\nvideo8\n", r"test.csv:2: has 1 cells"),
    ],
)
def test_files_that_are_not_as_published_are_named(msr, name, content, message):
    (msr.root / name).unlink()
    if content is not None:
        (msr.root / name).write_bytes(content)
    assert re.search(message, msr.fail())


def test_a_training_list_without_ids_is_named(msr):
    write_csv(msr.root / "train.csv", [{"vid_key": "video0"}])
    message = msr.fail("--train-csv", msr.root / "train.csv")
    assert "train.csv:1: has no column 'video_id'; its columns are 'vid_key'" in message


def test_the_folder_of_videos_must_exist(msr, capsys):
    shutil.rmtree(msr.videos)
    with pytest.raises(SystemExit) as caught:
        msr.run()
    assert caught.value.code == 2
    assert re.search(r"--videos: .*videos is not an existing folder", capsys.readouterr().err)


def test_empty_captions_are_left_out_and_counted(msr):
    msr.data["sentences"][0]["caption"] = " \n"  # video0
    msr.data["sentences"][4]["caption"] = ""  # video4: validation of captioning
    msr.save()
    report = msr.succeed()
    assert "\nleft out of retrieval_train.json: 0 videos, 2 captions\n" in report
    assert "\nleft out of cap_val.json: 0 videos, 1 captions\n" in report
    kept = [r["caption"] for r in msr.written("cap_train.json") if r["video"] == "video0.mp4"]
    assert kept == captions_of("video0")[1:]
    assert msr.written("cap_val.json")[0]["caption"] == captions_of("video4")[1:]


# --- the published numbers ------------------------------------------------------------------------


def test_other_counts_than_the_published_are_all_named(msr):
    message = msr.fail(*msr.train_csv(TRAINING["9k"]), counts=None)
    for what, found, published in (
        ("train.csv", (8, 24), (9000, 180_000)),
        ("test.csv", (2, 2), (1000, 1000)),
        ("split 'train' of .*data.json", (4, 12), (6513, 130_260)),
        ("split 'validate' of .*data.json", (2, 6), (497, 9940)),
        ("split 'test' of .*data.json", (4, 12), (2990, 59_800)),
    ):
        line = f"{what}: %d videos and %d captions, published %d and %d\n"
        assert re.search(line % (*found, *published), message)
    assert "--allow-other-counts" in message


def test_the_published_numbers_pass(msr, undecoded, monkeypatch):
    """A hundredth of them, in the published order of ids."""
    monkeypatch.setattr(benchmarks, "MSRVTT", {"train": 65, "validate": 5, "test": 30})
    monkeypatch.setattr(benchmarks, "MSRVTT_TRAINING", {"9k": 90, "7k": 70})
    monkeypatch.setattr(benchmarks, "MSRVTT_QUERIES", 10)
    splits = [split for split, count in benchmarks.MSRVTT.items() for _ in range(count)]
    msr.data["videos"] = [{"video_id": f"video{n}", "split": s} for n, s in enumerate(splits)]
    msr.data["sentences"] = [
        {"video_id": f"video{n}", "caption": f"{n} {turn}", "sen_id": 20 * n + turn}
        for n in range(100)
        for turn in range(20)
    ]
    msr.test_rows = [{"video_id": f"video{n}", "sentence": "a query"} for n in range(70, 80)]
    msr.save()
    for n in range(100):
        (msr.videos / f"video{n}.mp4").touch()
    report = msr.succeed("--num-val", 5, counts=None)
    assert counts_in(report) == {
        "retrieval_train.json": (85, 1700),
        "retrieval_val.json": (5, 100),
        "retrieval_test.json": (10, 10),
        "cap_train.json": (65, 1300),
        "cap_val.json": (5, 100),
        "cap_test.json": (30, 600),
    }
    (msr.output / "retrieval_val.json").unlink()
    report = msr.succeed("--split", "7k", "--overwrite", counts=None)
    assert counts_in(report)["retrieval_train.json"] == (70, 1400)
    # The 9k list under the name of the other.
    nine = msr.train_csv(f"video{n}" for n in [*range(70), *range(80, 100)])
    message = msr.fail("--split", "7k", *nine, counts=None)
    assert re.search(r"train.csv: 90 videos and 1800 captions, published 70 and 1400\n", message)
    msr.data["videos"].pop()  # in the list, but not in the data
    msr.save()
    message = msr.fail(*nine, "--retrieval-only", counts=None)
    assert "split 'test' of" in message and "29 videos and 580 captions, published 30" in message
