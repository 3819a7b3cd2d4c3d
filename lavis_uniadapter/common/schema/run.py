"""``run:``: LAVIS's keys and those of this package."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from lavis_uniadapter.common.schema.section import (
    Amount,
    Count,
    Positive,
    Section,
    Share,
    Size,
    Text,
    Texts,
    Wanted,
    option,
    shown,
)

OURS = "runner_uniadapter"


@dataclass(frozen=True)
class ReadBy:
    """Marks a key that only some runners read."""

    runners: tuple[str, ...]


FolderName = Annotated[Text, Field(pattern=r"^[^/\\]+$"), Wanted("a folder name without / or \\")]
Splits = Annotated[Texts, Wanted("a list of names, as in [val]")]
Amp = Annotated[Literal["auto", "bf16", "fp16"] | bool | None, Wanted("auto, bf16, fp16 or null")]
Ours = ReadBy((OURS,))
Iter = ReadBy(("runner_iter",))
TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "uniadapter_retrieval": {"selection_metric": "mean_recall"},
    "video_qa": {"selection_metric": "accuracy"},
    "uniadapter_captioning": {"selection_metric": "cider", "max_len": 30, "min_len": 5},
    "captioning": {"max_len": 30, "min_len": 5},
}
_TO_TRAIN = ("batch_size_train", "max_epoch", "lr_sched", "init_lr", "min_lr", "weight_decay")


class Evaluation(Section):
    """What tasks and models read to evaluate."""

    k_test: Count = option(128, "Retrieval: candidates reranked for each query; 0: none.")
    itc_weight: float = option(0.0, "Retrieval: weight of the similarity in the score. LAVIS: 1.")
    rerank_batch: Size = option(64, "Retrieval: pairs scored at once, which bounds memory.")
    feature_memory: Amount = option(
        16.0, "Retrieval: gigabytes of visual features held in memory, the rest on disk."
    )
    inference_method: Literal["rank", "generate"] = option(
        "rank", "Question answering: from an answer list, or by beam search."
    )
    num_ans_candidates: Size = option(128, "Answers that pass the first step of ranking.")
    num_beams: Size = option(3, "Beams of a beam search.")
    max_len: Size = option(10, "Most tokens of a text that a model writes. Captioning: 30.")
    min_len: Count = option(1, "Fewest tokens. Captioning: 5.")
    prompt: str = option("", "LAVIS's question answering: what precedes a question.")
    report_metric: bool = option(True, "False: write predictions and do not score them.")
    annotation_file: Text | None = option(None, "Read by some of LAVIS's tasks.")
    selection_metric: str | None = option(None, "Picks the best epoch; null: the task's own.")

    @classmethod
    def for_task(cls, task: str, run_cfg: Mapping[str, Any]) -> Self:
        """The settings in a ``run:`` section that LAVIS's own train script may have read."""
        return cls.pick(_with_task_defaults(run_cfg, task), "run")

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if self.min_len > self.max_len:
            raise ValueError(f"min_len {self.min_len} exceeds run.max_len {self.max_len}.")
        return self


class RunSection(Evaluation):
    """A run."""

    task: str = option(..., "Name of the task in LAVIS's registry.")
    runner: str = option(OURS, "Ours, `runner_base` or `runner_iter`.")
    evaluate: bool = option(False, "Test only.")
    output_dir: Text = option(..., "Folder of the run's folder; relative to the current one.")
    job_id: FolderName | None = option(None, "Name of the run's folder; null: the time.")
    cache_root: Text | None = option(None, "Where data lies; null: `$LAVIS_CACHE_ROOT` or `cache`.")
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = option(42, "Seed of all random numbers.")

    train_splits: Splits = option((), "Trained on.")
    valid_splits: Splits = option((), "Evaluated after each epoch; the first picks the best.")
    test_splits: Splits = option((), "Tested in the end.")
    batch_size_train: Size | None = option(None, "On each process. Needed to train.")
    batch_size_eval: Size = option(..., "On each process.")
    num_workers: Count = option(..., "Processes that read data, beside each training process.")
    check_files: bool = option(True, "Open every image and video before training starts.")
    use_dist_eval_sampler: bool = option(True, "Evaluate a share of each split on each process.")

    max_epoch: Size | None = option(None, "Epochs. Needed to train.")
    lr_sched: str | None = option(None, "LAVIS's schedule. Needed to train.")
    init_lr: Amount | None = option(None, "Learning rate after warm-up. Needed to train.")
    min_lr: Amount | None = option(None, "Learning rate at the end. Needed to train.")
    warmup_lr: Annotated[float, Field(ge=-1)] = option(-1.0, "At the first step; -1: `init_lr`.")
    warmup_steps: Count = option(0, "Steps of warm-up.")
    lr_decay_rate: Amount | None = option(None, "Factor of LAVIS's step schedule.")
    weight_decay: Amount | None = option(None, "Weight decay of AdamW. Needed to train.")
    weight_decay_on: Annotated[Literal["matrices", "all"], Ours] = option(
        "matrices", "What decays: matrices as in LAVIS, or all tensors as the authors do."
    )
    beta2: Annotated[float, Field(ge=0, lt=1)] = option(0.999, "Second coefficient of AdamW.")
    accum_grad_iters: Size = option(1, "Batches whose gradients make one step.")
    max_grad_norm: Annotated[Positive | None, Ours] = option(None, "Null: no clipping.")
    max_skipped_steps: Annotated[Size, Ours] = option(20, "Non-finite steps in a row, at most.")
    max_iters: Annotated[Size | None, Iter] = option(None, "Steps in all.")
    iters_per_inner_epoch: Annotated[Size | None, Iter] = option(None, "Between evaluations.")
    train_dataset_ratios: Annotated[dict[str, Amount] | None, Iter] = option(
        None, "How often each dataset is drawn from."
    )

    device: Literal["auto", "cpu", "cuda"] = option("auto", "`auto`: CUDA where there is any.")
    amp: Amp = option(None, "Mixed precision; `auto`: bf16 where the hardware has it.")
    matmul_precision: Literal["highest", "high"] = option("highest", "`high`: TF32 on CUDA.")
    compile: Annotated[bool, Ours] = option(False, "Compile the blocks of the visual encoder.")

    resume: Annotated[Literal["auto"] | None, ReadBy((OURS, "runner_base"))] = option(
        None, "`auto`: continue the unfinished run of the same configuration."
    )
    resume_ckpt_path: Text | None = option(None, "Checkpoint to continue from, or to test.")
    checkpoint_freq: Annotated[Count, Ours] = option(500, "Steps between checkpoints.")
    data_timeout: Annotated[Amount, Ours] = option(300.0, "Seconds to wait for a batch.")
    unreadable_threshold: Annotated[Share, Ours] = option(
        0.01, "Share of an epoch's items that may be unreadable."
    )
    log_freq: Size = option(50, "Steps between lines of the console.")

    distributed: bool = option(False, "Set by the launcher.")
    world_size: Size = option(1, "Number of processes.")
    dist_url: str = option("env://", "Address of the first process.")
    gpu: Count | None = option(None, "GPU of this process; set for LAVIS's runners.")
    rank: Count | None = option(None, "Number of this process; set for LAVIS's runners.")
    dist_backend: str | None = option(None, "Set by LAVIS.")

    @model_validator(mode="before")
    @classmethod
    def _fill_in_task_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        return _with_task_defaults(values, values.get("task"))

    @field_validator("amp")
    @classmethod
    def _name_amp(cls, amp: str | bool | None) -> str | None:
        return "fp16" if amp is True else amp or None

    @field_validator("resume_ckpt_path")
    @classmethod
    def _check_checkpoint(cls, path: str | None) -> str | None:
        if path and not os.path.isfile(path):
            raise ValueError(f"no file {shown(path)}.")
        return path or None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.evaluate and not self.test_splits:
            raise ValueError("test_splits is empty: there is nothing to evaluate on.")
        missing = [key for key in _TO_TRAIN if getattr(self, key) is None]
        if missing and not self.evaluate:
            raise ValueError(f"{missing[0]} is missing: training needs it.")
        if self.resume and self.resume_ckpt_path:
            raise ValueError("resume and run.resume_ckpt_path are both set; keep one of them.")
        given = {key: getattr(self, key) for key in self.model_fields_set}
        if problem := unread(given, self.runner):
            raise ValueError(problem)
        if self.runner == "runner_iter" and not self.evaluate:
            for key in ("max_iters", "iters_per_inner_epoch"):
                if getattr(self, key) is None:
                    raise ValueError(f"{key} is missing: runner_iter needs it.")
        return self

    def filled_in(self) -> dict[str, Any]:
        """The keys that the run's runner reads, each with its value."""
        skipped = {key for key, runners in _readers(type(self)) if self.runner not in runners}
        return self.model_dump(mode="json", exclude=skipped)


def _with_task_defaults(values: Mapping[str, Any], task: object) -> dict[str, Any]:
    defaults = TASK_DEFAULTS.get(task, {}) if isinstance(task, str) else {}
    return {**values, **{k: v for k, v in defaults.items() if values.get(k) is None}}


def unread(given: Mapping[str, Any], runner: str) -> str | None:
    """What a runner would skip or misread of a ``run:`` section, beginning with the key."""
    instead = f"Remove it, or set run.runner: {OURS}."
    for name, runners in _readers(RunSection):
        value = given.get(name)
        if runner not in runners and value is not None and value is not False:
            instead = f"Remove it, or set run.runner: {runners[0]}."
            return f"{name} is not read by {runner}. {instead}"
    if runner == OURS:
        return None
    if given.get("amp") not in (None, False, True, "fp16"):
        return f"amp is {given['amp']!r}, and {runner} would compute in fp16. {instead}"
    splits = given.get("valid_splits") or ()
    if splits and "val" not in splits:
        return (
            f"valid_splits is {list(splits)}, and {runner} saves the best epoch of the split 'val' "
            f"alone. {instead}"
        )
    return None


def _readers(section: type[Section]) -> Iterable[tuple[str, tuple[str, ...]]]:
    """The keys that only some runners read, and those runners."""
    for key, field in section.model_fields.items():
        for mark in field.metadata:
            if isinstance(mark, ReadBy):
                yield key, mark.runners
