"""Runs of the embedded example that take a second or two."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from lavis_uniadapter.runners.run_folders import LOCK
from uniadapter_cli.main import main

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "projects/uniadapter/train"
TINY_CLIPS = (
    "datasets.shapes_retrieval.generate.num_train=6",
    "datasets.shapes_retrieval.generate.num_val=4",
    "datasets.shapes_retrieval.generate.num_test=5",
    "datasets.shapes_retrieval.generate.num_frames=6",
    "datasets.shapes_retrieval.vis_processor.train.n_frms=2",
    "datasets.shapes_retrieval.vis_processor.eval.n_frms=2",
)
TINY_STILLS = (
    "datasets.shapes_image_retrieval.generate.num_train=12",
    "datasets.shapes_image_retrieval.generate.num_val=4",
    "datasets.shapes_image_retrieval.generate.num_test=4",
)
TINY_RUN = (
    "run.max_epoch=2",
    "run.batch_size_train=4",
    "run.batch_size_eval=3",
    "run.num_workers=0",
    "run.k_test=3",
    "run.warmup_steps=2",
    "run.device=cpu",
    "model.vit.depth=1",
    "model.queue_size=10",
)


def options_of(name: str, cache: Path) -> list[str]:
    """Options that make a configuration of the embedded example tiny."""
    tiny = TINY_STILLS if Path(name).stem == "shapes_pretrain" else TINY_CLIPS
    return [*tiny, *TINY_RUN, f"run.cache_root={cache}"]


def torchrun(number, script, options, cwd, check=True):
    """Run a script on the tiny clips in several processes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--standalone", f"--nproc_per_node={number}", str(ROOT / script)),
        *("--cfg-path", str(TRAIN / "shapes_retrieval.yaml"), "--options", *options),
    ]
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,  # of ranks that wait for each other
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


@contextlib.contextmanager
def held_by_another_process(folder: Path):
    """Inside, another process is the sole user of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    code = (
        "import sys, time; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]): print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(folder / LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        try:
            yield
        finally:
            other.kill()


def status_of(arguments: list[str]) -> int | str | None:
    """The exit status of the command ``uniadapter``, argparse's refusals included."""
    try:
        return main(arguments)
    except SystemExit as ended:
        return ended.code
