"""What must hold of a media file before a decoder opens it.

FFmpeg, inside decord, goes by content, not by name: a playlist (HLS, DASH, concat, SDP) that is
named like a video makes it open other files and addresses. So a video must begin like one of the
formats below, which hold their frames themselves. For PostScript, Pillow runs another program.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

FOLLOW_LINKS = "UNIADAPTER_FOLLOW_LINKS"

VIDEO_FORMATS = re.compile(
    rb".{4}(ftyp|moov|mdat|wide|free|skip|pnot|styp|uuid|junk|pict)"  # MP4, QuickTime
    rb"|\x1aE\xdf\xa3"  # Matroska, WebM
    rb"|RIFF.{4}AVI "
    rb"|0&\xb2u\x8ef\xcf\x11\xa6\xd9\0\xaa\0b\xcel"  # ASF, WMV
    rb"|OggS|FLV\x01|GIF8[79]a|RIFF.{4}WEBP"
    rb"|\0\0\0?\x01"  # MPEG program stream; MPEG-1, MPEG-2, MPEG-4 and H.264 without a container
    rb"|(.{4})?G(.{187}|.{191})G(.{187}|.{191})G",  # MPEG transport stream, M2TS
    re.DOTALL,
)
# all that Pillow knows but PostScript
IMAGE_FORMATS = re.compile(rb"(?!%!PS|\xc5\xd0\xd3\xc6)")
_HEAD = 512  # bytes that show the format


def file_problem(path: str, formats: re.Pattern[bytes] | None = None) -> str | None:
    """Say why a file must not be opened by a decoder, or None.

    Args:
        path: of the file.
        formats: what its content must begin with.

    Raises:
        OSError: a fault of the machine (`is_machine_fault`).
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            return "it is a folder" if stat.S_ISDIR(mode) else "it is not a regular file"
        with open(path, "rb", buffering=0) as file:
            head = file.read(_HEAD)
    except OSError as error:
        if is_machine_fault(error):
            raise
        if os.path.islink(path):
            return f"it is a link to {os.readlink(path)}, which cannot be read ({error.strerror})"
        if isinstance(error, FileNotFoundError):
            return "there is no such file"
        return f"the file cannot be read ({error.strerror})"
    if not head:
        return "the file is empty"
    if formats is not None and not formats.match(head):
        kind = "a video" if formats is VIDEO_FORMATS else "an image"
        text = "; playlists and PostScript, which refer to other files, are not opened"
        return (
            f"it cannot be read as {kind}: its content, {head[:12]!r}..., is in no known format"
            f"{text if head.isascii() else ''}"
        )
    return None


def link_problem(path: str | os.PathLike, folder: str | os.PathLike) -> str | None:
    """Say that a link on the way from a folder to a file below it leaves the folder, or None.

    The folder itself may be a link. ``UNIADAPTER_FOLLOW_LINKS=1`` allows all links.
    """
    real = os.path.realpath(path)
    inside = Path(real).is_relative_to(os.path.realpath(folder))
    if inside or os.environ.get(FOLLOW_LINKS) == "1":
        return None
    if not os.path.exists(real):
        return f"it is a link to {real}, which does not exist"
    return (
        f"it is reached by a link that leaves {os.fspath(folder)}, to {real}; if you trust the "
        f"links of this folder, set {FOLLOW_LINKS}=1"
    )


def is_machine_fault(error: BaseException) -> bool:
    """Whether an error says nothing about the file that was read: memory, permissions, limits."""
    if isinstance(error, (MemoryError, PermissionError)):
        return True
    return getattr(error, "errno", None) in (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
