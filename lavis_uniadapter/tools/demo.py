"""The demo: a small BLIP, trained on stills and frozen, adapts to video by UniAdapter."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.utils import make_grid

from lavis_uniadapter.checkpoints import adapter_files
from lavis_uniadapter.common.atomic import write_json
from lavis_uniadapter.evaluation.answer_metrics import answer_metrics, majority_answers
from lavis_uniadapter.runners import launch, run_folders
from lavis_uniadapter.runners.run_checkpoints import BEST
from lavis_uniadapter.runners.runner import BEST_ADAPTER
from lavis_uniadapter.tools import recipes

# By task: the metrics shown.
METRICS = {
    "retrieval": [f"{way}_{name}" for way in ("t2v", "v2t") for name in "r1 r5 r10 medr".split()],
    "qa": ["accuracy", "accuracy_what", "accuracy_where", "accuracy_how"],
    "caption": ["cider", "bleu_4", "rouge_l"],
}
QUERIES_SHOWN, TOP, CLIPS_SHOWN = 8, 5, 6
Cell = tuple[Tensor, str, bool]  # a clip, the text above it, and whether it is framed


def run_demo(task: str, seed: int, output_dir: str, options: Sequence[str] = ()) -> dict:
    """Run the three stages of a task, with ``options`` for each; returns what the table shows."""
    started = time.perf_counter()
    say = launch.logger.info

    def run(stage: str, recipe: str, *more: str, evaluate: bool = False) -> launch.RunResult:
        job_id = f"{task}-{stage}-seed{seed}"
        common = [f"run.seed={seed}", f"run.output_dir={output_dir}", f"run.job_id={job_id}"]
        earlier = Path(output_dir) / job_id
        if (earlier / run_folders.CONFIG).is_file():
            shutil.rmtree(earlier)
        return launch.run(recipes.runs()[recipe], [*common, *options, *more], evaluate)

    stills_recipe, clips_recipe = recipes.STAGES[task]
    say("\n1/3  Train a small BLIP, all weights, on stills (%s).", task)
    stills = run("stills", stills_recipe, "run.test_splits=[]")
    base = f"model.pretrained={stills.output_dir / BEST}"
    say("\n2/3  Evaluate it on clips as it is (zero-shot).")
    zero_shot = run("zero-shot", clips_recipe, base, "model.tuning=full", evaluate=True)
    say("\n3/3  Freeze it and adapt it to the clips by UniAdapter.")
    adapted = run("clips", clips_recipe, base)

    folder, counts = adapted.output_dir, adapted.runner._model.parameter_counts()
    seconds = {"stills": stills.seconds, "zero-shot": zero_shot.seconds}
    seconds |= {"adapting": adapted.seconds, "all": time.perf_counter() - started}
    report = {
        "task": task,
        "seed": seed,
        "metrics": {
            **_baseline(task, adapted),
            "before (zero-shot)": (zero_shot.metrics or {})["test"],
            "after adapting": (adapted.metrics or {})["test"],
        },
        "test_items": len(adapted.runner.datasets["test"]),
        "trained_parameters": counts["trainable"],
        "backbone_parameters": counts["backbone"],
        "adapter_megabytes": (folder / BEST_ADAPTER / adapter_files.TENSORS).stat().st_size / 1e6,
        "seconds": seconds,
    }
    write_json(folder / "demo.json", report)
    draw = _matches if task == "retrieval" else _descriptions
    draw_clips(list(draw(adapted)), folder / "clips.png")
    say("\n%s", table(report))
    say("\npicture: %s\nadapter: %s", folder / "clips.png", folder / BEST_ADAPTER)
    return report


def _items(result: launch.RunResult) -> list[dict]:
    """The test items of question answering or captioning, with their predictions."""
    return json.loads((result.output_dir / "result/test_epoch_best.json").read_text())


def _baseline(task: str, adapted: launch.RunResult) -> dict[str, dict[str, float]]:
    """The row of the table to compare with: metrics of an answer that ignores the clip."""
    datasets = adapted.runner.datasets
    if task == "retrieval":
        return {"chance": chance(len(datasets["test"]))}
    if task == "caption":
        return {}
    pairs = [(r["question"], r["answer"]) for r in datasets["train"].datasets[0].annotation]
    asked = _items(adapted)
    answers = majority_answers(pairs, [item["question"] for item in asked])
    guessed = [{**item, "prediction": a} for item, a in zip(asked, answers, strict=True)]
    return {"majority answer": answer_metrics(guessed, {answer for _, answer in pairs})}


def chance(gallery: int) -> dict[str, float]:
    """Expected metrics of a random order with one right answer a query."""
    values = {f"r{k}": 100 * min(k, gallery) / gallery for k in (1, 5, 10)}
    values["medr"] = (gallery + 1) / 2
    return {f"{way}_{name}": value for way in ("t2v", "v2t") for name, value in values.items()}


def table(report: Mapping) -> str:
    """The demo's closing table."""
    columns = {name: max(len(name), 6) + 3 for name in METRICS[report["task"]]}
    lines = [" " * 18 + "".join(f"{name:>{width}}" for name, width in columns.items())]
    for label, values in report["metrics"].items():
        cells = "".join(f"{values[name]:>{width}.1f}" for name, width in columns.items())
        lines.append(f"{label:18}{cells}")
    trained, backbone = report["trained_parameters"], report["backbone_parameters"]
    seconds = ", ".join(f"{stage} {value:.0f}" for stage, value in report["seconds"].items())
    return "\n".join(lines) + (
        f"\n\n{report['test_items']} test items, with combinations of colour, shape and place that "
        f"no training item has\ntrained parameters {trained:,} beside a frozen backbone of "
        f"{backbone:,} ({trained / backbone:.1%})\nsaved adapter "
        f"{report['adapter_megabytes']:.2f} MB\nseconds: {seconds}"
    )


def _clip(dataset, index: int) -> Tensor:
    return dataset.vis_processor.denormalise(dataset[index]["video"])


def _matches(result: launch.RunResult) -> Iterator[list[Cell]]:
    """The best five clips for test queries spread evenly over the split; the right one framed."""
    dataset = result.runner.datasets["test"]
    loader = DataLoader(dataset, batch_size=32, collate_fn=dataset.collater)
    _, scores = result.runner._model.compute_sim_matrix(loader, result.runner.config.run_cfg)
    number = min(QUERIES_SHOWN, len(dataset.text))
    for query in np.linspace(0, len(dataset.text) - 1, number).round().astype(int).tolist():
        best = np.argsort(-scores[query], kind="stable")[:TOP].tolist()
        texts = [dataset.text[query]] + [""] * (len(best) - 1)
        right = dataset.txt2img[query]
        yield [(_clip(dataset, i), text, i == right) for i, text in zip(best, texts, strict=True)]


def _descriptions(result: launch.RunResult) -> Iterator[list[Cell]]:
    """Test clips spread evenly over the split, with their captions or answers."""
    dataset = result.runner.datasets["test"]
    indices = {record["video"]: i for i, record in enumerate(dataset.annotation)}
    said: dict[str, list[str]] = {file: [] for file in indices}
    for item in _items(result):
        text = item.get("caption")
        if text is None:
            truth = "" if item["correct"] else f"  (correct: {item['answer']})"
            text = f"{item['question']}  {item['prediction']}{truth}"
        said[item["file"]].append(text)
    shown = list(indices)[:: max(1, len(indices) // CLIPS_SHOWN)][:CLIPS_SHOWN]
    cells = [(_clip(dataset, indices[file]), "\n".join(said[file]), False) for file in shown]
    yield from (cells[i : i + 3] for i in range(0, len(cells), 3))


def draw_clips(rows: Sequence[Sequence[Cell]], picture: Path) -> None:
    """A sheet of (3, frames, H, W) clips with values in 0..1, each as its frames in two rows."""
    lines = max(text.count("\n") for _, text, _ in rows[0])
    columns = max(map(len, rows))
    figure = Figure((2.4 * columns, (1.6 + 0.1 * lines) * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("none")
    for row, cells in zip(grid, rows, strict=True):
        for axes, (clip, text, framed) in zip(row, cells, strict=False):
            frames = clip.clamp(0, 1).transpose(0, 1)
            sheet = make_grid(frames, nrow=(len(frames) + 1) // 2, padding=0)
            axes.imshow(sheet.permute(1, 2, 0))
            axes.set_title(text, loc="left", fontsize=9)
            if framed:
                axes.spines[:].set(color="tab:green", linewidth=5)
    figure.savefig(picture, dpi=130)
