"""Clips that a DataLoader delivers a second, from videos and from extracted frames.

Videos of 320 x 240 pixels and ten seconds are drawn and encoded first. Set beside the clips that a
training step takes a second, where ``benchmarks.training_step`` has been run on this device.
"""

from __future__ import annotations

import json
import tempfile
import time
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from benchmarks import measuring
from lavis_uniadapter.processors.video import BlipVideoEvalProcessor, BlipVideoTrainProcessor
from lavis_uniadapter.tools.prepare.command import main as prepare

SIZE, FPS, SECONDS = (320, 240), 25, 10


class Clips(Dataset):
    """Every clip of a folder, several times over."""

    def __init__(self, paths: list[str], processor, times: int):
        self.paths, self.processor = paths * times, processor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        return self.processor(self.paths[index])


def draw_videos(folder: Path, number: int) -> list[str]:
    """Moving noise over a drifting gradient, which compresses about as badly as film."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    width, height = SIZE
    for index in tqdm(range(number), desc="drawing videos"):
        writer = cv2.VideoWriter(
            str(folder / f"{index}.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), FPS, SIZE
        )
        texture = rng.integers(0, 256, (height // 8, 2 * width // 8, 3), dtype=np.uint8)
        texture = cv2.resize(texture, (2 * width, height), interpolation=cv2.INTER_CUBIC)
        for frame in range(FPS * SECONDS):
            writer.write(np.roll(texture, 3 * frame, axis=1)[:, :width])
        writer.release()
    return sorted(str(path) for path in folder.glob("*.mp4"))


def read(paths: list[str], processor, workers: int, times: int) -> float:
    """Seconds to read all clips."""
    loader = DataLoader(Clips(paths, processor, times), batch_size=8, num_workers=workers)
    started = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - started


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e6


def appetite(folder: Path, device: str) -> dict[str, float]:
    """Clips a second that our training step takes, by batch, if that has been measured."""
    path = folder / f"training_step_{device}.json"
    if not path.is_file():
        return {}
    cases = json.loads(path.read_text())["cases"]
    return {str(c["batch"]): c["batch"] / c["peers"]["ours"]["seconds"] for c in cases}


def measure(args, folder: Path) -> dict:
    videos, frames = folder / "videos", folder / "frames"
    paths = draw_videos(videos, args.videos)
    started = time.perf_counter()
    if prepare(["frames", "--videos", str(videos), "--output", str(frames)]):
        raise SystemExit("the frames could not be extracted")
    extracting = time.perf_counter() - started
    sources = {
        "videos": paths,
        "extracted frames": [path.replace(str(videos), str(frames)) for path in paths],
    }
    processors = {"train": BlipVideoTrainProcessor, "eval": BlipVideoEvalProcessor}
    peers = {
        f"{mode}, {source}": partial(
            read, of_source, cls(image_size=224, n_frms=args.frames), args.workers, args.times
        )
        for mode, cls in processors.items()
        for source, of_source in sources.items()
    }
    times = measuring.interleaved(peers, args.repeats)
    number = args.videos * args.times
    return {
        "machine": measuring.machine(args.device),
        "videos": args.videos,
        "frames_per_clip": args.frames,
        "workers": args.workers,
        "video_megabytes": megabytes(videos),
        "extracted_megabytes": megabytes(frames),
        "extracting_seconds": extracting,
        "clips_per_second": {name: number / taken["median"] for name, taken in times.items()},
        "seconds": times,
        "training_step_clips_per_second": appetite(args.output, args.device),
    }


def main() -> None:
    options = measuring.parser(__doc__)
    options.add_argument("--videos", type=int, default=24)
    options.add_argument("--times", type=int, default=4, help="that each is read in a run")
    options.add_argument("--frames", type=int, default=8)
    options.add_argument("--workers", type=int, default=2)
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    measuring.print_table(("source", "clips a second"), list(result["clips_per_second"].items()))
    print(
        f"extracting {args.videos} videos took {result['extracting_seconds']:.1f} s; "
        f"{result['video_megabytes']:.0f} MB of video, "
        f"{result['extracted_megabytes']:.0f} MB of frames"
    )
    for batch, eaten in result["training_step_clips_per_second"].items():
        print(f"a training step of {batch} clips takes {eaten:.2f} clips a second")
    print("written:", measuring.save("data_path", result, args.output))


if __name__ == "__main__":
    main()
