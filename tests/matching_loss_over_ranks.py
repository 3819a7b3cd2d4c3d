"""Run by models/test_training_step.py under torchrun: each rank holds one item of a batch of two.

Arguments: a model file (torch.save of configuration and state), and where to write the result.
"""

import sys

import torch
import torch.distributed as dist
from lavis.common.registry import registry
from omegaconf import OmegaConf

import lavis_uniadapter  # noqa: F401
from lavis_uniadapter.common.distributed import init_process_group


def main(model_file: str, result_file: str) -> None:
    init_process_group("cpu")
    rank = dist.get_rank()
    content = torch.load(model_file, weights_only=True)
    cls = registry.get_model_class("blip_uniadapter_retrieval")
    model = cls.from_config(OmegaConf.create(content["config"]))
    model.load_state_dict(content["state"])
    model.train()
    ids = torch.arange(2)[rank : rank + 1].view(1, 1)
    tokens = model.tokenize(content["text_input"][rank : rank + 1], "max_length")
    visuals = model.encode_visual(content["video"][rank : rank + 1])
    loss, _ = model._matching_loss(visuals, model.encode_text(tokens), ids)
    loss.backward()
    gradients = {n: p.grad for n, p in model.trainable_parameters().items() if p.grad is not None}
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    dist.all_reduce(loss)
    if rank == 0:
        torch.save({"loss": loss.detach() / 2, "gradients": gradients}, result_file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
