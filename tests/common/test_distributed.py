"""Process groups that a caller has made."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from lavis_uniadapter.common import distributed


@pytest.fixture
def group():
    """The caller's own group, of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    distributed.destroy_process_group()


def exchanges_in(monkeypatch):
    """The groups in which objects are broadcast."""
    groups = []
    broadcast = dist.broadcast_object_list

    def note(objects, src, group=None):
        groups.append(group)
        return broadcast(objects, src, group)

    monkeypatch.setattr(dist, "broadcast_object_list", note)
    distributed.init_process_group("cpu")
    distributed.init_process_group("cpu")
    assert distributed.on_main_process(lambda: "done", errors=()) == "done"
    return groups


def test_a_group_of_the_caller_is_joined(group, monkeypatch):
    assert exchanges_in(monkeypatch) == [None]
    assert dist.group.WORLD is group


def test_numbers_are_exchanged_beside_a_group_of_nccl(group, monkeypatch):
    """Which would occupy a GPU while ranks wait for the main process."""
    made = []
    new_group = dist.new_group

    def note(**options):
        made.append(options)
        return new_group(**options)

    monkeypatch.setattr(dist, "new_group", note)
    monkeypatch.setattr(dist, "get_backend", lambda group=None: "nccl")
    (used,) = exchanges_in(monkeypatch)
    assert made == [{"backend": "gloo", "timeout": distributed.HOST_TIMEOUT}]
    assert used is not None and used is not group
    assert dist.group.WORLD is group
