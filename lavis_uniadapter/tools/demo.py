"""``python -m lavis_uniadapter.demo``: a small BLIP adapts to video in front of you.

Trains a small BLIP, all weights, on captioned stills; evaluates it on captioned clips as it is;
freezes it, adapts it by UniAdapter and evaluates it again. All through the same runner, tasks and
configuration files as real runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from lavis_uniadapter.checkpoints import adapter_files
from lavis_uniadapter.common.distributed import destroy_process_group
from lavis_uniadapter.common.paths import PACKAGE_ROOT
from lavis_uniadapter.runners import launch, run_folders
from lavis_uniadapter.runners.run_checkpoints import BEST
from lavis_uniadapter.runners.runner import BEST_ADAPTER
from lavis_uniadapter.runners.signals import EXIT_INTERRUPTED, Interrupted
from lavis_uniadapter.tools.figures import plot_curves, plot_top_matches

PROJECTS = PACKAGE_ROOT.parent / "projects/uniadapter/train"
PRETRAIN = PROJECTS / "shapes_pretrain.yaml"
ADAPT = PROJECTS / "shapes_retrieval.yaml"
QUERIES_SHOWN = 8
TOP = 5
COLUMNS = ("r1", "r5", "r10", "medr")


def run_demo(seed: int, output_dir: str, options: Sequence[str]) -> dict:
    """Run all three stages; returns, and writes as ``demo.json``, what the table shows.

    Args:
        seed: of the weights and of the order of training.
        output_dir: folder of this demo's runs.
        options: ``section.key=value`` for every stage, e.g. shorter epochs for a test.
    """
    started = time.perf_counter()
    say = launch.logger.info
    common = [f"run.seed={seed}", f"run.output_dir={output_dir}", *options]

    say("\n1/3  Train a small BLIP, all weights, on captioned stills.")
    pretrained = train_anew(PRETRAIN, common, output_dir, f"stills-seed{seed}")
    base = f"model.pretrained={pretrained.output_dir / BEST}"

    say("\n2/3  Evaluate it on captioned clips as it is (zero-shot).")
    zero_shot = launch.run(
        ADAPT,
        # full: no adapter at all, plain BLIP
        [*common, base, "model.tuning=full", f"run.job_id=zero-shot-seed{seed}"],
        evaluate=True,
    )

    say("\n3/3  Freeze it and adapt it to the clips by UniAdapter.")
    adapted = train_anew(ADAPT, [*common, base], output_dir, f"clips-seed{seed}")

    model = adapted.runner.unwrap_dist_model(adapted.runner.model)
    counts = model.parameter_counts()
    gallery = len(adapted.runner.datasets["test"])
    folder = adapted.output_dir
    report = {
        "seed": seed,
        "gallery": gallery,
        "chance": chance(gallery),
        "zero_shot": zero_shot.metrics["test"],
        "adapted": adapted.metrics["test"],
        "trained_parameters": counts["trainable"],
        "backbone_parameters": counts["backbone"],
        "adapter_megabytes": adapter_megabytes(folder),
        "seconds": {
            "pretrain": pretrained.seconds,
            "zero_shot": zero_shot.seconds,
            "adapt": adapted.seconds,
            "total": time.perf_counter() - started,
        },
    }
    (folder / "demo.json").write_text(json.dumps(report, indent=2) + "\n")
    plot_curves(folder / "log.txt", folder / "curves.png", "Adapting to the clips")
    _draw_matches(adapted.runner, model, folder / "top5.png")
    say("\n%s", table(report))
    say("\npictures: %s\n          %s", folder / "curves.png", folder / "top5.png")
    say("adapter:  %s", folder / BEST_ADAPTER)
    return report


def train_anew(
    cfg_path: Path, options: Sequence[str], output_dir: str, job_id: str
) -> launch.RunResult:
    """Train a stage of a demo; what the same demo left there before makes way."""
    before = Path(output_dir) / job_id
    if (before / run_folders.CONFIG).is_file():
        shutil.rmtree(before)
    return launch.run(cfg_path, [*options, f"run.job_id={job_id}"])


def adapter_megabytes(folder: Path) -> float:
    """Size of the tensors of the best adapter in a run's folder."""
    return (folder / BEST_ADAPTER / adapter_files.TENSORS).stat().st_size / 1e6


def chance(gallery: int) -> dict[str, float]:
    """Expected metrics of a random order with one right answer a query."""
    values = {
        "r1": 100 / gallery,
        "r5": 100 * min(5, gallery) / gallery,
        "r10": 100 * min(10, gallery) / gallery,
        "medr": (gallery + 1) / 2,
    }
    return {f"{way}_{name}": value for way in ("t2v", "v2t") for name, value in values.items()}


def table(report: Mapping) -> str:
    """The demo's closing table."""
    names = ("R@1", "R@5", "R@10", "MedR")
    width = 8
    blank = " " * 18
    lines = [
        f"{blank}{'text to video':^{4 * width}}  {'video to text':^{4 * width}}",
        blank + "  ".join("".join(f"{name:>{width}}" for name in names) for _ in range(2)),
    ]
    for label, key in (
        ("chance", "chance"),
        ("before (zero-shot)", "zero_shot"),
        ("after adapting", "adapted"),
    ):
        values = report[key]
        cells = "  ".join(
            "".join(f"{values[f'{way}_{column}']:>{width}.1f}" for column in COLUMNS)
            for way in ("t2v", "v2t")
        )
        lines.append(f"{label:18}{cells}")
    seconds = report["seconds"]
    trained, backbone = report["trained_parameters"], report["backbone_parameters"]
    lines += [
        "",
        f"gallery of {report['gallery']} clips, in colour, shape and place as in no training item",
        f"trained parameters {trained:,} beside a frozen backbone of {backbone:,} "
        f"({100 * trained / backbone:.1f}%)",
        f"saved adapter {report['adapter_megabytes']:.2f} MB",
        f"seconds: stills {seconds['pretrain']:.0f}, zero-shot {seconds['zero_shot']:.0f}, "
        f"adapting {seconds['adapt']:.0f}, all {seconds['total']:.0f}",
    ]
    return "\n".join(lines)


def _draw_matches(runner, model, picture: Path) -> None:
    """Top-5 clips for test queries spread evenly over the split."""
    loader = runner.dataloaders["test"]
    dataset = runner.datasets["test"]
    _, scores = model.compute_sim_matrix(loader, OmegaConf.create(dict(runner.config.run_cfg)))
    number = min(QUERIES_SHOWN, len(dataset.text))
    texts = np.linspace(0, len(dataset.text) - 1, number).round().astype(int)
    ranking = np.argsort(-scores[texts], axis=1, kind="stable")[:, :TOP]
    denormalise = dataset.vis_processor.denormalise
    clips = {i: denormalise(dataset[i]["video"]) for i in set(ranking.flatten().tolist())}
    plot_top_matches(
        clips,
        [dataset.text[t] for t in texts],
        ranking,
        [dataset.txt2img[t] for t in texts],
        picture,
        "Test queries and their best five clips; the right one is framed",
    )


def run_from_command_line(
    run: Callable[[int, str, Sequence[str]], object],
    description: str,
    output_dir: str,
    argv: Sequence[str] | None,
) -> int:
    """Command line of a demo; returns the exit status.

    Args:
        run: takes seed, output_dir and options.
        description: the module's docstring, whose first paragraph tells what it does.
        output_dir: the default.
    """
    parser = argparse.ArgumentParser(description=description.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output-dir", default=output_dir)
    parser.add_argument(
        "--options", nargs="+", default=[], metavar="section.key=value", help="for every stage"
    )
    args = parser.parse_args(argv)
    launch.log_to_console()
    try:
        run(args.seed, args.output_dir, args.options)
    except launch.USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        print(f"{interrupted.args[0].split(':')[0]}: the demo ends here.", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        destroy_process_group()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_from_command_line(run_demo, __doc__, "output/demo", argv)


if __name__ == "__main__":
    sys.exit(main())
