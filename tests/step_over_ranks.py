"""Run by test_number_faults.py: gradients of a step, half a batch on each of two ranks.

Arguments: a model file (torch.save of configuration, state and batch), and a folder for the result.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from forked_ranks import in_ranks
from lavis.common.registry import registry
from omegaconf import OmegaConf
from torch.nn.parallel import DistributedDataParallel

import lavis_uniadapter  # noqa: F401
from lavis_uniadapter.common.distributed import destroy_process_group, init_process_group


def step(model_file: str) -> None:
    init_process_group("cpu")
    rank = dist.get_rank()
    content = torch.load(model_file, weights_only=True)
    cls = registry.get_model_class("blip_uniadapter_retrieval")
    model = cls.from_config(OmegaConf.create(content["config"]))
    model.load_state_dict(content["state"])
    wrapped = DistributedDataParallel(model.train(), broadcast_buffers=False)
    part = slice(2 * rank, 2 * rank + 2)
    torch.manual_seed(rank)
    wrapped(
        {
            "video": content["video"][part],
            "text_input": content["text_input"][part],
            "image_id": torch.arange(4)[part],
            **{"epoch": 1, "iters": 1, "num_iters_per_epoch": 4},
        }
    ).loss.backward()
    gradients = {name: p.grad for name, p in model.trainable_parameters().items()}
    torch.save(gradients, f"gradients{rank}.pt")
    del wrapped
    destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)  # nothing but this thread, when processes are forked
    in_ranks(2, lambda: step(sys.argv[1]), Path(sys.argv[2]))
