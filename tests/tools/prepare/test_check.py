"""`prepare check` names every file that cannot be read, whatever that file does to the decoder."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import decoders
import numpy as np
import pytest
import torch
from clips import spoil_from_frame, write_clip
from miniature import write_image, write_video
from PIL import ExifTags, Image
from rotten_videos import KINDS, make_rotten

from lavis_uniadapter.processors import decoding
from lavis_uniadapter.processors.decoding import VideoDecodeError, decode_frames
from lavis_uniadapter.processors.extracted_frames import (
    EXTRACTED_SUFFIX,
    video_state,
    write_extracted_frames,
)
from lavis_uniadapter.processors.sampling import sample_frame_indices
from lavis_uniadapter.tools.prepare import check
from lavis_uniadapter.tools.prepare.command import main


@pytest.fixture
def folder(tmp_path):
    """A folder of files that can be read."""
    folder = tmp_path / "data"
    write_video(folder / "videos/one.mp4", 0)
    write_video(folder / "videos/part/two.AVI", 1)
    write_image(folder / "images/one.png", 0)
    frames = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    state = video_state(folder / "videos/one.mp4")
    write_extracted_frames(f"{folder}/videos/three.mp4{EXTRACTED_SUFFIX}", frames, 2, state)
    (folder / "notes.txt").write_text("not looked at")
    return folder


@pytest.fixture
def checked(folder, capsys):
    """Run the command: exit status, what it says, and what it writes, by path below the folder."""

    def run(*options):
        output = folder.parent / "wrong.jsonl"
        try:
            status = main(["check", str(folder), "--output", str(output), *map(str, options)])
        except SystemExit as refused:
            status = refused.code
        said = capsys.readouterr()
        lines = map(json.loads, output.read_text().splitlines()) if output.exists() else ()
        wrong = {os.path.relpath(line["file"], folder): line["reason"] for line in lines}
        return status, said.out + (said.err if status == 2 else ""), wrong

    return run


@pytest.mark.usefixtures("leaves_no_workers")
def test_a_whole_folder_passes(folder, checked):
    for options in ((), ("--thorough", "--threads", 1)):
        status, report, wrong = checked(*options)
        assert (status, wrong) == (0, {})
        assert report.endswith(f"written to {folder.parent / 'wrong.jsonl'}\n")
        assert "4 files in" in report and "4 can be read, 0 cannot" in report


@pytest.mark.parametrize("kind", KINDS)
def test_rotten_videos_are_rotten(kind, tmp_path):
    make_rotten(kind, tmp_path / "a.mp4")
    with pytest.raises(VideoDecodeError, match="a.mp4") as caught:
        decode_frames(tmp_path / "a.mp4", lambda n: [n - 1], 32)
    assert caught.value.reason and "a.mp4'" not in caught.value.reason


@pytest.mark.parametrize("thorough", [False, True])
def test_every_kind_of_rotten_file_is_named_with_its_reason(folder, checked, thorough):
    assert len(KINDS) == 8
    for kind in KINDS:
        make_rotten(kind, folder / f"videos/{kind}.mp4")
    annotations = folder.parent / "train.json"
    annotations.write_text(json.dumps([{"video": f"videos/{kind}.mp4"} for kind in KINDS]))
    (folder / "videos/folder.mp4").mkdir()
    os.mkfifo(folder / "videos/pipe.mp4")
    picture = folder / "images/cut.png"
    Image.effect_noise((64, 64), 50).save(picture)
    picture.write_bytes(picture.read_bytes()[:-100])  # the header is whole
    (folder / "images/text.jpg").write_text("no image")

    options = ["--annotations", annotations, *(["--thorough"] if thorough else [])]
    status, report, wrong = checked(*options)
    expected = {
        "videos/empty.mp4": "the file is empty",
        "videos/truncated.mp4": "decord says",
        "videos/audio_only.mp4": "is in no known format",
        "videos/vanished.mp4": f"named in {annotations}, record 3, but there is no such file",
        "videos/not_a_video.mp4": "is in no known format",
        "videos/header_only.mp4": "decord says",
        "videos/dangling_link.mp4": "it is a link to",
        f"videos/bad_archive.mp4{EXTRACTED_SUFFIX}": "it is not an archive of frames",
        "videos/folder.mp4": "it is a folder",
        "videos/pipe.mp4": "it is not a regular file",
        "images/cut.png": "cannot be read as an image (image file is truncated",
        "images/text.jpg": "cannot be read as an image (cannot identify image file",
    }
    assert status == 1
    assert set(wrong) == set(expected)
    for name, reason in expected.items():
        assert reason in wrong[name]
        assert f"    {folder / name}: {wrong[name]}\n" in report
    assert "16 files in" in report and "4 can be read, 12 cannot" in report


def test_the_frames_that_runs_read_or_all_are_decoded(tmp_path, monkeypatch):
    write_clip(tmp_path / "a.mp4", num_frames=12)
    asked = []
    original = decoding.decode_file

    def record(path, choose, size):
        asked.append(list(choose(12)))
        return original(path, choose, size)

    monkeypatch.setattr(decoding, "decode_file", record)
    video = (str(tmp_path / "a.mp4"), False)
    assert check.examine(video, thorough=False) is None
    evaluated = sample_frame_indices(12, 8)
    assert asked == [sorted({0, *evaluated, 11})] and len(evaluated) > 2
    asked.clear()
    monkeypatch.setattr(decoding, "_PROBED_AT_ONCE", 5)
    assert check.examine(video, thorough=True) is None
    assert sum(asked, []) == list(range(12)) and max(map(len, asked)) == 5


def test_a_hole_between_those_frames_takes_thoroughness(folder, checked):
    path = folder / "videos/hole.mp4"
    write_clip(path, num_frames=20)
    whole = path.read_bytes()
    spoil_from_frame(path, 14)
    spoilt = path.read_bytes()
    back = [i for i in range(len(whole)) if whole[i : i + 4] == b"\0\0\x01\xb6"][16]
    path.write_bytes(spoilt[:back] + whole[back:])
    status, _, wrong = checked("--thorough")
    assert status == 1 and list(wrong) == ["videos/hole.mp4"]


def test_what_lavis_ignores_of_images_is_noted(folder, checked):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (8, 6)).save(folder / "images/turned.jpg", exif=exif)
    Image.fromarray(np.zeros((8, 6), np.uint16)).save(folder / "images/deep.png")
    status, report, wrong = checked()
    assert (status, wrong) == (0, {}) and "6 can be read, 0 cannot" in report
    assert f"{folder}/images/turned.jpg: it is turned by its EXIF orientation" in report
    assert f"{folder}/images/deep.png: it has more than 8 bits per channel (mode I;16)" in report
    assert "one.png" not in report


def test_a_video_and_the_frames_beside_it_are_examined_each(folder, checked):
    make_rotten("bad_archive", folder / "videos/one.mp4")  # beside the sound video
    make_rotten("empty", folder / "videos/three.mp4")  # beside sound frames
    status, _, wrong = checked()
    assert status == 1
    assert set(wrong) == {
        f"videos/one.mp4{EXTRACTED_SUFFIX}",
        "videos/three.mp4",
        f"videos/three.mp4{EXTRACTED_SUFFIX}",  # as they are of another video
    }


@pytest.mark.usefixtures("leaves_no_workers")
def test_an_interruption_ends_the_check_with_what_was_found(folder, checked, monkeypatch, request):
    for name in ("a", "b", "c"):
        (folder / f"{name}.mp4").write_bytes(b"x")
    # a shell starts what it runs in the background with SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    (folder / "pid").write_text(str(os.getpid()))
    monkeypatch.setattr(check, "examine", decoders.interrupt)
    status, report, wrong = checked("--threads", 1, "--timeout", 600)
    assert status == 130
    assert wrong == {"a.mp4": "a.mp4 is bad"}
    assert report.startswith(f"interrupted after 1 of 7 files\n1 files in {folder}: 0 can be read")


# --- what is searched, annotations, output --------------------------------------------------------


def test_links_are_followed_and_circles_end(folder, checked):
    elsewhere = folder.parent / "elsewhere"
    make_rotten("empty", elsewhere / "far.mp4")
    (folder / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    status, report, wrong = checked()
    assert status == 1 and list(wrong) == ["link/far.mp4"]
    assert "5 files in" in report


def test_a_folder_that_cannot_be_searched_is_named(folder, checked, monkeypatch):
    original = os.scandir

    def refuse(path):
        if os.path.basename(path) == "part":
            raise PermissionError(13, "Permission denied", path)
        return original(path)

    monkeypatch.setattr(os, "scandir", refuse)
    status, _, wrong = checked()
    assert status == 1 and list(wrong) == ["videos/part"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '[{"video": "videos/one.mp4"},\n {"video": "gone.mp4", "caption": "x"}]'),
        ("a.jsonl", '{"image": "images/one.png"}\n{"video": "./gone.mp4"}\n'),
        ("a.csv", "video,caption\ngone.mp4,x\nvideos/three.mp4,the frames stand for it\n"),
        ("a.tsv", "caption\tvideo\nx\tgone.mp4\ny\tgone.mp4\n"),
    ],
)
def test_files_that_annotations_name_and_that_are_not_there(folder, checked, name, content):
    (folder.parent / name).write_text(content)
    status, report, wrong = checked("--annotations", folder.parent / name)
    line = 1 + content[: content.index("gone")].count("\n")
    place = f"{folder.parent / name}" + (", record 1" if name == "a.json" else f":{line}")
    assert (status, wrong) == (1, {"gone.mp4": f"named in {place}, but there is no such file"})
    assert "4 can be read, 1 cannot" in report


def test_annotated_files_of_another_ending_are_examined(folder, checked):
    (folder / "clip").write_bytes(b"")
    (folder / "picture.dat").write_text("no picture")
    annotations = folder.parent / "a.jsonl"
    annotations.write_text('{"video": "clip"}\n{"image": "picture.dat"}\n')
    status, _, wrong = checked("--annotations", annotations)
    assert status == 1 and wrong["clip"] == "the file is empty"
    assert "cannot be read as an image" in wrong["picture.dat"]


def test_annotations_decide_what_a_file_is_read_as(folder, checked):
    (folder / "videos/one.mp4").rename(folder / "clip.gif")
    (folder / "images/one.png").rename(folder / "picture.mp4")
    assert checked()[0] == 1
    annotations = folder.parent / "a.jsonl"
    annotations.write_text('{"video": "clip.gif"}\n{"image": "picture.mp4"}\n')
    assert checked("--annotations", annotations)[::2] == (0, {})


def test_names_of_another_encoding_are_reported(folder, checked):
    path = os.fsencode(folder) + b"/videos/caf\xe9.mp4"
    with open(path, "wb"):
        status, report, wrong = checked()
    assert (status, wrong) == (1, {"videos/caf\udce9.mp4": "the file is empty"})
    assert "caf\\udce9.mp4: the file is empty" in report


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--threads", "0"], "--threads: 0 is not a whole number of 1 or more"),
        (["--threads", "two"], "--threads: two is not a whole number"),
        (["--timeout", "0"], "--timeout: 0 is not a number of seconds above 0"),
        (["--timeout", "nan"], "--timeout: nan is not"),
        (["--annotations", "gone.json"], "gone.json: cannot be read"),
        (["--annotations", "a.csv"], "a.csv:2: needs a file name below the folder"),
        (["--annotations", "out.json"], "out.json, record 0: needs a file name below"),
        (
            ["--output", "nowhere/a.jsonl"],
            "--output: nowhere/a.jsonl is not a file in an",
        ),
        (["--output", "."], "--output: . is not a file"),
    ],
)
def test_a_wrong_call_is_refused(folder, checked, monkeypatch, options, expected):
    monkeypatch.chdir(folder.parent)
    Path("a.csv").write_text("video,caption\n,x\n")
    Path("out.json").write_text('[{"video": "../x.mp4"}]')
    status, said, _ = checked(*options)
    assert status == 2 and "error: " in said and expected in said


def test_there_must_be_something_to_check(tmp_path, capsys):
    assert main(["check", str(tmp_path)]) == 2
    assert f"{tmp_path} holds no videos" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["check", str(tmp_path / "nowhere")])
    assert "nowhere is not an existing folder" in capsys.readouterr().err
    (tmp_path / "a.csv").write_text("video\ngone.mp4\n")
    assert main(["check", str(tmp_path), "--annotations", str(tmp_path / "a.csv")]) == 1


def test_the_output_is_written_whole_or_not_at_all(folder, checked, monkeypatch):
    make_rotten("empty", folder / "a.mp4")
    output = folder.parent / "wrong.jsonl"
    earlier = json.dumps({"file": str(folder / "earlier"), "reason": "x"}) + "\n"
    output.write_text(earlier)

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        status, said, _ = checked()
    assert status == 2 and "disk full" in said
    assert output.read_text() == earlier
    assert sorted(path.name for path in folder.parent.iterdir()) == ["data", "wrong.jsonl"]
    assert checked()[2] == {"a.mp4": "the file is empty"}
