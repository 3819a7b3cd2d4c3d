"""Frames extracted once are read wherever the video is asked for."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from clips import write_clip
from lavis.common.registry import registry
from lavis.datasets.datasets.retrieval_datasets import VideoRetrievalEvalDataset
from miniature import BENCHMARKS, write_video
from omegaconf import OmegaConf

from lavis_uniadapter.datasets.preflight import unreadable_files
from lavis_uniadapter.processors import decoding
from lavis_uniadapter.processors.decoding import VideoDecodeError, decode_file, decode_frames
from lavis_uniadapter.processors.extracted_frames import EXTRACTED_SUFFIX, read_about
from lavis_uniadapter.processors.sampling import sample_frame_indices
from lavis_uniadapter.processors.video import BlipVideoEvalProcessor, BlipVideoTrainProcessor
from lavis_uniadapter.tools.prepare import frames as frames_command
from lavis_uniadapter.tools.prepare.command import main

SIZE = ("--frames", "8", "--image-size", "32")


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    for index, number in enumerate((12, 5, 30)):
        write_video(folder / f"part{index % 2}" / f"clip{index}.mp4", index, number)
    return folder


def extract(videos, output, *options):
    return main(["frames", "--videos", str(videos), "--output", str(output), *SIZE, *options])


def test_frames_are_those_of_the_video(videos, tmp_path):
    assert extract(videos, tmp_path / "frames") == 0
    for name, number in (("part0/clip0.mp4", 8), ("part1/clip1.mp4", 5), ("part0/clip2.mp4", 8)):
        extracted = tmp_path / "frames" / name
        assert not extracted.exists()  # the archive replaces it
        about = read_about(str(extracted) + EXTRACTED_SUFFIX)
        assert (about.num_frames, about.image_size) == (number, 32)
        for positions in ([0], [number - 1], [1, 3]):
            got = decode_frames(extracted, lambda n, p=positions: p, 32)
            source = sample_frame_indices(about.source_frames, number)
            expected = decode_frames(
                videos / name, lambda n, p=positions, s=source: [s[i] for i in p], 32
            )
            assert got.dtype == torch.uint8 and got.shape == expected.shape
            assert (got.float() - expected.float()).abs().mean() < 4


def test_processors_read_either(videos, tmp_path):
    extract(videos, tmp_path / "frames", "--frames", "30")  # every frame
    name = "part0/clip2.mp4"
    evaluation = BlipVideoEvalProcessor(image_size=32, n_frms=4)
    clips = [evaluation(str(folder / name)) for folder in (videos, tmp_path / "frames")]
    assert (clips[0] - clips[1]).abs().mean() < 0.1
    training = BlipVideoTrainProcessor(image_size=32, n_frms=4)
    clips = []
    for folder in (videos, tmp_path / "frames"):
        torch.manual_seed(3)
        clips.append(training(str(folder / name)))
    assert (clips[0] - clips[1]).abs().mean() < 0.2
    assert evaluation(str(tmp_path / "frames" / name)).shape == (3, 4, 32, 32)


def test_larger_frames_are_made_smaller(videos, tmp_path):
    extract(videos, tmp_path / "frames")
    clip = BlipVideoEvalProcessor(image_size=16, n_frms=2)(str(tmp_path / "frames/part0/clip0.mp4"))
    assert clip.shape == (3, 2, 16, 16)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"image_size": 64, "n_frms": 2}, "its frames have 32 px, and 64 px are needed"),
        ({"image_size": 32, "n_frms": 9}, "it holds 8 of 12 frames, and 9 are needed"),
    ],
)
def test_smaller_frames_and_fewer_are_refused(videos, tmp_path, options, reason):
    extract(videos, tmp_path / "frames")
    clip = tmp_path / "frames/part0/clip0.mp4"
    with pytest.raises(VideoDecodeError, match=reason):
        BlipVideoEvalProcessor(**options)(str(clip))
    for split, processor in (("train", BlipVideoTrainProcessor), ("val", BlipVideoEvalProcessor)):
        (tmp_path / "a.json").write_text(json.dumps([{"video": "clip0.mp4", "caption": ["x"]}]))
        dataset = VideoRetrievalEvalDataset(
            processor(**options), str, str(clip.parent), [str(tmp_path / "a.json")]
        )
        (problem,) = unreadable_files(dataset, split).values()
        assert reason in problem


def test_all_frames_of_a_short_video_suffice(videos, tmp_path):
    extract(videos, tmp_path / "frames")
    short = str(tmp_path / "frames/part1/clip1.mp4")  # 5 frames
    assert BlipVideoEvalProcessor(image_size=32, n_frms=7)(short).shape == (3, 7, 32, 32)


def test_frames_of_a_video_that_has_changed_are_refused_and_extracted_again(videos, capsys):
    video = videos / "part0/clip0.mp4"
    assert main(["frames", "--videos", str(videos), *SIZE]) == 0
    before = decode_frames(video, lambda n: [0], 32)
    write_video(video, 7, 12)
    for _ in range(2):
        with pytest.raises(VideoDecodeError, match="'clip0.mp4' has changed since its frames"):
            decode_frames(video, lambda n: [0], 32)
        video.unlink()
        write_video(video, 8, 25)  # of another length too
    capsys.readouterr()
    assert main(["frames", "--videos", str(videos), *SIZE]) == 0
    assert "1 videos extracted, 2 were there already" in capsys.readouterr().out
    after = decode_frames(video, lambda n: [0], 32)
    assert not torch.equal(before, after)
    exact = decode_file(str(video), lambda n: [sample_frame_indices(n, 8)[0]], 32)
    assert (after.float() - exact.float()).abs().mean() < 4


def test_frames_of_a_copied_video_are_read(videos):
    """A copy has another time."""
    assert main(["frames", "--videos", str(videos), *SIZE]) == 0
    os.utime(videos / "part0/clip0.mp4", (1, 1))
    decode_frames(videos / "part0/clip0.mp4", lambda n: [0], 32)


def test_frames_are_extracted_from_the_video_and_not_from_frames_beside_it(videos, tmp_path):
    assert main(["frames", "--videos", str(videos), *SIZE]) == 0
    assert extract(videos, tmp_path / "frames", "--frames", "30") == 0
    about = read_about(str(tmp_path / f"frames/part0/clip2.mp4{EXTRACTED_SUFFIX}"))
    assert (about.num_frames, about.source_frames) == (30, 30)


def test_videos_are_not_decoded_where_frames_are(videos, tmp_path, monkeypatch):
    shutil.copytree(videos, tmp_path / "beside")
    assert main(["frames", "--videos", str(tmp_path / "beside"), *SIZE]) == 0

    def refuse(*args, **kwargs):
        raise AssertionError("decoded a video")

    monkeypatch.setattr(decoding, "VideoReader", refuse)
    decode_frames(tmp_path / "beside/part0/clip0.mp4", lambda n: [0], 32)


def test_lavis_builder_and_checks_read_them_in_place_of_videos(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    BENCHMARKS["msrvtt_retrieval"](cache)
    extract(cache / "msrvtt/videos", tmp_path / "frames")
    shutil.rmtree(cache / "msrvtt/videos")
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", str(cache))
    cls = registry.get_builder_class("msrvtt_retrieval")
    config = OmegaConf.load(cls.default_config_path()).datasets.msrvtt_retrieval
    config.build_info.videos.storage = str(tmp_path / "frames")
    config.vis_processor = {
        mode: {"name": f"blip_video_{mode}", "image_size": 32, "n_frms": 2}
        for mode in ("train", "eval")
    }
    for split, dataset in cls(config).build().items():
        assert unreadable_files(dataset, split) == {}
        assert dataset[0]["video"].shape == (3, 2, 32, 32)


def test_own_data_reads_them(tmp_path):
    write_clip(tmp_path / "videos/a.mp4")
    extract(tmp_path / "videos", tmp_path / "frames")
    (tmp_path / "train.csv").write_text("video,caption\na.mp4,a dog\n")
    builder = registry.get_builder_class("custom_retrieval")(
        OmegaConf.create(
            {
                "data_type": "videos",
                "build_info": {
                    "annotations": {"train": {"storage": str(tmp_path / "train.csv")}},
                    "videos": {"storage": str(tmp_path / "frames")},
                },
            }
        )
    )
    builder.prepare()


def test_what_is_there_is_left_and_a_stopped_run_goes_on(videos, tmp_path, monkeypatch, capsys):
    output = tmp_path / "frames"
    original = frames_command.write_extracted_frames
    calls = []

    def stop_at_the_second(path, *args):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(path, *args)

    monkeypatch.setattr(frames_command, "write_extracted_frames", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        extract(videos, output, "--threads", "1")
    monkeypatch.undo()
    done = {path: path.stat().st_mtime_ns for path in output.rglob("*.zip")}
    assert done
    assert extract(videos, output) == 0
    assert f"{len(done)} were there already" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    assert len(list(output.rglob("*.zip"))) == 3 and not list(output.rglob("*.tmp"))


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    from lavis_uniadapter.processors import extracted_frames

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(extracted_frames.zipfile.ZipFile, "writestr", fail)
    with pytest.raises(OSError, match="disk full"):
        extracted_frames.write_extracted_frames(
            str(tmp_path / "a.zip"), torch.zeros(1, 8, 8, 3, dtype=torch.uint8), 1, (1, 1, "")
        )
    assert list(tmp_path.iterdir()) == []


def test_rotten_videos_are_named_and_the_others_written(videos, tmp_path, capsys):
    (videos / "rotten.mp4").write_bytes(b"no video")
    assert extract(videos, tmp_path / "frames") == 2
    error = capsys.readouterr().err
    assert "3 videos extracted" in error and "1 cannot be decoded" in error
    assert "rotten.mp4" in error
    assert len(list((tmp_path / "frames").rglob("*.zip"))) == 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--frames", "9"], "holds 8 frames of 32 px"),
        (["--image-size", "64"], "holds 8 frames of 32 px"),
        (["--videos", "."], "holds no videos"),
    ],
)
def test_what_does_not_fit_is_refused(videos, tmp_path, capsys, monkeypatch, options, expected):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert extract(videos, tmp_path / "frames") == 0
    assert extract(videos, tmp_path / "frames", *options) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("harm", ["cut", "empty", "not a zip", "no pictures", "no picture"])
def test_a_damaged_archive_is_named(videos, tmp_path, harm):
    extract(videos, tmp_path / "frames")
    path = tmp_path / f"frames/part0/clip0.mp4{EXTRACTED_SUFFIX}"
    content = path.read_bytes()
    if harm in ("cut", "empty", "not a zip"):
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b""}.get(harm, b"x" * 99))
    else:
        import zipfile

        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("about.json", json.dumps({"num_frames": 8, "image_size": 32}))
            if harm == "no picture":
                archive.writestr("00000.jpg", b"no picture")
    harmed = path.read_bytes()
    if harm != "no picture":  # found when it is decoded
        assert extract(videos, tmp_path / "frames") == 2  # and not replaced
    assert path.read_bytes() == harmed
    with pytest.raises(VideoDecodeError, match="clip0.mp4.frames.zip"):
        decode_frames(tmp_path / "frames/part0/clip0.mp4", lambda n: [0], 32)
