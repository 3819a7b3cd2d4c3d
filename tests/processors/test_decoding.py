"""Which files can be decoded, and that the others are named."""

import os
import time
import wave
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from clips import frame_starts

from lavis_uniadapter.processors import decoding
from lavis_uniadapter.processors.decoding import VideoDecodeError, decode_frames


def decode_every_frame(path):
    return decode_frames(path, range, 32)


def with_index_in_front(mp4):
    """Move the index (moov) of OpenCV's mp4 before the frames, as streaming services do."""
    boxes, offset = {}, 0
    while offset < len(mp4):
        size = int.from_bytes(mp4[offset : offset + 4], "big")
        boxes[mp4[offset + 4 : offset + 8]] = mp4[offset : offset + size]
        offset += size
    moov = bytearray(boxes[b"moov"])
    table = moov.index(b"stco") + 8
    for entry in range(int.from_bytes(moov[table : table + 4], "big")):
        place = slice(table + 4 + 4 * entry, table + 8 + 4 * entry)
        moov[place] = (int.from_bytes(moov[place], "big") + len(moov)).to_bytes(4, "big")
    return boxes[b"ftyp"] + bytes(moov) + boxes[b"free"] + boxes[b"mdat"]


@pytest.fixture
def rotten(tmp_path, noise_clip):
    """Write the named kind of unusable file and return its path."""
    path = tmp_path / "rotten.mp4"

    def write(kind):
        with open(noise_clip, "rb") as file:
            mp4 = file.read()
        fast = with_index_in_front(mp4)
        contents = {
            "empty": b"",
            "text": b"Moved permanently.\n" * 50,
            "cut at 50%": mp4[: len(mp4) // 2],
            "cut at 90%": mp4[: len(mp4) * 9 // 10],
            "index in front, cut at 50%": fast[: len(fast) // 2],
            "index in front, cut at 90%": fast[: len(fast) * 9 // 10],
        }
        if kind == "audio only":
            with wave.open(str(path), "wb") as audio:
                audio.setparams((1, 2, 8000, 0, "NONE", "not compressed"))
                audio.writeframes(b"\0\0" * 8000)
        elif kind == "directory":
            path.mkdir()
        elif kind != "missing":
            path.write_bytes(contents[kind])
        return str(path)

    return write


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "no such file"),
        ("directory", "it is a folder"),
        ("empty", "is empty"),
        ("text", "is in no known format"),
        ("cut at 50%", "decord says"),
        ("cut at 90%", "decord says"),
        ("index in front, cut at 50%", "decord says"),
        ("index in front, cut at 90%", "decord says"),
        ("audio only", "is in no known format"),
    ],
)
def test_rotten_files_are_named(rotten, kind, reason):
    path = rotten(kind)
    with pytest.raises(VideoDecodeError, match=reason) as caught:
        decode_every_frame(path)
    assert path in str(caught.value)
    assert "Download or re-encode" in str(caught.value)


@pytest.mark.parametrize("kind", ["cut at 50%", "index in front, cut at 50%"])
def test_decoders_print_nothing_and_what_decord_says_is_logged(rotten, capfd, caplog, kind):
    path = rotten(kind)
    with caplog.at_level("INFO"), pytest.raises(VideoDecodeError):
        decode_every_frame(path)
    os.write(2, b"what others print\n")
    assert capfd.readouterr() == ("", "what others print\n")
    if kind == "cut at 50%":  # which cannot be opened
        assert f"ERROR opening: {path}" in caplog.text


def test_what_others_print_while_a_file_is_opened_is_printed(tmp_path, monkeypatch, capfd):
    def reader(path, **_):
        os.write(2, b"a progress bar\n")
        raise RuntimeError("no")

    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x14ftyp")
    monkeypatch.setattr(decoding, "VideoReader", reader)
    with pytest.raises(VideoDecodeError):
        decode_every_frame(tmp_path / "a.mp4")
    assert capfd.readouterr().err == "a progress bar\n"


def test_index_in_front_alone_is_fine(tmp_path, noise_clip):
    """Otherwise the cut files above would be refused for the wrong reason."""
    fast = tmp_path / "fast.mp4"
    with open(noise_clip, "rb") as file:
        fast.write_bytes(with_index_in_front(file.read()))
    assert torch.equal(decode_every_frame(fast), decode_every_frame(noise_clip))


def test_damage_between_sound_frames_is_an_error(tmp_path, noise_clip):
    with open(noise_clip, "rb") as file:
        mp4 = bytearray(file.read())
    starts = frame_starts(mp4)
    assert len(starts) == 20
    mp4[starts[10] : starts[13]] = bytes(starts[13] - starts[10])
    path = tmp_path / "hole.mp4"
    path.write_bytes(mp4)
    with pytest.raises(VideoDecodeError, match="hole.mp4"):
        decode_every_frame(path)


def test_clips_cut_without_reencoding_load(tmp_path, noise_clip):
    """Their edit list hides the first frames, which decord counts but cannot give."""
    with open(noise_clip, "rb") as file:
        mp4 = bytearray(file.read())
    media_time = mp4.index(b"elst") + 16
    timescale = mp4.index(b"mdhd") + 16
    ticks_per_frame = int.from_bytes(mp4[timescale : timescale + 4], "big") // 10
    mp4[media_time : media_time + 4] = (3 * ticks_per_frame).to_bytes(4, "big")
    path = tmp_path / "trimmed.mp4"
    path.write_bytes(mp4)
    frames = decode_every_frame(path)
    assert 17 <= len(frames) <= 20
    assert not torch.equal(frames[0], decode_every_frame(noise_clip)[0])


def test_threads_open_videos_one_at_a_time(tmp_path, monkeypatch):
    """The FFmpeg inside decord ends the process if two first openings of a codec coincide."""
    paths = [tmp_path / f"{i}.mp4" for i in range(8)]
    for path in paths:
        path.write_bytes(b"FLV\x01, and not read")
    opening, most = [], []

    class Reader:
        def __init__(self, path, **kwargs):
            opening.append(path)
            most.append(len(opening))
            time.sleep(0.01)
            opening.remove(path)

        def __len__(self):
            return 1

        def get_batch(self, indices):
            return torch.zeros(1, 8, 8, 3, dtype=torch.uint8)

    monkeypatch.setattr(decoding, "VideoReader", Reader)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: decode_frames(path, lambda n: [0], 8), paths))
    assert len(most) == 8 and max(most) == 1
