"""Video files that cannot be read, of each kind that a folder of downloads comes to hold."""

from __future__ import annotations

import wave
import zipfile
from pathlib import Path

from miniature import write_video

from lavis_uniadapter.processors.extracted_frames import EXTRACTED_SUFFIX

KINDS = (
    "empty",
    "truncated",
    "audio_only",
    "vanished",
    "not_a_video",
    "header_only",
    "dangling_link",
    "bad_archive",
)


def make_rotten(kind: str, path: str | Path) -> None:
    """Make `path`, which is to end in .mp4, a video of one of KINDS that cannot be read.

    Nothing is at `path` itself for "vanished" and "bad_archive"; the latter's damaged frames stand
    in its place, as `prepare frames` puts them.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        write_video(path, index=0, num_frames=12)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "audio_only":
        with wave.open(str(path), "wb") as audio:
            audio.setparams((1, 2, 8000, 0, "NONE", "not compressed"))
            audio.writeframes(b"\0\0" * 8000)
    elif kind == "vanished":
        path.unlink(missing_ok=True)
    elif kind == "not_a_video":
        path.write_text("<html>404: this video is no longer available</html>\n" * 20)
    elif kind == "header_only":
        write_video(path, index=0)
        path.write_bytes(without_frames(path.read_bytes()))
    elif kind == "dangling_link":
        path.symlink_to(path.with_name("deleted") / path.name)
    elif kind == "bad_archive":
        with zipfile.ZipFile(f"{path}{EXTRACTED_SUFFIX}", "w") as archive:
            archive.writestr("about.json", '{"num_frames": 8, "image_size": 32}')
            archive.writestr("00000.jpg", b"no picture")
    else:
        raise ValueError(f"No kind {kind!r}; there are {', '.join(KINDS)}.")


def without_frames(mp4: bytes) -> bytes:
    """OpenCV's mp4 with its header alone, whose tables hold no frame."""
    start = mp4.index(b"mdat") - 4
    end = start + int.from_bytes(mp4[start : start + 4], "big")
    header = bytearray(mp4[:start] + mp4[end:])
    # where the number of its entries stands in each table
    for table, place in ((b"stts", 8), (b"stss", 8), (b"stsc", 8), (b"stsz", 12), (b"stco", 8)):
        place += header.index(table)
        header[place : place + 4] = bytes(4)
    return bytes(header)
