"""``python -m lavis_uniadapter.demo_qa_caption``: a small BLIP answers and describes video.

For question answering and for captioning: trains a small BLIP, all weights, on stills; evaluates it
on clips as it is; freezes it, adapts it by UniAdapter and evaluates it again. All through the same
runner, tasks and configuration files as real runs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lavis_uniadapter.evaluation.answer_metrics import answer_metrics, majority_answers
from lavis_uniadapter.runners import launch
from lavis_uniadapter.runners.run_checkpoints import BEST
from lavis_uniadapter.tools.demo import (
    PROJECTS,
    adapter_megabytes,
    run_from_command_line,
    train_anew,
)
from lavis_uniadapter.tools.figures import plot_described_clips

# By task: configuration files of training on stills and of adapting to clips.
STAGES = {
    "qa": (PROJECTS / "shapes_qa_pretrain.yaml", PROJECTS / "shapes_qa.yaml"),
    "caption": (PROJECTS / "shapes_caption_pretrain.yaml", PROJECTS / "shapes_caption.yaml"),
}
TITLES = {"qa": "question answering", "caption": "captioning"}
CLIPS_SHOWN = 6
RESULT = "test_epoch_best.json"
QA_COLUMNS = {
    "all": "accuracy",
    "what": "accuracy_what",
    "where": "accuracy_where",
    "how big": "accuracy_how",
}
CAPTION_COLUMNS = {
    "word for word": "word_for_word",
    "CIDEr": "cider",
    "BLEU-4": "bleu_4",
    "ROUGE-L": "rouge_l",
}


def run_demo(seed: int, output_dir: str, options: Sequence[str]) -> dict:
    """Run both tasks; returns, and writes as ``demo.json``, what the tables show.

    Args:
        seed: of the weights and of the order of training.
        output_dir: folder of this demo's runs.
        options: ``section.key=value`` for every stage, e.g. shorter epochs for a test.
    """
    started = time.perf_counter()
    report: dict = {"seed": seed}
    items = {}
    for task in STAGES:
        report[task], items[task], clips = _run_task(task, seed, output_dir, options)
    report["seconds"] = time.perf_counter() - started
    folder = Path(output_dir)
    (folder / f"demo-seed{seed}.json").write_text(json.dumps(report, indent=2) + "\n")
    picture = folder / f"described-seed{seed}.png"
    plot_described_clips(clips, _descriptions(items, clips), picture, "Test clips, as told")
    launch.logger.info("\n%s", table(report))
    launch.logger.info("\npicture: %s", picture)
    return report


def _run_task(task: str, seed: int, output_dir: str, options: Sequence[str]):
    """The three stages of one task: figures for the report, test items, and some clips."""
    pretrain, adapt = STAGES[task]
    say = launch.logger.info
    common = [f"run.seed={seed}", f"run.output_dir={output_dir}", *options]

    say("\n%s 1/3  Train a small BLIP, all weights, on stills.", TITLES[task])
    stills = train_anew(pretrain, common, output_dir, f"{task}-stills-seed{seed}")
    base = f"model.pretrained={stills.output_dir / BEST}"

    say("\n%s 2/3  Evaluate it on clips as it is (zero-shot).", TITLES[task])
    zero_shot = launch.run(
        adapt,
        # full: no adapter at all, plain BLIP
        [*common, base, "model.tuning=full", f"run.job_id={task}-zero-shot-seed{seed}"],
        evaluate=True,
    )

    say("\n%s 3/3  Freeze it and adapt it to the clips by UniAdapter.", TITLES[task])
    adapted = train_anew(adapt, [*common, base], output_dir, f"{task}-clips-seed{seed}")

    runner = adapted.runner
    counts = runner.unwrap_dist_model(runner.model).parameter_counts()
    results = {"zero_shot": zero_shot, "adapted": adapted}
    items = {
        name: json.loads((result.output_dir / "result" / RESULT).read_text())
        for name, result in results.items()
    }
    figures = {
        name: {**result.metrics["test"], **_further_metrics(task, items[name])}
        for name, result in results.items()
    }
    if task == "qa":
        figures["majority"] = majority_metrics(
            runner.datasets["train"].datasets[0].annotation, items["adapted"]
        )
    figures |= {
        "trained_parameters": counts["trainable"],
        "backbone_parameters": counts["backbone"],
        "adapter_megabytes": adapter_megabytes(adapted.output_dir),
        "seconds": sum(result.seconds for result in (stills, zero_shot, adapted)),
    }
    return figures, items["adapted"], _some_clips(runner.datasets["test"])


def _further_metrics(task: str, items: Sequence[Mapping]) -> dict[str, float]:
    """How many captions are one of the clip's references, word for word."""
    if task == "qa":
        return {}
    exact = [item["caption"] in item["references"] for item in items]
    return {"word_for_word": 100 * sum(exact) / len(exact)}


def majority_metrics(training: Sequence[Mapping], asked: Sequence[Mapping]) -> dict[str, float]:
    """Accuracy of saying what is most often right of its kind of question in training."""
    pairs = [(record["question"], record["answer"]) for record in training]
    answers = majority_answers(pairs, [item["question"] for item in asked])
    said = [{**item, "prediction": a} for item, a in zip(asked, answers, strict=True)]
    return answer_metrics(said, {answer for _, answer in pairs})


def _some_clips(dataset) -> dict:
    """Clips with values in 0..1 by file name, spread evenly over the split."""
    by_file = {record["video"]: i for i, record in enumerate(dataset.annotation)}
    files = list(by_file)[:: max(1, len(by_file) // CLIPS_SHOWN)][:CLIPS_SHOWN]
    processor = dataset.vis_processor
    return {file: processor.denormalise(dataset[by_file[file]]["video"]) for file in files}


def _descriptions(items: Mapping[str, Sequence[Mapping]], clips: Mapping) -> dict[str, list[str]]:
    """The caption, and each question with its answer, of the clips shown."""
    lines: dict[str, list[str]] = {file: [] for file in clips}
    for item in items["caption"]:
        if item["file"] in lines:
            lines[item["file"]].append(f"“{item['caption']}”")
    for item in items["qa"]:
        if item["file"] in lines:
            truth = "" if item["correct"] else f"  (is: {item['answer']})"
            lines[item["file"]].append(f"{item['question']}  {item['prediction']}{truth}")
    return lines


def table(report: Mapping) -> str:
    """The demo's closing tables."""
    return "\n\n".join(
        (
            _task_table(
                "VideoQA: right answers (%)",
                report["qa"],
                {
                    "majority answer": "majority",
                    "before (zero-shot)": "zero_shot",
                    "after adapting": "adapted",
                },
                QA_COLUMNS,
            ),
            _task_table(
                "captions",
                report["caption"],
                {"before (zero-shot)": "zero_shot", "after adapting": "adapted"},
                CAPTION_COLUMNS,
            ),
            f"seconds, all: {report['seconds']:.0f}",
        )
    )


def _task_table(
    title: str, figures: Mapping, rows: Mapping[str, str], columns: Mapping[str, str]
) -> str:
    width = max(map(len, [title, *rows]))
    lines = [f"{title:{width}}" + "".join(f"{column:>15}" for column in columns)]
    for label, key in rows.items():
        cells = "".join(f"{figures[key][metric]:>15.1f}" for metric in columns.values())
        lines.append(f"{label:{width}}{cells}")
    trained, backbone = figures["trained_parameters"], figures["backbone_parameters"]
    lines.append(
        f"trained parameters {trained:,} beside a frozen backbone of {backbone:,} "
        f"({100 * trained / backbone:.1f}%); adapter {figures['adapter_megabytes']:.2f} MB; "
        f"{figures['seconds']:.0f} seconds"
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    return run_from_command_line(run_demo, __doc__, "output/demo_qa_caption", argv)


if __name__ == "__main__":
    sys.exit(main())
