"""A training step of retrieval on video: seconds and peak memory, and other ways to compute it.

``ours``: this package. ``as released``: the same step of the same model as the authors' released
code computes it: a copied momentum backbone that is averaged every step, keys and values projected
for each pair, softmax attention written out. ``lavis full``: LAVIS's ``blip_retrieval``, all
weights trained, the frames' tokens in a row. Forward, backward and AdamW; BLIP base in float32.
``ours, bf16``: ours under autocast (``amp: bf16``), beside the machine's bf16 limit.

Each runs in a process of its own, so that its peak memory is its own. Ours and the released way
are checked to have the same gradients (at ``--check-batch``).
"""

from __future__ import annotations

import contextlib
import copy
import json
import resource
import signal
import statistics
import subprocess
import sys
from unittest import mock

import torch
from lavis.models.vit import Attention
from torch import nn

from benchmarks import measuring
from benchmarks.arithmetic import Text, Vision
from benchmarks.models import lavis_retrieval, our_retrieval, random_captions
from lavis_uniadapter.backbone.text import SdpaCrossAttention
from lavis_uniadapter.backbone.vision import SdpaAttention, encode_frames

PEERS = ("ours", "ours, bf16", "as released", "lavis full")
IMAGE_SIZE = 224
TEXT_LENGTH = 12.0


class WrittenOutCrossAttention(SdpaCrossAttention):
    """Cross-attention whose probabilities are a tensor of their own."""

    def forward(self, hidden_states, *args, encoder_hidden_states=None, **kwargs):
        memory = encoder_hidden_states if encoder_hidden_states is not None else args[2]
        query = self.transpose_for_scores(self.query(hidden_states))
        probs, values = memory.attention_map(self, query)
        context = (self.dropout(probs) @ values).transpose(1, 2).flatten(2)
        return context, None


class FramesInARow(nn.Module):
    """A ViT that gives the tokens of all frames of a video, as LAVIS's retrieval reads tokens."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit = vit

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return encode_frames(self.vit, video).flatten(1, 2)

    forward_features = forward  # LAVIS calls the one or the other


def as_released(model):
    """Change our model, in place, so that it computes a step as the released code does."""
    model.momentum_copy = copy.deepcopy(model)
    model.momentum_copy.requires_grad_(False)
    for module in [*model.modules()]:
        if type(module) is SdpaAttention:
            module.__class__ = Attention
        elif type(module) is SdpaCrossAttention:
            module.__class__ = WrittenOutCrossAttention

    momentum = model.section.momentum

    def update() -> None:
        pairs = zip(
            [p for n, p in model.named_parameters() if not n.startswith("momentum_copy.")],
            model.momentum_copy.parameters(),
            strict=True,
        )
        with torch.no_grad():
            for parameter, average in pairs:
                average.data = average.data * momentum + parameter.data * (1 - momentum)

    @contextlib.contextmanager
    def swapped_in():
        """Inside, encoding is done by the copy."""
        with (
            torch.no_grad(),
            mock.patch.object(model, "encode_visual", model.momentum_copy.encode_visual),
            mock.patch.object(model, "encode_text", model.momentum_copy.encode_text),
        ):
            yield

    match_hidden = model.match_hidden

    def match_pair_by_pair(texts, memory, visual_index, frame_feat):
        """A memory of its own for each pair."""
        own = model.text_encoder.encoder.project(memory.states[visual_index])
        alone = torch.arange(len(visual_index))
        return match_hidden(texts, own, alone, frame_feat[visual_index])

    model.momentum_average.update = update
    model.momentum_average.swapped_in = swapped_in
    model.match_hidden = match_pair_by_pair
    return model


def batch_of(number: int, frames: int, device: str) -> dict:
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(number, 3, frames, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return {
        "image": video.to(device),  # where LAVIS looks
        "text_input": random_captions(number, 0),
        "image_id": torch.arange(number, device=device),
        "epoch": 1,
        "iters": 0,
        "num_iters_per_epoch": 2,
    }


def build_peer(peer: str, frames: int, device: str):
    if peer != "lavis full":
        model = our_retrieval(IMAGE_SIZE, frame_aware=frames > 1, device=device)
        return as_released(model) if peer == "as released" else model
    model = lavis_retrieval(IMAGE_SIZE, device=device)
    model.visual_encoder = FramesInARow(model.visual_encoder)
    model.visual_encoder_m = FramesInARow(model.visual_encoder_m)
    model.model_pairs[0] = [model.visual_encoder, model.visual_encoder_m]
    return model


def run_peer(peer: str, number: int, frames: int, steps: int, device: str) -> dict:
    """Time steps in this process; its seconds, and its peak memory in bytes."""
    model = build_peer(peer, frames, device).train()
    batch = batch_of(number, frames, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)

    def step() -> None:
        with measuring.autocast(peer.endswith("bf16"), device):
            loss = model(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if device == "cuda":
        step()
        torch.cuda.reset_peak_memory_stats()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken = [measuring.seconds(step, device) for _ in range(steps)]
    peak = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {"seconds": taken, "peak_bytes": peak, "bytes_before_first_step": before * 1024}


def check_equal_gradients(number: int, frames: int, device: str) -> float:
    """Largest difference of a gradient, relative to the largest gradient of its tensor."""
    gradients = []
    for peer in ("ours", "as released"):
        model = build_peer(peer, frames, device).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        torch.manual_seed(0)
        model(batch_of(number, frames, device))["loss"].backward()
        gradients.append({n: p.grad for n, p in model.trainable_parameters().items()})
        del model
    worst = 0.0
    largest = max(g.abs().max().item() for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        scale = max(gradient.abs().max().item(), 1e-4 * largest)
        worst = max(worst, (gradient - gradients[1][name]).abs().max().item() / scale)
    return worst


def gflop(peer: str, number: int, frames: int, length: float) -> float:
    """Forward passes, and backward at once (inputs alone) or twice (weights as well) as much."""
    vision, text = Vision(), Text()
    tokens = frames * vision.tokens(IMAGE_SIZE)
    encode = number * frames * vision.encode(IMAGE_SIZE) + number * text.attend(length, 0) * 0.8
    pairs = 3 * number
    memories = number if peer.startswith("ours") else pairs
    match = memories * text.keys_and_values(tokens) + pairs * text.attend(length, tokens)
    backward = 2 if peer == "lavis full" else 1
    return encode + (encode + match) * (1 + backward)


def run_interleaved(
    number: int, frames: int, repeats: int, device: str
) -> tuple[dict[str, list[dict]], dict[str, str]]:
    """Run each peer in turn, each time in a process of its own.

    Returns:
        By peer what each of its processes measured, and by peer that failed (a batch may not fit
        this machine's memory) how it did; the others go on.
    """
    runs: dict[str, list[dict]] = {peer: [] for peer in PEERS}
    failures: dict[str, str] = {}
    for _ in range(repeats):
        for peer in PEERS:
            if peer in failures:
                continue
            command = [sys.executable, "-m", "benchmarks.training_step", "--peer", peer]
            command += ["--batches", str(number), "--frames", str(frames), "--device", device]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                runs[peer].append(json.loads(done.stdout.splitlines()[-1]))
            elif done.returncode == -signal.SIGKILL:
                failures[peer] = "killed by the system, as it does when memory runs out"
            else:
                failures[peer] = (done.stderr.splitlines() or [f"exit {done.returncode}"])[-1]
    return runs, failures


def measure(number: int, args) -> dict:
    """All peers at one batch size."""
    with measuring.Limits(args.device, bf16=True) as limits:
        runs, failures = run_interleaved(number, args.frames, args.repeats, args.device)
    peers: dict[str, dict] = {peer: {"failed": why} for peer, why in failures.items()}
    for peer in runs.keys() - failures.keys():
        # the last step of a process: the first also allocates
        seconds = statistics.median(result["seconds"][-1] for result in runs[peer])
        needed = gflop(peer, number, args.frames, TEXT_LENGTH)
        peers[peer] = {
            "seconds": seconds,
            "runs": [result["seconds"] for result in runs[peer]],
            "peak_gigabytes": statistics.median(r["peak_bytes"] for r in runs[peer]) / 1e9,
            "gflop": needed,
            "share_of_limit": limits.share(peer, needed, seconds),
        }
    case = {"batch": number, "frames": args.frames, **limits.rates}
    case["peers"] = {peer: peers[peer] for peer in PEERS}
    if number == args.check_batch:
        worst = check_equal_gradients(number, args.frames, args.device)
        case["largest_relative_gradient_difference"] = worst
    return case


def report(case: dict) -> None:
    print(f"\nB = {case['batch']}, {case['frames']} frames of {IMAGE_SIZE} px")
    rows = []
    for peer, about in case["peers"].items():
        if "failed" in about:
            rows.append((peer, about["failed"], "", "", ""))
        else:
            share = f"{100 * about['share_of_limit']:.0f}%"
            rows.append((peer, about["seconds"], about["peak_gigabytes"], about["gflop"], share))
    measuring.print_table(("peer", "seconds", "peak GB", "GFLOP", "share of limit"), rows)
    if (worst := case.get("largest_relative_gradient_difference")) is not None:
        print(f"largest relative difference of a gradient, ours and as released: {worst:.1e}")


def main() -> None:
    options = measuring.parser(__doc__)
    options.add_argument("--batches", nargs="+", type=int, default=[2, 4, 8])
    options.add_argument("--frames", type=int, default=8)
    options.add_argument("--check-batch", type=int, default=2, help="check gradients at this size")
    options.add_argument("--peer", choices=PEERS, help="internal: time one peer in this process")
    args = options.parse_args()
    if args.peer:
        (number,) = args.batches
        print(json.dumps(run_peer(args.peer, number, args.frames, 2, args.device)))
        return
    for number in args.batches:
        case = measure(number, args)
        report(case)
        path = measuring.save_case("training_step", case, "batch", args.device, args.output)
    print("written:", path)


if __name__ == "__main__":
    main()
