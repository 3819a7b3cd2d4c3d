"""Sizes of what is saved: adapter folders and a runner's checkpoint, of BLIP base with queues.

A checkpoint holds what trains, its moving averages and queues, and AdamW's two moments; LAVIS's of
full fine-tuning holds BLIP, its momentum copy and the moments of all weights.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks import measuring
from benchmarks.models import build, lavis_retrieval

MODELS = {
    "retrieval": ("blip_uniadapter_retrieval", "msrvtt"),
    "vqa": ("blip_uniadapter_vqa", "msrvtt_qa"),
    "caption": ("blip_uniadapter_caption", "msrvtt"),
}
BOTTLENECKS = (128, 512)


def megabytes(content: dict) -> float:
    """Size on disk of what torch.save writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pth"
        torch.save(content, path)
        return path.stat().st_size / 1e6


def checkpoint_megabytes(model) -> float:
    """A checkpoint as runners write it: the state but for frozen parameters, and the optimizer."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    state = {k: v for k, v in model.state_dict().items() if k not in frozen}
    return megabytes({"model": state, "optimizer": optimizer.state_dict()})


def row(name: str, model, adapter: float | None) -> dict:
    return {
        "model": name,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "adapter_megabytes": adapter,
        "checkpoint_megabytes": checkpoint_megabytes(model),
    }


def adapter_megabytes(model) -> float:
    with tempfile.TemporaryDirectory() as folder:
        model.save_adapter(Path(folder) / "adapter")
        return sum(path.stat().st_size for path in Path(folder).rglob("*.*")) / 1e6


def main() -> None:
    args = measuring.parser(__doc__).parse_args()
    rows = []
    for name, (arch, model_type) in MODELS.items():
        for bottleneck in BOTTLENECKS:
            model = build(arch, model_type, args.device, adapter={"bottleneck": bottleneck})
            rows.append(row(f"{name}, r={bottleneck}", model, adapter_megabytes(model)))
            del model
    theirs = lavis_retrieval(224, device=args.device, queue_size=57600)
    rows.append(row("LAVIS blip_retrieval, full", theirs, None))
    measuring.print_table(
        ("model", "trained", "adapter MB", "checkpoint MB"), [list(r.values()) for r in rows]
    )
    result = {"machine": measuring.machine(args.device), "sizes": rows}
    print("written:", measuring.save("saved_sizes", result, args.output))


if __name__ == "__main__":
    main()
