"""The demo: a small BLIP, trained on stills and frozen, adapts to video by UniAdapter.

Trains a small BLIP, all weights, on stills; evaluates it on clips as it is; freezes it, adapts it
by UniAdapter and evaluates it again. It uses the same runner, tasks and recipes as real runs.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from lavis_uniadapter.checkpoints import adapter_files
from lavis_uniadapter.common.atomic import write_json
from lavis_uniadapter.evaluation.answer_metrics import answer_metrics, majority_answers
from lavis_uniadapter.runners import launch, run_folders
from lavis_uniadapter.runners.run_checkpoints import BEST
from lavis_uniadapter.runners.runner import BEST_ADAPTER
from lavis_uniadapter.runners.signals import Interrupted
from lavis_uniadapter.tools import recipes
from lavis_uniadapter.tools.figures import Cell, plot_clips, plot_curves

# By task: the recipes that train on stills and adapt to clips, and the metrics shown.
STAGES = {
    "retrieval": ("shapes_pretrain", "shapes_retrieval"),
    "qa": ("shapes_qa_pretrain", "shapes_qa"),
    "caption": ("shapes_caption_pretrain", "shapes_caption"),
}
METRICS = {
    "retrieval": [f"{way}_{name}" for way in ("t2v", "v2t") for name in "r1 r5 r10 medr".split()],
    "qa": ["accuracy", "accuracy_what", "accuracy_where", "accuracy_how"],
    "caption": ["cider", "bleu_4", "rouge_l"],
}
QUERIES_SHOWN, TOP, CLIPS_SHOWN = 8, 5, 6


def run_demo(task: str, seed: int, output_dir: str, options: Sequence[str] = ()) -> dict:
    """Run the three stages; returns, and writes as ``demo.json``, what the table shows.

    Args:
        task: one of ``STAGES``.
        seed: of the weights and of the order of training.
        output_dir: folder of the demo's runs.
        options: ``section.key=value`` for every stage, e.g. shorter epochs for a test.
    """
    started = time.perf_counter()
    say = launch.logger.info
    common = [f"run.seed={seed}", f"run.output_dir={output_dir}", *options]
    stills_recipe, clips_recipe = STAGES[task]

    say("\n1/3  Train a small BLIP, all weights, on stills (%s).", task)
    no_test = [*common, "run.test_splits=[]"]
    stills = _train(stills_recipe, no_test, output_dir, f"{task}-stills-seed{seed}")
    common.append(f"model.pretrained={stills.output_dir / BEST}")

    say("\n2/3  Evaluate it on clips as it is (zero-shot).")
    plain_blip = ["model.tuning=full", f"run.job_id={task}-zero-shot-seed{seed}"]
    zero_shot = launch.run(recipes.runs()[clips_recipe], [*common, *plain_blip], evaluate=True)

    say("\n3/3  Freeze it and adapt it to the clips by UniAdapter.")
    adapted = _train(clips_recipe, common, output_dir, f"{task}-clips-seed{seed}")

    folder = adapted.output_dir
    counts = _model(adapted).parameter_counts()
    report = {
        "task": task,
        "seed": seed,
        "metrics": {
            **_baseline(task, adapted),
            "before (zero-shot)": zero_shot.metrics["test"],
            "after adapting": adapted.metrics["test"],
        },
        "test_items": len(adapted.runner.datasets["test"]),
        "trained_parameters": counts["trainable"],
        "backbone_parameters": counts["backbone"],
        "adapter_megabytes": (folder / BEST_ADAPTER / adapter_files.TENSORS).stat().st_size / 1e6,
        "seconds": {
            "stills": stills.seconds,
            "zero-shot": zero_shot.seconds,
            "adapting": adapted.seconds,
            "all": time.perf_counter() - started,
        },
    }
    write_json(folder / "demo.json", report)
    plot_curves(folder / run_folders.LOG, METRICS[task][0], folder / "curves.png")
    draw = _draw_matches if task == "retrieval" else _draw_descriptions
    draw(adapted, folder / "clips.png")
    say("\n%s", table(report))
    say("\npictures: %s\n          %s", folder / "curves.png", folder / "clips.png")
    say("adapter:  %s", folder / BEST_ADAPTER)
    return report


def _train(recipe: str, options: Sequence[str], output_dir: str, job_id: str) -> launch.RunResult:
    """Train one stage anew; an earlier demo's run of that stage is deleted."""
    before = Path(output_dir) / job_id
    if (before / run_folders.CONFIG).is_file():
        shutil.rmtree(before)
    try:
        return launch.run(recipes.runs()[recipe], [*options, f"run.job_id={job_id}"])
    except Interrupted as interrupted:
        signal_name = str(interrupted).split(":")[0]
        raise Interrupted(f"{signal_name}: the demo ended. The same command starts anew.") from None


def _model(result: launch.RunResult):
    return result.runner.unwrap_dist_model(result.runner.model)


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
    metrics = METRICS[report["task"]]
    widths = [max(len(name), 6) + 3 for name in metrics]
    columns = list(zip(metrics, widths, strict=True))
    lines = [" " * 18 + "".join(f"{name:>{width}}" for name, width in columns)]
    for label, values in report["metrics"].items():
        cells = "".join(f"{values[name]:>{width}.1f}" for name, width in columns)
        lines.append(f"{label:18}{cells}")
    trained, backbone = report["trained_parameters"], report["backbone_parameters"]
    seconds = ", ".join(f"{stage} {value:.0f}" for stage, value in report["seconds"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"{report['test_items']} test items, with combinations of colour, shape and place that "
            "no training item has",
            f"trained parameters {trained:,} beside a frozen backbone of {backbone:,} "
            f"({100 * trained / backbone:.1f}%)",
            f"saved adapter {report['adapter_megabytes']:.2f} MB",
            f"seconds: {seconds}",
        ]
    )


def _clip(dataset, index: int) -> Tensor:
    return dataset.vis_processor.denormalise(dataset[index]["video"])


def _draw_matches(result: launch.RunResult, picture: Path) -> None:
    """The best five clips for test queries spread evenly over the split."""
    dataset = result.runner.datasets["test"]
    loader = DataLoader(dataset, batch_size=32, collate_fn=dataset.collater)
    _, scores = _model(result).compute_sim_matrix(loader, result.runner.config.run_cfg)
    number = min(QUERIES_SHOWN, len(dataset.text))
    rows = []
    for text in np.linspace(0, len(dataset.text) - 1, number).round().astype(int).tolist():
        best = np.argsort(-scores[text], kind="stable")[:TOP].tolist()
        right = dataset.txt2img[text]
        row = [Cell(_clip(dataset, index), framed=index == right) for index in best]
        row[0].text = dataset.text[text]
        rows.append(row)
    plot_clips(rows, picture, "Test queries and their best five clips; the right one is framed")


def _draw_descriptions(result: launch.RunResult, picture: Path) -> None:
    """Test clips spread evenly over the split, with their captions or answers."""
    dataset = result.runner.datasets["test"]
    indices = {record["video"]: i for i, record in enumerate(dataset.annotation)}
    step = max(1, len(indices) // CLIPS_SHOWN)
    said: dict[str, list[str]] = {}
    for item in _items(result):
        said.setdefault(item["file"], []).append(
            f"“{item['caption']}”" if "caption" in item else _answer(item)
        )
    cells = [
        Cell(_clip(dataset, indices[file]), "\n".join(said[file]))
        for file in list(indices)[::step][:CLIPS_SHOWN]
    ]
    plot_clips([cells[i : i + 3] for i in range(0, len(cells), 3)], picture, "Test clips")


def _answer(item: Mapping) -> str:
    truth = "" if item["correct"] else f"  (correct: {item['answer']})"
    return f"{item['question']}  {item['prediction']}{truth}"
