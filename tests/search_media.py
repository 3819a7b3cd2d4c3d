"""Clips and images to index, and a recipe for it that takes a second."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from lavis_uniadapter.search import Index
from lavis_uniadapter.search.manifest import FILE, Manifest
from lavis_uniadapter.tools import recipes

FILES = {"short.mp4": 1, "long.mp4": 3, "sub/other.mp4": 1, "a.png": 1, "sub/b.jpg": 1}
RECIPE = recipes.runs()["shapes_retrieval"]
TINY = (
    "model.vit.depth=1",
    "run.device=cpu",
    "run.amp=null",
    "run.batch_size_eval=3",
    "datasets.shapes_retrieval.vis_processor.eval.n_frms=2",
)


def write_clip(path: Path, seconds: float, seed: int, fps: int = 5) -> None:
    """A clip whose colours change twice a second."""
    rng = np.random.default_rng(seed)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, (64, 64))
    for i in range(round(seconds * fps)):
        if i % 3 == 0:
            colour = rng.integers(0, 255, 3).astype(np.uint8)
        writer.write(np.full((64, 64, 3), colour, np.uint8))
    writer.release()


def write_image(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize((80, 60)).save(path)


def segments_of(folder) -> dict[str, int]:
    """Numbers of segments in an index, by file."""
    manifest = Manifest(folder)
    counts: dict[str, int] = {}
    for stored in manifest.segments(range(1, 2000)):
        counts[stored.file] = counts.get(stored.file, 0) + 1
    manifest.close()
    return counts


def all_hits(folder, rerank=50) -> list[tuple]:
    """All that an index finds for a text, in one order."""
    index = Index.open(folder)
    hits = index.query("a red circle", top=300, rerank=rerank)
    index.close()
    return sorted(
        (h.file, h.start, h.end, round(h.probability if rerank else h.similarity, 3)) for h in hits
    )


def number_of_segments(folder) -> int:
    """What an indexer has committed so far."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{folder / FILE}?mode=ro", uri=True)) as db:
            return db.execute("SELECT COUNT(*) FROM segments").fetchone()[0]
    except sqlite3.OperationalError:  # not there yet
        return 0
