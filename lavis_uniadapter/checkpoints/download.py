"""Downloads: a whole file or an error, which comes within seconds where there is no network."""

from __future__ import annotations

import hashlib
import re
import zipfile
from concurrent import futures
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch
from tqdm import tqdm

from lavis_uniadapter.common.atomic import atomic
from lavis_uniadapter.common.errors import CheckpointError

ANSWER_TIMEOUT = 8  # seconds until a server must have answered
STALL_TIMEOUT = 60  # seconds without any data
# PyTorch's names of files end with the start of their SHA-256: model-0123abcd.pth. Digits alone
# are more likely a date.
HASH = re.compile(r"-(?=\d*[a-f])([0-9a-f]{8,64})\.")


def download(url: str) -> str:
    """Download weights into PyTorch's cache, where LAVIS keeps its own, unless they are there.

    Returns:
        The path of the file.

    Raises:
        CheckpointError: if the server does not answer, or sends anything but a whole checkpoint.
    """
    target = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)
    if target.is_file():
        return str(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_url(Request(url)) as response, atomic(target) as temporary:
            _receive(response, temporary, target.name)
    except (OSError, HTTPException, ValueError) as error:
        raise CheckpointError(
            f"'{url}' cannot be downloaded: {error}. Nothing was kept. Try again, or give the path "
            "of a file."
        ) from error
    return str(target)


def open_url(request: Request) -> HTTPResponse:
    """Send a request; returns the open response.

    ``urlopen``'s timeout holds for each address of a server, of which there may be many, and not
    for the lookup of its name. Here ANSWER_TIMEOUT holds for all of that.

    Raises:
        OSError: if there is no answer in time, or it is an error.
    """
    answer: futures.Future = futures.Future()

    def ask() -> None:
        try:
            answer.set_result(urlopen(request, timeout=STALL_TIMEOUT))
        except Exception as error:
            answer.set_exception(error)

    Thread(target=ask, daemon=True).start()
    try:
        return answer.result(ANSWER_TIMEOUT)
    except futures.TimeoutError:
        raise TimeoutError(f"no answer in {ANSWER_TIMEOUT} seconds") from None
    except HTTPError:
        raise
    except URLError as error:
        raise (error.reason if isinstance(error.reason, OSError) else error) from None


def _receive(response: HTTPResponse, path: Path, name: str) -> None:
    """Write a response to a file; OSError if it is not a whole checkpoint."""
    digest = hashlib.sha256()
    size = int(response.headers.get("Content-Length") or 0)
    with (
        open(path, "wb") as file,
        tqdm(desc=name, total=size or None, unit="B", unit_scale=True) as progress,
    ):
        while block := response.read(1 << 20):
            file.write(block)
            digest.update(block)
            progress.update(len(block))
    if size and progress.n != size:
        raise OSError(f"the connection ended after {progress.n:,} of {size:,} bytes")

    given = HASH.search(name)
    if given and not digest.hexdigest().startswith(given[1]):
        raise OSError(f"its SHA-256 does not begin with {given[1]}, as its name says")
    with open(path, "rb") as file:
        start = file.read(1)
    # a zip file, or a pickle as PyTorch wrote before 1.6
    if start != b"\x80" and not zipfile.is_zipfile(path):
        what = "a web page" if start == b"<" else "something else"
        raise OSError(f"the server sent {what} instead of a checkpoint")
