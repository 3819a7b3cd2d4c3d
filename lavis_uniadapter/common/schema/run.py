"""``run:``: LAVIS's keys and those of this package."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from lavis_uniadapter.common.schema.section import (
    Amount,
    Count,
    Location,
    Positive,
    Section,
    Share,
    Size,
    Text,
    Texts,
    option,
    shown,
)

OURS, ITER = "runner_uniadapter", "runner_iter"
# Keys that only some runners read.
READ_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("checkpoint_freq", "compile", "data_timeout", "max_grad_norm"), (OURS,)),
    **dict.fromkeys(("max_skipped_steps", "unreadable_threshold", "weight_decay_on"), (OURS,)),
    **dict.fromkeys(("max_iters", "iters_per_inner_epoch", "train_dataset_ratios"), (ITER,)),
    "resume": (OURS, "runner_base"),
}
Amp = Literal["auto", "bf16", "fp16"]
Decayed = Literal["matrices", "all"]
Inference = Literal["rank", "generate"]
FolderName = Annotated[Text, Field(pattern=r"^[^/\\]+$")]
TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "uniadapter_retrieval": {"selection_metric": "mean_recall"},
    "video_qa": {"selection_metric": "accuracy"},
    "uniadapter_captioning": {"selection_metric": "cider", "max_len": 30, "min_len": 5},
    "captioning": {"max_len": 30, "min_len": 5},
}
TO_ITERATE = ("max_iters", "iters_per_inner_epoch")
TO_TRAIN = ("batch_size_train", "max_epoch", "lr_sched", "init_lr", "min_lr", "weight_decay")


class Evaluation(Section):
    """What tasks and models read to evaluate."""

    k_test: Count = option(128, "Retrieval: candidates reranked for each query; 0: none.")
    itc_weight: Annotated[float, Field(ge=0, le=1000)] = option(
        0.0, "Retrieval: weight of the similarity in the score. LAVIS: 1."
    )
    rerank_batch: Size = option(64, "Retrieval: pairs scored at once, which bounds memory.")
    feature_memory: Amount = option(16.0, "Retrieval: gigabytes of features kept off the disk.")
    inference_method: Inference = option("rank", "Answers: from a list, or by beam search.")
    num_ans_candidates: Size = option(128, "Answers that pass the first step of ranking.")
    num_beams: Size = option(3, "Beams of a beam search.")
    max_len: Size = option(10, "Most tokens of a text that a model writes. Captioning: 30.")
    min_len: Count = option(1, "Fewest tokens. Captioning: 5.")
    prompt: str = option("", "LAVIS's question answering: what precedes a question.")
    report_metric: bool = option(True, "False: write predictions and do not score them.")
    annotation_file: Location | None = option(None, "Read by some of LAVIS's tasks.")
    selection_metric: str | None = option(None, "Picks the best epoch; null: the task's own.")

    @classmethod
    def for_task(cls, task: str, run_cfg: Mapping[str, Any]) -> Self:
        """The settings in a ``run:`` section, which may be unchecked."""
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
    output_dir: Location = option(..., "Folder of the run's folder; relative to the current one.")
    job_id: FolderName | None = option(None, "Name of the run's folder; null: the time.")
    cache_root: Location | None = option(
        None, "Where data lies; null: `$LAVIS_CACHE_ROOT` or `cache`."
    )
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = option(42, "Seed of all random numbers.")

    train_splits: Texts = option((), "Trained on.")
    valid_splits: Texts = option((), "Evaluated after each epoch; the first picks the best.")
    test_splits: Texts = option((), "Tested in the end.")
    batch_size_train: Size | None = option(None, "On each process. Needed to train.")
    batch_size_eval: Size = option(..., "On each process.")
    num_workers: Count = option(..., "Processes that read data, for each training process.")
    check_files: bool = option(True, "Open every image and video before training starts.")
    use_dist_eval_sampler: bool = option(True, "Evaluate a share of each split on each process.")

    max_epoch: Size | None = option(None, "Epochs. Needed to train.")
    lr_sched: str | None = option(None, "LAVIS's schedule. Needed to train.")
    init_lr: Share | None = option(None, "Learning rate after warm-up. Needed to train.")
    min_lr: Share | None = option(None, "Learning rate at the end. Needed to train.")
    warmup_lr: Annotated[float, Field(ge=-1, le=1)] = option(
        -1.0, "At the first step; -1: `init_lr`."
    )
    warmup_steps: Count = option(0, "Steps of warm-up.")
    lr_decay_rate: Amount | None = option(None, "Factor of LAVIS's step schedule.")
    weight_decay: Amount | None = option(None, "Weight decay of AdamW. Needed to train.")
    weight_decay_on: Decayed = option("matrices", "`matrices`: as in LAVIS; `all`: as the authors.")
    beta2: Annotated[float, Field(ge=0, lt=1)] = option(0.999, "Second coefficient of AdamW.")
    accum_grad_iters: Size = option(1, "Batches whose gradients make one step.")
    max_grad_norm: Positive | None = option(None, "Null: no clipping.")
    max_skipped_steps: Size = option(20, "Non-finite steps in a row, at most.")
    max_iters: Size | None = option(None, "Steps in all.")
    iters_per_inner_epoch: Size | None = option(None, "Between evaluations.")
    train_dataset_ratios: dict[str, Amount] | None = option(None, "How often each is drawn from.")

    device: Literal["auto", "cpu", "cuda"] = option("auto", "`auto`: CUDA where there is any.")
    amp: Amp | None = option(None, "Mixed precision; `auto`: bf16 where the hardware has it.")
    matmul_precision: Literal["highest", "high"] = option("highest", "`high`: TF32 on CUDA.")
    compile: bool = option(False, "Compile the blocks of the visual encoder.")

    resume: Literal["auto"] | None = option(None, "`auto`: continue the same configuration's run.")
    resume_ckpt_path: Location | None = option(None, "Checkpoint to continue from, or to test.")
    checkpoint_freq: Count = option(500, "Steps between checkpoints.")
    data_timeout: Amount = option(300.0, "Seconds to wait for a batch.")
    unreadable_threshold: Share = option(0.01, "Share of an epoch's items that may be unreadable.")
    log_freq: Size = option(50, "Steps between lines of the console.")

    distributed: bool = option(False, "Set by the launcher.")
    world_size: Size = option(1, "Number of processes.")
    dist_url: str = option("env://", "Address of the first process.")

    @model_validator(mode="before")
    @classmethod
    def _fill_in_task_defaults(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return _with_task_defaults(values, values.get("task"))

    @field_validator("amp", mode="before")
    @classmethod
    def _name_amp(cls, amp: Any) -> Any:
        return {True: "fp16", False: None}[amp] if isinstance(amp, bool) else amp

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
        given = {key: getattr(self, key) for key in self.model_fields_set}
        if problem := unread(given, self.runner):
            raise ValueError(problem)
        if self.resume and self.resume_ckpt_path:
            raise ValueError("resume and run.resume_ckpt_path are both set; keep one of them.")
        needed = () if self.evaluate else TO_TRAIN + TO_ITERATE * (self.runner == ITER)
        for key in needed:
            if getattr(self, key) is None:
                raise ValueError(f"{key} is missing: training needs it.")
        return self

    def filled_in(self) -> dict[str, Any]:
        """The keys that the run's runner reads, each with its value."""
        skipped = {key for key, runners in READ_BY.items() if self.runner not in runners}
        return self.model_dump(mode="json", exclude=skipped)


def _with_task_defaults(values: Mapping[str, Any], task: object) -> dict[str, Any]:
    defaults = TASK_DEFAULTS.get(task, {}) if isinstance(task, str) else {}
    return {**values, **{k: v for k, v in defaults.items() if values.get(k) is None}}


def unread(given: Mapping[str, Any], runner: str) -> str | None:
    """What a runner would skip or misread of a ``run:`` section, beginning with the key."""
    for name, runners in READ_BY.items():
        value = given.get(name)
        if runner not in runners and value is not None and value is not False:
            return f"{name} is not read by {runner}. Remove it, or set run.runner: {runners[0]}."
    if runner == OURS:
        return None
    instead = f"Remove it, or set run.runner: {OURS}."
    if given.get("amp") not in (None, False, True, "fp16"):
        return f"amp is {given['amp']!r}, and {runner} would compute in fp16. {instead}"
    splits = given.get("valid_splits") or ()
    if splits and "val" not in splits:
        return (
            f"valid_splits is {list(splits)}, and {runner} saves the best epoch of the split 'val' "
            f"alone. {instead}"
        )
    return None
