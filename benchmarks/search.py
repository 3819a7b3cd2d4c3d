"""Search: exact search over a million segments, indexing against the encoder alone, reranking.

python -m benchmarks.search --cases store index update rerank
"""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks import measuring
from benchmarks.models import our_retrieval
from lavis_uniadapter.backbone.features import VisualFeatures
from lavis_uniadapter.common.distributed import init_process_group
from lavis_uniadapter.common.schema import Evaluation
from lavis_uniadapter.processors.video import BlipVideoEvalProcessor
from lavis_uniadapter.runners.precision import choose_amp
from lavis_uniadapter.search.engine import Engine
from lavis_uniadapter.search.index import Index
from lavis_uniadapter.search.indexing import compare, update
from lavis_uniadapter.search.manifest import Manifest
from lavis_uniadapter.search.store import NumPyStore

SEGMENTS, PART, DIM, TOP = 1_000_000, 50_000, 256, 100
CLIPS, CANDIDATES, FILES = 24, 32, 10_000


def main() -> None:
    """Measure the cases that are asked for, and add them to the JSON file."""
    cases = {"store": store, "index": indexing, "update": updating, "rerank": reranking}
    parser = measuring.parser(__doc__ or "")
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases))
    args = parser.parse_args()
    for name in args.cases:
        case = {"case": name, **cases[name](args.device, args.repeats)}
        measuring.save_case("search", case, "case", args.device, args.output)
        print(
            name, *(f"{key}: {value}" for key, value in case.items() if key != "case"), sep="\n  "
        )


def store(device: str, repeats: int) -> dict[str, Any]:
    """Exact search of the default store, against float32 brute force."""
    with tempfile.TemporaryDirectory() as folder:
        before = _resident()
        opened = NumPyStore(Path(folder), DIM)
        generator = torch.Generator().manual_seed(0)
        for start in range(0, SEGMENTS, PART):
            opened.add(range(start, start + PART), _originals(generator))
        queries = F.normalize(torch.randn(repeats + 2, DIM, generator=generator), dim=1)
        found = [opened.search(query, TOP)[0] for query in queries]
        taken = [measuring.seconds(lambda q=q: opened.search(q, TOP), "cpu") for q in queries]
        with ThreadPoolExecutor(1) as pool:  # the file is mapped during a search alone
            searches = pool.submit(lambda: [opened.search(query, TOP) for query in queries])
            memory = 0
            while not searches.done():
                memory = max(memory, _resident() - before)
        generator.manual_seed(0)  # the same vectors again, in float32
        exact = torch.cat([_originals(generator) @ queries.T for _ in range(SEGMENTS // PART)])
        best = exact.T.topk(TOP).indices.tolist()
        same = sum(len({*ids} & {*b}) for ids, b in zip(found, best, strict=True))
    return {
        "segments": SEGMENTS,
        "seconds": sorted(taken)[len(taken) // 2],
        "memory_gb": memory / 1e9,
        "same_as_float32": same / (TOP * len(queries)),
    }


def _originals(generator: torch.Generator) -> torch.Tensor:
    """The next vectors, unit and in float32."""
    return F.normalize(torch.randn(PART, DIM, generator=generator), dim=1)


def _engine(device: str) -> Engine:
    engine = Engine.__new__(Engine)  # of no recipe
    engine.model = our_retrieval(224, frame_aware=True, device=device)
    engine.processor, engine.text_processor = BlipVideoEvalProcessor(), str
    engine.settings, engine.amp, engine.batch_size = Evaluation(), choose_amp("auto", device), 8
    return engine


def _write_clips(folder: Path, number: int) -> None:
    rng = np.random.default_rng(0)
    for i in range(number):
        path = str(folder / f"{i}.mp4")
        writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), 25, (320, 240))
        picture = rng.integers(0, 255, (240, 320, 3)).astype(np.uint8)
        for _ in range(250):
            writer.write(picture)
            picture = np.roll(picture, 2, axis=1)
        writer.release()


def indexing(device: str, repeats: int) -> dict[str, Any]:
    """Indexing clips of ten seconds, against the encoder alone on as many random frames."""
    engine = _engine(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "clips").mkdir()
        _write_clips(folder / "clips", CLIPS)
        clips = torch.randint(0, 255, (CLIPS, 8, 224, 224, 3), dtype=torch.uint8)

        def encode_alone() -> None:
            for some in clips.split(engine.batch_size):
                engine.encode(some)

        number = iter(range(repeats))
        taken = measuring.interleaved(
            {
                "encoder alone": lambda: measuring.seconds(encode_alone, device),
                "index": lambda: _index(engine, folder / "clips", folder / str(next(number)))[0],
            },
            repeats,
        )
    alone, whole = (taken[name]["median"] for name in ("encoder alone", "index"))
    return {"clips": CLIPS, "amp": engine.amp, "seconds": taken, "share_of_encoder": alone / whole}


def updating(device: str, repeats: int) -> dict[str, Any]:
    """Indexing many small images, memory on the way, and an update that finds nothing new."""
    engine = _Instant()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        picture = Image.new("RGB", (64, 48))
        for i in range(FILES):
            picture.putpixel((i % 64, i // 64 % 48), (i % 256, i // 256, 7))
            picture.save(folder / "images" / f"{i}.png")
        _index(engine, folder / "images", folder / "warm")
        before = _resident()
        first, _ = _index(engine, folder / "images", folder / "index")
        grown = _resident() - before
        again, summary = _index(engine, folder / "images", folder / "index")
    if summary.unchanged != FILES:
        raise RuntimeError(f"{summary.unchanged} of {FILES} files count as unchanged.")
    return {
        "files": FILES,
        "seconds_without_model": first,
        "grown_mb": grown / 1e6,
        "seconds_unchanged": again,
    }


class _Instant(Engine):
    """Encodes in no time, so that what surrounds the model is measured."""

    def __init__(self) -> None:
        self.processor, self.batch_size = BlipVideoEvalProcessor(), 64

    def encode(self, clips: torch.Tensor) -> VisualFeatures:
        feat = F.normalize(torch.ones(len(clips), DIM), dim=1)
        return VisualFeatures(torch.empty(0), feat, feat[:, None].expand(-1, clips.shape[1], -1))


def reranking(device: str, repeats: int) -> dict[str, Any]:
    """A query whose candidates' visual tokens are cached, against the bare second stage."""
    engine = _engine(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "clips").mkdir()
        _write_clips(folder / "clips", CANDIDATES)
        _index(engine, folder / "clips", folder / "index")
        manifest = Manifest(folder / "index")
        index = Index(folder, manifest, NumPyStore(folder / "index", DIM), engine)
        text = "a red circle on the left of a small green star"
        uncached = measuring.seconds(lambda: index.query(text, rerank=CANDIDATES), device)
        visuals = engine.encode(torch.zeros(CANDIDATES, 8, 224, 224, 3, dtype=torch.uint8))
        encoded = engine.encode_texts([text])
        pairs = torch.tensor([[0, number] for number in range(CANDIDATES)])
        taken = measuring.interleaved(
            {
                "query": lambda: measuring.seconds(
                    lambda: index.query(text, rerank=CANDIDATES), device
                ),
                "second stage alone": lambda: measuring.seconds(
                    lambda: engine.match(encoded, visuals, pairs), device
                ),
            },
            repeats,
        )
        index.close()
    query, alone = (taken[name]["median"] for name in ("query", "second stage alone"))
    return {
        "candidates": CANDIDATES,
        "amp": engine.amp,
        "seconds_uncached": uncached,
        "seconds": taken,
        "times_the_second_stage": query / alone,
    }


def _index(engine: Engine, source: Path, folder: Path) -> tuple[float, Any]:
    """Seconds and summary of an update, as ``Index.build`` does it once the model is loaded."""
    started = time.perf_counter()
    folder.mkdir(exist_ok=True)
    manifest = Manifest(folder, {"root": str(source)})
    opened = NumPyStore(folder, DIM)
    work = compare(manifest, source, source)
    summary = update(manifest, opened, engine, work, source, window=10, workers=2, timeout=120)
    manifest.close()
    return time.perf_counter() - started, summary


def _resident() -> int:
    """Bytes in memory now, mapped files included."""
    return psutil.Process().memory_info().rss


if __name__ == "__main__":
    init_process_group("cpu")
    main()
