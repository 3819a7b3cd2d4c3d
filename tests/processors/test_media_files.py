"""A media file is what its content says, and does not make a decoder open others."""

from __future__ import annotations

import json
import re

import cv2
import numpy as np
import pytest
from clips import write_clip
from decord import VideoReader
from lavis.datasets.datasets.retrieval_datasets import (
    RetrievalEvalDataset,
    VideoRetrievalEvalDataset,
)
from lavis.processors.alpro_processors import AlproVideoEvalProcessor
from PIL import Image

from lavis_uniadapter.common.schema.processors import VideoEval
from lavis_uniadapter.datasets import reading
from lavis_uniadapter.datasets.preflight import unreadable_files
from lavis_uniadapter.datasets.reading import EvaluationItems
from lavis_uniadapter.processors import decoding, images
from lavis_uniadapter.processors.decoding import VideoDecodeError, decode_frames
from lavis_uniadapter.processors.images import ImageError, image_problem, read_image
from lavis_uniadapter.processors.media_files import FOLLOW_LINKS, link_problem
from lavis_uniadapter.processors.video import BlipVideoEvalProcessor
from lavis_uniadapter.search.reading import read_segments
from lavis_uniadapter.tools.prepare import check
from lavis_uniadapter.tools.prepare.command import main

REFUSED = "it cannot be read as a video: its content, .* is in no known format"


def write_video(path, codec="mp4v"):
    path.parent.mkdir(parents=True, exist_ok=True)
    code = cv2.VideoWriter_fourcc(*codec)
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, code, 10, (64, 64))
    for value in range(20):
        writer.write(np.full((64, 64, 3), 10 * value, np.uint8))
    writer.release()
    return path


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(reading, "RETRY_AFTER", 0.0)


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A video that no data folder holds."""
    return write_video(tmp_path_factory.mktemp("outside") / "secret.ts")


def hls(video):
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{video}\n#EXT-X-ENDLIST\n"


PLAYLISTS = {
    "HLS": hls,
    "concat": lambda video: f"ffconcat version 1.0\nfile '{video}'\n",
    "DASH": lambda video: f'<?xml version="1.0"?>\n<MPD><BaseURL>{video}</BaseURL></MPD>',
    "SDP": lambda video: "v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    "SMIL": lambda video: f'<smil><body><video src="{video}"/></body></smil>',
    "RealMedia": lambda video: f"rtsp://localhost/{video}\n",
    "QuickTime reference": lambda video: f"RTSPtext rtsp://localhost/{video}\n",
    "ASX": lambda video: f"[Reference]\nRef1={video}\n",
}


def test_decord_would_follow_a_playlist(tmp_path, outside):
    """Otherwise there would be nothing to refuse."""
    (tmp_path / "p.mp4").write_text(hls(outside))
    assert len(VideoReader(str(tmp_path / "p.mp4"))) == 20


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_playlists_are_refused_by_every_reader_before_a_decoder_opens_them(
    tmp_path, outside, monkeypatch, capsys, kind
):
    monkeypatch.setattr(decoding, "VideoReader", lambda *_, **__: pytest.fail("opened"))
    path = tmp_path / "videos/p.mp4"
    path.parent.mkdir()
    path.write_text(PLAYLISTS[kind](outside))
    with pytest.raises(VideoDecodeError, match=REFUSED) as caught:
        BlipVideoEvalProcessor(image_size=32)(str(path))
    assert str(path) in str(caught.value) and "refer to other files" in str(caught.value)
    with pytest.raises(VideoDecodeError, match=REFUSED):
        list(read_segments(path, 10.0, VideoEval(image_size=32)))
    assert main(["frames", "--videos", str(path.parent)]) == 2
    assert re.search(REFUSED, capsys.readouterr().err)


@pytest.mark.parametrize("name", ["f%d.png", "f%d.tga"])
def test_a_name_that_is_a_pattern_of_image_files_is_refused(tmp_path, name):
    """FFmpeg takes what the pattern names in place of the file."""
    write_video(tmp_path / "f%d.mp4").rename(tmp_path / name)
    for number in range(1, 6):
        Image.new("RGB", (64, 64)).save(tmp_path / name.replace("%d", str(number)))
    assert len(VideoReader(str(tmp_path / name))) == 5
    with pytest.raises(VideoDecodeError, match="a pattern of image files"):
        decode_frames(tmp_path / name, range, 32)


def test_a_video_may_have_a_percent_sign_in_its_name(tmp_path):
    assert len(decode_frames(write_video(tmp_path / "100%d.mp4"), range, 32)) == 20


@pytest.mark.parametrize("processor", [BlipVideoEvalProcessor, AlproVideoEvalProcessor])
def test_datasets_refuse_playlists_whatever_their_processor(tmp_path, outside, processor):
    (tmp_path / "p.mp4").write_text(hls(outside))
    dataset = dataset_of(tmp_path, "p.mp4", processor(image_size=32, n_frms=2))
    problems = unreadable_files(dataset, "val")
    assert re.search(REFUSED, problems[str(tmp_path / "p.mp4")])
    assert re.search(REFUSED, EvaluationItems(dataset, 0).try_to_read(0)[1].reason)


def test_prepare_check_names_playlists(tmp_path, outside):
    (tmp_path / "p.mp4").write_text(hls(outside))
    assert re.search(REFUSED, check.examine((str(tmp_path / "p.mp4"), False), thorough=False))


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        *(("a.mp4", "mp4v"), ("a.mov", "mp4v"), ("a.3gp", "mp4v"), ("a.m4v", "mp4v")),
        *(("a.mkv", "mp4v"), ("a.avi", "MJPG"), ("a.flv", "FLV1")),
        *(("a.wmv", "WMV2"), ("a.ts", "mp4v"), ("a.m2ts", "mp4v")),
    ],
)
def test_videos_in_every_container_are_read(tmp_path, name, codec):
    video = write_video(tmp_path / name, codec).rename(tmp_path / "a.mp4")
    assert len(decode_frames(video, range, 32)) == 20


@pytest.mark.parametrize("box", [b"wide", b"skip", b"free", b"junk"])
def test_a_quicktime_video_may_begin_with_any_box(tmp_path, box):
    content = write_video(tmp_path / "a.mov").read_bytes()
    size = int.from_bytes(content[:4], "big")
    assert content[4:8] == b"ftyp"
    (tmp_path / "b.mov").write_bytes(content[:4] + box + content[8:size] + content[size:])
    assert len(decode_frames(tmp_path / "b.mov", range, 32)) == 20


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "TGA"])
def test_images_of_all_other_formats_are_read(tmp_path, kind):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.jpg", kind)
    assert read_image(tmp_path / "a.jpg").size == (8, 8)
    assert image_problem(str(tmp_path / "a.jpg"), whole=True) is None


def test_images_that_run_a_program_are_refused(tmp_path, monkeypatch):
    """Pillow gives PostScript to Ghostscript."""
    path = tmp_path / "a.png"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with Image.open(path) as image:
        assert image.format == "EPS"
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    assert "cannot be read as an image: its content" in image_problem(str(path), whole=False)
    with pytest.raises(ImageError, match="cannot be read as an image: its content"):
        read_image(path)
    dataset = dataset_of(tmp_path, "a.png", lambda image: image, RetrievalEvalDataset)
    reason = EvaluationItems(dataset, 0).try_to_read(0)[1].reason
    assert "cannot be read as an image: its content" in reason


def test_an_image_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    Image.new("1", (10, 10)).save(tmp_path / "a.png")
    assert "10 x 10 pixels, too many" in image_problem(str(tmp_path / "a.png"), whole=False)


# --- links ----------------------------------------------------------------------------------------


def dataset_of(folder, name, processor, cls=VideoRetrievalEvalDataset):
    key = "video" if cls is VideoRetrievalEvalDataset else "image"
    (folder / "val.json").write_text(json.dumps([{key: name, "caption": ["x"]}]))
    return cls(processor, str, str(folder), [str(folder / "val.json")])


@pytest.fixture
def linked(tmp_path):
    """A folder, itself a link, with links to videos inside and outside of it."""
    root = tmp_path / "root"
    write_clip(root / "sub/a.mp4")
    write_clip(tmp_path / "elsewhere/b.mp4")
    (root / "stays.mp4").symlink_to(root / "sub/a.mp4")
    (root / "leaves.mp4").symlink_to(tmp_path / "elsewhere/b.mp4")
    (root / "folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data").symlink_to(root)
    return tmp_path / "data"


@pytest.mark.parametrize("name", ["sub/a.mp4", "stays.mp4", "leaves.mp4", "folder/b.mp4"])
def test_links_are_followed_where_files_are_only_read(linked, name):
    dataset = dataset_of(linked, name, BlipVideoEvalProcessor(image_size=32, n_frms=2))
    assert unreadable_files(dataset, "val") == {}
    assert EvaluationItems(dataset, 0).try_to_read(0)[1] is None


@pytest.mark.parametrize("name", ["leaves.mp4", "folder/b.mp4"])
def test_links_that_leave_the_folder_are_named_unless_allowed(linked, name, monkeypatch):
    assert link_problem(linked / "stays.mp4", linked) is None
    assert "elsewhere/b.mp4" in link_problem(linked / name, linked)
    monkeypatch.setenv(FOLLOW_LINKS, "1")
    assert link_problem(linked / name, linked) is None


def test_a_link_to_nothing_is_called_that(tmp_path):
    (tmp_path / "a.mp4").symlink_to("gone.mp4")
    assert "gone.mp4, which does not exist" in link_problem(tmp_path / "a.mp4", tmp_path / "sub")


def test_a_folder_of_a_similar_name_is_another(tmp_path):
    (tmp_path / "data2").mkdir()
    (tmp_path / "data2/a").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a").symlink_to(tmp_path / "data2/a")
    assert "link that leaves" in link_problem(tmp_path / "data/a", tmp_path / "data")
