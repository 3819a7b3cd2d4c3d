"""Which file of the folder belongs to an annotated video, and which videos may be left out."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published import IDS, TEST_1K_A, TRAINING, evaluation_captions, sentence_of, training_pairs

from lavis_uniadapter.processors.decoding import VIDEO_EXTENSIONS
from lavis_uniadapter.tools.prepare import videos


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
    st.text("aé. -", min_size=1),
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
    assert "1@N00_a.avi has several files: 1@N00_a.mp4, 1@N00_a.webm" in message


@pytest.mark.parametrize("present", ["1@N00_a.avi", "1@N00_a.mp4"])
def test_one_file_of_several_videos_is_named(did, present):
    did.records["test"].append({"video": "1@N00_a.mov", "description": "a", "annotation_id": 9})
    did.save()
    (did.videos / "1@N00_a.avi").rename(did.videos / present)
    message = did.fail()
    assert f"{present} is the only file of 1@N00_a.avi, 1@N00_a.mov" in message
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
    did.add_videos(names[12:])
    for name in names[12:24]:
        did.replace_video(name, b"no video")
    message = did.fail()
    assert "24 of 48 videos in" in message
    assert [name in message for name in names] == [True] * 20 + [False] * 26
    assert "00.mp4: missing" in message and "12.mp4: it cannot be read as a video" in message
    assert "and 4 more" in message
    assert "24 are for training only, and --skip-missing leaves them out" in message


def test_training_videos_can_be_left_out_and_are_counted(msr, monkeypatch):
    (msr.videos / "video0.mp4").unlink()
    msr.spoil_last_frame("video2.mp4")
    assert "video2.mp4: decord says" in msr.fail()
    report = msr.succeed("--skip-missing", "--num-val", 2)
    for file in ("retrieval_train.json", "cap_train.json"):
        left_out = "2 videos, 6 captions; missing or undecodable: video0.mp4, video2.mp4"
        assert f"\nleft out of {file}: {left_out}\n" in report
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
    assert "2 of 5 videos in" in message
    assert "2 of them are for validation or test, which must be complete; 0 are" in message
    assert "1@N00_a.avi" not in message
    message = did.fail(*did.val)
    assert "3 of 5 videos in" in message
    assert "1 are for training only, and --skip-missing" in message


def test_a_video_trained_on_here_and_tested_on_there_is_not_left_out(msr):
    (msr.videos / "video6.mp4").unlink()  # 9k training of retrieval, test of captioning
    message = msr.fail("--skip-missing")
    assert "1 of them are for validation or test" in message and "video6.mp4" in message
    report = msr.succeed("--skip-missing", "--retrieval-only")
    assert "left out of retrieval_train.json: 1 videos, 3 captions" in report


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
