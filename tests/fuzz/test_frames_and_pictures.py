"""Archives of frames and pictures that are damaged: read or refused by name."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from fuzzing import (
    harmed,
    object_text,
    value_texts,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lavis_uniadapter.processors.decoding import VideoDecodeError, decode_frames
from lavis_uniadapter.processors.extracted_frames import (
    ABOUT,
    EXTRACTED_SUFFIX,
    read_about,
    write_extracted_frames,
)
from lavis_uniadapter.processors.images import image_problem
from lavis_uniadapter.processors.sampling import sample_frame_indices

SIDE = 16
ABOUT_FOUR = {"num_frames": 4, "image_size": SIDE, "source_frames": 9}
ABOUT_FOUR["video"] = [1, 1, "hash"]


def read_frames_or_refuse(path: Path) -> None:
    """Decode three frames: three there are, or an error that names the archive."""
    video = str(path).removesuffix(EXTRACTED_SUFFIX)
    try:
        frames = decode_frames(video, lambda number: sample_frame_indices(number, 3), SIDE)
    except VideoDecodeError as error:
        assert path.name in str(error)
    else:
        assert frames.dtype == torch.uint8 and frames.shape == (3, SIDE, SIDE, 3)
    try:
        about = read_about(str(path))
    except (OSError, ValueError):
        return
    numbers = (about.num_frames, about.image_size, about.source_frames)
    assert all(type(number) is int and number > 0 for number in numbers)


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("frames") / f"clip.mp4{EXTRACTED_SUFFIX}"
    frames = torch.arange(4 * SIDE * SIDE * 3).reshape(4, SIDE, SIDE, 3) % 256
    write_extracted_frames(str(path), frames.to(torch.uint8), 9, (1, 1, "hash"))
    return path, path.read_bytes()


@given(st.data())
def test_a_harmed_archive_is_read_or_refused(archive, data):
    path, content = archive
    path.write_bytes(data.draw(harmed(content)))
    read_frames_or_refuse(path)


@given(st.data())
def test_an_archive_with_a_harmed_directory_is_read_or_refused(archive, data):
    """The directory at the end, which no checksum covers, names methods, sizes and places."""
    path, content = archive
    start = content.index(b"PK\1\2")
    path.write_bytes(content[:start] + data.draw(harmed(content[start:])))
    read_frames_or_refuse(path)


@pytest.mark.parametrize(
    "about, why",
    [
        ([4], r"about.json says '\[4\]'"),
        ({**ABOUT_FOUR, "num_frames": "4"}, "about.json says '{\"num_fr"),
        ({**ABOUT_FOUR, "num_frames": 0}, "about.json says"),
        ({**ABOUT_FOUR, "video": [1, 1]}, "about.json says"),
        ({**ABOUT_FOUR, "num_frames": 10**30}, "no item named"),
    ],
)
def test_an_archive_that_says_something_else_is_named(archive, about, why):
    path, content = archive
    path.write_bytes(content)
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    members[ABOUT] = json.dumps(about).encode()
    with zipfile.ZipFile(path, "w") as new:
        for name, member in members.items():
            new.writestr(name, member)
    with pytest.raises(VideoDecodeError, match=why):
        decode_frames(str(path).removesuffix(EXTRACTED_SUFFIX), lambda number: [0], SIDE)
    with pytest.raises(ValueError, match=why):
        read_about(str(path))


@pytest.mark.parametrize("at, byte", [(8, 1), (10, 99)])
def test_an_archive_of_an_unknown_kind_is_named(archive, at, byte):
    """One that claims to be encrypted (flags, 8), or compressed in a way unheard of (10)."""
    path, content = archive
    directory = content.index(b"PK\1\2")
    harmed = bytearray(content)
    harmed[directory + at] = byte
    path.write_bytes(harmed)
    with pytest.raises(VideoDecodeError, match="clip.mp4"):
        decode_frames(str(path).removesuffix(EXTRACTED_SUFFIX), lambda number: [0], SIDE)


def pictures() -> st.SearchStrategy[bytes]:
    """Sound pictures of several kinds, and harmed ones."""
    sound = []
    for mode, kind in (("RGB", "JPEG"), ("L", "PNG"), ("P", "GIF"), ("RGBA", "PNG"), ("1", "TIFF")):
        for size in ((SIDE, SIDE), (5, 7)):
            content = io.BytesIO()
            Image.new(mode, size).save(content, kind)
            sound.append(content.getvalue())
    return st.sampled_from(sound) | st.sampled_from(sound).flatmap(harmed) | st.binary(max_size=20)


@pytest.mark.filterwarnings(
    "ignore:Corrupt EXIF data", "ignore:Tag data larger", "ignore:Truncated File Read"
)
@given(
    st.lists(pictures(), max_size=4),
    value_texts
    | st.fixed_dictionaries(
        {
            key: st.integers(0, 5).map(str) | value_texts
            for key in ("num_frames", "image_size", "source_frames")
        }
    ).map(lambda about: object_text({**about, "video": '[1, 1, ""]'})),
    st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]),
)
def test_an_archive_of_anything_is_read_or_refused(archive, members, about, method):
    path, _ = archive
    with zipfile.ZipFile(path, "w", method) as file:
        for number, content in enumerate(members):
            file.writestr(f"{number:05d}.jpg", content)
        file.writestr(ABOUT, about.encode("utf-8", "surrogatepass"))
    read_frames_or_refuse(path)


@pytest.mark.filterwarnings(
    "ignore:Corrupt EXIF data", "ignore:Tag data larger", "ignore:Truncated File Read"
)
@given(pictures())
def test_a_picture_is_opened_or_named(archive, content):
    path = archive[0].with_name("picture")
    path.write_bytes(content)
    for whole in (False, True):
        assert image_problem(str(path), whole) != ""


def test_a_picture_with_a_harmed_chunk_is_named(tmp_path):
    content = io.BytesIO()
    Image.new("L", (SIDE, SIDE)).save(content, "PNG")
    path = tmp_path / "harmed.png"
    path.write_bytes(content.getvalue().replace(b"IDAT", b"IDA\x9c"))
    assert "cannot be read as an image" in image_problem(str(path), whole=False)
