"""The page of an index, and what it asks for: ``uniadapter search serve``.

Serves files of the index alone, by the number of a segment, and refuses requests from other sites.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import mimetypes
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from lavis_uniadapter.common.errors import CheckpointError, ConfigError
from lavis_uniadapter.processors.decoding import (
    VideoDecodeError,
    decode_errors,
    open_video,
    read_frames,
)
from lavis_uniadapter.processors.images import ImageError, read_image
from lavis_uniadapter.processors.media_files import link_problem
from lavis_uniadapter.search.answering import Answerer
from lavis_uniadapter.search.index import Index
from lavis_uniadapter.search.manifest import StoredSegment

PAGE = Path(__file__).parent / "page"
MAX_UPLOAD = 20_000_000  # bytes of an image to search by
MAX_PIXELS = 50_000_000
UPLOAD_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_TOP, MAX_RERANK = 200, 1000
THUMBNAIL = 360  # pixels of the longer side
LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; media-src 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def make_app(
    index: Index, answerer: Answerer | None = None, hosts: Sequence[str] = LOCAL_HOSTS
) -> Starlette:
    """The application.

    Args:
        index: to search.
        answerer: answers questions about a segment; None: the page does not offer it.
        hosts: names under which it may be addressed (the ``Host`` header).
    """
    server = _Server(index, answerer)
    return Starlette(
        routes=[
            Route("/", server.page),
            Route("/api/about", server.about),
            Route("/api/search", server.search, methods=["GET", "POST"]),
            Route("/api/answer", server.answer, methods=["POST"]),
            Route("/media/{segment:int}", server.media),
            Route("/frame/{segment:int}/{number:int}.jpg", server.frame),
            Mount("/static", StaticFiles(directory=PAGE)),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
            Middleware(_SameSite),
        ],
        exception_handlers={
            HTTPException: _error,
            ConfigError: _error,
            CheckpointError: _error,
            VideoDecodeError: _error,
            ImageError: _error,
            Exception: _error,
        },
    )


class _SameSite:
    """Refuses requests that a page of another site makes; adds headers to every answer."""

    def __init__(self, app: Callable):
        self._app = app

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        site = headers.get(b"sec-fetch-site", b"none")
        follows_link = (
            scope["path"] == "/"
            and headers.get(b"sec-fetch-mode") == b"navigate"
            and headers.get(b"sec-fetch-dest") == b"document"
        )
        if site not in (b"none", b"same-origin") and not follows_link:
            refused = JSONResponse({"error": "Requests from other sites are refused."}, 403)
            await refused(scope, receive, send)
            return

        async def send_with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                more = [(k.lower().encode(), v.encode()) for k, v in _HEADERS.items()]
                message["headers"] = [*message["headers"], *more]
            await send(message)

        await self._app(scope, receive, send_with_headers)


class _Server:
    def __init__(self, index: Index, answerer: Answerer | None):
        self._index = index
        self._answerer = answerer
        self._decoding = asyncio.Semaphore(1)  # of uploaded images, which may be large

    async def page(self, request: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    async def about(self, request: Request) -> Response:
        files, segments = self._index.manifest.counts()
        return JSONResponse(
            {
                "root": str(self._index.root),
                "folder": str(self._index.folder),
                "files": files,
                "segments": segments,
                "answers": self._answerer is not None,
            }
        )

    async def search(self, request: Request) -> Response:
        """A query's stages, a line of JSON each: shortlist, progress, result."""
        given = request.query_params
        top = _number(given, "top", 24, 1, MAX_TOP)
        rerank = _number(given, "rerank", 32, 0, MAX_RERANK)
        arguments: dict[str, Any] = {"top": top, "rerank": rerank}
        if request.method == "POST":
            content = await _body(request)
            async with self._decoding:
                arguments["image"] = await run_in_threadpool(_image, content)
        elif "like" in given:
            arguments["like"] = _number(given, "like", 0, 0, 2**62)
        else:
            arguments["text"] = given.get("text", "")
        started = time.perf_counter()
        stages = self._index.stages(**arguments)
        # errors of the query come before the first line, so that they have a status of their own
        first = await run_in_threadpool(next, stages)

        def lines() -> Iterator[str]:
            try:
                for stage in itertools.chain([first], stages):
                    yield _line(stage, started)
            except Exception as error:  # the status is sent already
                yield json.dumps({"error": _described(error)[1]}) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    async def answer(self, request: Request) -> Response:
        answerer = self._answerer
        if answerer is None:
            raise HTTPException(404, "Questions are off; start the server with --qa-cfg.")
        try:
            asked = json.loads(await _body(request))
            segment, question = int(asked["segment"]), str(asked["question"])
        except (ValueError, KeyError, TypeError, OverflowError):
            raise HTTPException(400, "Send JSON with a segment and a question.") from None
        stored, path = self._find(segment)

        def answer() -> dict[str, Any]:
            with _reading(stored):
                stored.check_file(path)
                return answerer.answer(path, stored.segment, question)

        return JSONResponse(await run_in_threadpool(answer))

    async def media(self, request: Request) -> Response:
        _, path = self._find(request.path_params["segment"])
        kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
        return FileResponse(path, media_type=kind)

    async def frame(self, request: Request) -> Response:
        """One of a segment's frames, or the image, as a small JPEG."""
        stored, path = self._find(request.path_params["segment"])
        number = request.path_params["number"]
        if number >= len(stored.segment.times):
            raise HTTPException(404, f"The segment has {len(stored.segment.times)} frames.")
        with _reading(stored):
            stored.check_file(path)
            picture = await run_in_threadpool(_thumbnail, path, stored, number)
        return Response(picture, media_type="image/jpeg", headers={"Cache-Control": "max-age=60"})

    def _find(self, segment: int) -> tuple[StoredSegment, Path]:
        """A segment, and its file if that is still below the indexed folder."""
        try:
            stored = self._index.segment(segment)
        except ConfigError as error:
            raise HTTPException(404, str(error)) from None
        path = Path(self._index.root, stored.file)
        if link_problem(path, self._index.root) or not path.is_file():
            raise HTTPException(404, f"'{stored.file}' is no longer there. Update the index.")
        return stored, path


def _number(given: Any, name: str, default: int, least: int, most: int) -> int:
    value = given.get(name, str(default))
    if not (value.isascii() and value.isdigit() and least <= int(value[:20]) <= most):
        raise HTTPException(400, f"{name} must be a whole number from {least} to {most}.")
    return int(value)


async def _body(request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_UPLOAD:
            raise HTTPException(413, f"More than {MAX_UPLOAD // 10**6} MB; use a smaller image.")
        parts.append(part)
    return b"".join(parts)


@contextlib.contextmanager
def _reading(stored: StoredSegment) -> Iterator[None]:
    """Name the file that cannot be read."""
    try:
        yield
    except (ConfigError, CheckpointError):
        raise
    except (VideoDecodeError, ImageError, ValueError, OSError) as error:
        reason = getattr(error, "reason", "") or str(error)
        raise HTTPException(422, f"'{stored.file}' cannot be read: {reason}") from None


def _image(content: bytes) -> Image.Image:
    try:
        return read_image(io.BytesIO(content), MAX_PIXELS, UPLOAD_FORMATS)
    except ImageError as error:
        raise HTTPException(400, f"The image cannot be used: {error}.") from None


def _line(stage: Any, started: float) -> str:
    return (
        json.dumps(
            {
                "stage": stage.name,
                "seconds": round(time.perf_counter() - started, 3),
                "matched": stage.matched,
                "total": stage.total,
                # the browser needs no path on the server's disk
                "hits": [
                    {k: v for k, v in hit.as_dict().items() if k != "path"} for hit in stage.hits
                ],
            }
        )
        + "\n"
    )


def _thumbnail(path: Path, stored: StoredSegment, number: int) -> bytes:
    if stored.segment.frames:
        with decode_errors(str(path)):
            reader = open_video(str(path), -1)  # not scaled
            pixels = read_frames(reader, [stored.segment.frames[number]])[0]
        picture = Image.fromarray(pixels.numpy())
    else:
        picture = read_image(str(path))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


async def _error(request: Request, error: Exception) -> Response:
    status, message = _described(error)
    return JSONResponse({"error": message}, status)


def _described(error: Exception) -> tuple[int, str]:
    """The status and the message of an error."""
    if isinstance(error, HTTPException):
        return error.status_code, error.detail
    if isinstance(error, (ConfigError, CheckpointError)):
        return 400, str(error)
    if isinstance(error, (VideoDecodeError, ImageError)):
        return 422, str(error)
    return 500, f"The server failed: {type(error).__name__}: {error}"
