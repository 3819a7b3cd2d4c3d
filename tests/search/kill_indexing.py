"""Kill an indexer at random moments; the index must open, and end as one that was never killed.

python tests/search/kill_indexing.py --kills 20
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from lavis.common.registry import registry  # noqa: E402
from search_media import RECIPE, TINY, number_of_segments, write_clip, write_image  # noqa: E402

import lavis_uniadapter  # noqa: E402, F401
from lavis_uniadapter.common.config import load_config  # noqa: E402
from lavis_uniadapter.search import Index  # noqa: E402

FILES = 300


def main() -> int:
    """Kill, check, and go on, until the number of kills is reached."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = _prepare(folder)
        Index.build(folder / "reference", folder / "media", RECIPE, options, window=3.0)
        expected = _content(folder / "reference")
        total = number_of_segments(folder / "reference")
        draw = random.Random(0)
        for number in range(kills):
            index = folder / "index"
            shutil.rmtree(index, ignore_errors=True)
            partial = _kill(index, folder / "media", options, draw.randrange(total))
            Index.build(index, folder / "media", RECIPE, options, window=3.0)
            if _content(index) != expected:
                print(f"kill {number + 1}: the index differs")
                return 1
            print(f"kill {number + 1}: at {partial} of {total} segments, completed alike")
    return 0


def _prepare(folder: Path) -> list[str]:
    media = folder / "media"
    media.mkdir()
    for i in range(FILES):
        if i % 3:
            write_clip(media / f"{i}.mp4", 2 + i % 5, seed=i)
        else:
            write_image(media / f"{i}.png", seed=i)
    config = load_config(RECIPE, [*TINY, "run.evaluate=True"])
    model = registry.get_model_class(config.model_cfg.arch).from_config(config.model_cfg)
    torch.save({"model": model.state_dict()}, folder / "base.pth")
    return [*TINY, f"model.pretrained={folder / 'base.pth'}"]


def _kill(index: Path, media: Path, options: list[str], least: int) -> int:
    """Start an indexer, kill it when it has committed so many segments; returns how many."""
    command = [sys.executable, "-m", "uniadapter_cli", "search", "index", str(media)]
    command += ["--index", str(index), "--cfg", str(RECIPE), "--window", "3", "--options", *options]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None and number_of_segments(index) < least:
        pass
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _content(index)  # it opens
    return number_of_segments(index)


def _content(folder: Path) -> list[tuple]:
    """What an index holds: files, times, and similarities to a query."""
    index = Index.open(folder)
    hits = index.query("a red circle", top=10**6, rerank=0)
    index.close()
    return sorted(
        (h.file, h.start, h.end, *(round(frame.similarity, 3) for frame in h.frames)) for h in hits
    )


if __name__ == "__main__":
    sys.exit(main())
