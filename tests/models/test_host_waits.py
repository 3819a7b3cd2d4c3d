"""What the host asks of the device in a training step: on a GPU it would wait for each answer."""

from __future__ import annotations

import pytest
import torch
from small_models import VQA, batch
from torch.profiler import ProfilerActivity, profile

from lavis_uniadapter.common.host_copy import HostCopy
from lavis_uniadapter.runners.epoch import EpochProgress

# Operations whose result, or its shape, PyTorch hands to the host.
READS = (
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::bincount"),
    *("aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::equal"),
)
# On a GPU none of these reads from it: data are prepared on the host, a fused optimizer keeps its
# step counts on the device, and an assertion is checked there.
ON_THE_HOST = ("enumerate(DataLoader)", "Optimizer.step", "aten::_assert_async")


@pytest.fixture
def copies(monkeypatch):
    """The tensors that are read through a HostCopy."""
    read = []
    tolist = HostCopy.tolist
    monkeypatch.setattr(HostCopy, "tolist", lambda copy: read.append(copy) or tolist(copy))
    return read


def reads_of(work) -> list[str]:
    """Operations by which the host reads from the device, each with what called it."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    reads = []
    for event in seen.events():
        callers = []
        while event is not None:
            callers.append(event.name)
            event = event.cpu_parent
        if callers[0] in READS and not any(c.startswith(ON_THE_HOST) for c in callers):
            reads.append(" < ".join(callers))
    return reads


@pytest.mark.parametrize("same_video", [False, True])
def test_retrieval_reads_once_how_its_pairs_are_laid_out(
    build_model, video_batch, copies, same_video
):
    model = build_model().train()
    if same_video:
        video_batch["image_id"][:] = 0
    assert reads_of(lambda: model(video_batch).loss.backward()) == []
    assert len(copies) == 1


def test_answering_reads_nothing(build_small, copies):
    model = build_small(VQA).train()
    assert reads_of(lambda: model(batch(VQA)).loss.backward()) == []
    assert copies == []


@pytest.mark.parametrize("amp", ["null", "fp16"])
def test_a_step_of_the_runner_reads_what_became_of_the_one_before(run, copies, amp):
    options = ("run.test_splits=[]", "run.valid_splits=[]", "run.batch_size_train=2")
    runner = run("shapes_retrieval", *options, f"run.amp={amp}", "run.max_epoch=1").runner
    reads, copied = [], []
    for first_step in (3, 4):  # of six; the losses of the first one are logged
        copies.clear()
        reads.append(reads_of(lambda: runner.train_epoch(EpochProgress(1, first_step))))  # noqa: B023
        copied.append(len(copies))
    assert len(reads[0]) == len(reads[1]), reads[0]  # those of an epoch, not of a step
    # the layout of the step's pairs, and the outcome of the step before
    assert copied == [2 * 3, 2 * 2]
    assert torch.isfinite(next(iter(runner.optimizer.state.values()))["exp_avg"]).all()
