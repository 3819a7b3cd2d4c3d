"""Two-stage retrieval evaluation: ours beside LAVIS's, and beside a loop over pairs.

``lavis``: LAVIS's own ``compute_sim_matrix`` on LAVIS's ``BlipRetrieval``; ``ours, adapters off``:
the same scores by this package, on the same weights; ``pair by pair``: our model with its adapters,
every pair alone, texts padded to 35 tokens; ``ours``: the same scores by this package; ``ours,
bf16``: under autocast (``amp: bf16``), encoding included, beside the machine's bf16 limit.

Visual features are random and given, so that reranking alone is timed: of LAVIS the calls of its
cross-modal encoder, of ours everything in the second stage. The two slow peers work on a share of
the queries, whose cost does not depend on the gallery, and are extrapolated to all of them.
Encoding is timed on real frames and added for the whole evaluation.
"""

from __future__ import annotations

import random
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from lavis.models.med import XBertEncoder
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, Dataset

from benchmarks import measuring
from benchmarks.arithmetic import Text, Vision
from benchmarks.models import lavis_retrieval, our_retrieval, random_captions, same_blip
from lavis_uniadapter.backbone.features import TextFeatures, VisualFeatures
from lavis_uniadapter.backbone.visual_memory import VisualMemory
from lavis_uniadapter.evaluation import two_stage

CASES = {
    "image384": {"frames": 1, "image_size": 384},
    "video8": {"frames": 8, "image_size": 224},
    "video16": {"frames": 16, "image_size": 224},
}
PADDED_LENGTH = 35  # of LAVIS's evaluation


class Gallery(Dataset):
    """A gallery whose visual inputs are their own index; the features are kept elsewhere."""

    def __init__(self, number: int, seed: int):
        self.text = random_captions(number, seed)
        self.image = list(range(number))
        self.annotation = [{"image": i} for i in self.image]

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> dict:
        return {"image": torch.full((3, 1, 1), float(index)), "index": index}


def give_features(ours, theirs, embeds: torch.Tensor, frames: int) -> None:
    """Make models (theirs may be None) look features up instead of encoding pixels."""

    def look_up(image):
        return embeds[image[:, 0, 0, 0].long().cpu()].to(image.device)

    def encode_visual(image):
        chosen = look_up(image)
        feat = F.normalize(ours.apply_head("vision_proj", chosen[:, 0]), dim=-1)
        per_frame = chosen.view(len(chosen), frames, -1, chosen.shape[-1])[:, :, 0]
        return VisualFeatures(
            chosen, feat, F.normalize(ours.apply_head("vision_proj", per_frame), dim=-1)
        )

    ours.encode_visual = encode_visual
    if theirs is not None:
        theirs.visual_encoder.forward_features = look_up


def lavis_share(theirs, loader, k: int, shares: int, device: str):
    """Seconds that LAVIS's cross-modal encoder takes for one of `shares` parts of the queries."""
    taken = []
    original = XBertEncoder.forward

    def timed(self, *args, **kwargs):
        if kwargs.get("encoder_hidden_states") is None:
            return original(self, *args, **kwargs)
        measuring.synchronise(device)
        started = time.perf_counter()
        output = original(self, *args, **kwargs)
        measuring.synchronise(device)
        taken.append((time.perf_counter() - started, len(args[0])))
        return output

    with (
        torch.no_grad(),
        mock.patch.object(XBertEncoder, "forward", timed),
        mock.patch("lavis.models.albef_models.dist_utils.get_world_size", lambda: shares),
        mock.patch(
            "lavis.models.albef_models.dist_utils.is_dist_avail_and_initialized", lambda: False
        ),
        mock.patch("builtins.print"),
    ):
        scores = theirs.compute_sim_matrix(loader, OmegaConf.create({"k_test": k}))
    return sum(t for t, _ in taken), sum(n for _, n in taken), scores


def timed_rerank(model, loader, k: int, itc_weight: float, device: str):
    """Seconds of our second stage, the pairs that it scores, and the scores."""
    taken = {}
    original = two_stage._rerank

    def rerank(scorer, gallery, chosen, rerank_batch):
        result = []
        taken["seconds"] = measuring.seconds(
            lambda: result.append(original(scorer, gallery, chosen, rerank_batch)), device
        )
        taken["pairs"] = int(chosen.sum())
        return result[0]

    cfg = OmegaConf.create({"k_test": k, "itc_weight": itc_weight, "rerank_batch": 64})
    with mock.patch.object(two_stage, "_rerank", rerank):
        scores = model.compute_sim_matrix(loader, cfg)
    return taken["seconds"], taken["pairs"], scores


@torch.no_grad()
def pair_by_pair(model, embeds, frames: int, texts: list[str], pairs, device: str):
    """Scores of (text, visual) pairs, each computed alone, and the seconds."""
    tokens = model.tokenizer(
        texts, padding="max_length", truncation=True, max_length=PADDED_LENGTH, return_tensors="pt"
    ).to(device)
    feat = model.encode_text(tokens).feat
    scores = []
    measuring.synchronise(device)
    started = time.perf_counter()
    for text, visual in pairs:
        states = embeds[visual][None].to(device)
        per_frame = states.view(1, frames, -1, states.shape[-1])[:, :, 0]
        one = TextFeatures(
            tokens.input_ids[text][None], tokens.attention_mask[text][None], None, feat[text][None]
        )
        memory: VisualMemory = model.text_encoder.encoder.project(states)
        frame_feat = F.normalize(model.apply_head("vision_proj", per_frame), dim=-1)
        hidden = model.match_hidden(one, memory, torch.zeros(1, dtype=torch.long), frame_feat)
        scores.append(model.apply_head("itm_head", hidden[:, 0])[0, 1].item())
    measuring.synchronise(device)
    return time.perf_counter() - started, scores


@torch.no_grad()
def time_encoding(model, frames: int, image_size: int, repeats: int, device: str):
    """Seconds that one visual input takes in float32 (False) and in bf16 (True), interleaved.

    The other value is the mean cosine of the features of its frames between the two.
    """
    generator = torch.Generator().manual_seed(0)
    visual = torch.randn(1, 3, frames, image_size, image_size, generator=generator).to(device)
    features = {}

    def encode(bf16: bool) -> None:
        with measuring.autocast(bf16, device):
            features[bf16] = model.encode_visual(visual).frame_feat

    for bf16 in (False, True):
        encode(bf16)
    works = {
        bf16: lambda bf16=bf16: measuring.seconds(lambda: encode(bf16), device)
        for bf16 in (False, True)
    }
    taken = measuring.interleaved(works, repeats)
    cosine = (features[False] * features[True]).sum(dim=-1).mean().item()
    return {bf16: about["median"] for bf16, about in taken.items()}, cosine


def run_case(name: str, args) -> dict:
    case = CASES[name]
    frames, image_size = case["frames"], case["image_size"]
    device = args.device
    ours = our_retrieval(image_size, frame_aware=frames > 1, device=device)
    theirs = lavis_retrieval(image_size, device=device)
    same_blip(ours, theirs)
    tokens = frames * Vision().tokens(image_size)
    generator = torch.Generator().manual_seed(args.seed)
    embeds = torch.randn(args.gallery, tokens, 768, generator=generator)
    loader = DataLoader(Gallery(args.gallery, args.seed), batch_size=8)
    texts = loader.dataset.text
    lengths = [len(ids) for ids in ours.tokenizer(texts).input_ids]

    encoding, cosine = time_encoding(ours, frames, image_size, args.repeats, device)
    give_features(ours, theirs, embeds, frames)
    picker = random.Random(args.seed)
    sample = [
        (picker.randrange(args.gallery), picker.randrange(args.gallery))
        for _ in range(args.sampled_pairs)
    ]
    seen = SimpleNamespace()
    asked = 2 * args.gallery * args.k  # pairs that LAVIS and the released code score

    def run_lavis() -> float:
        taken, pairs, seen.lavis = lavis_share(theirs, loader, args.k, args.shares, device)
        return taken * asked / pairs

    def run_ours_off() -> float:
        with ours.disable_adapter():
            taken, seen.pairs, seen.off = timed_rerank(ours, loader, args.k, 1.0, device)
        return taken

    def run_pairs() -> float:
        taken, seen.alone = pair_by_pair(ours, embeds, frames, texts, sample, device)
        return taken * asked / len(sample)

    def run_ours() -> float:
        taken, seen.pairs_on, seen.on = timed_rerank(ours, loader, args.k, 0.0, device)
        return taken

    def run_ours_bf16() -> float:
        with measuring.autocast(True, device):
            taken, seen.pairs_bf16, seen.bf16 = timed_rerank(ours, loader, args.k, 0.0, device)
        return taken

    peers = {
        "lavis": run_lavis,
        "ours, adapters off": run_ours_off,
        "pair by pair": run_pairs,
        "ours": run_ours,
        "ours, bf16": run_ours_bf16,
    }
    rate = measuring.matmul_rate(device)
    bf16_rate = measuring.matmul_rate(device, torch.bfloat16)
    times = measuring.interleaved(peers, args.repeats)
    rate = (rate + measuring.matmul_rate(device)) / 2
    bf16_rate = (bf16_rate + measuring.matmul_rate(device, torch.bfloat16)) / 2

    text = Text()
    mean_length = sum(lengths) / len(lengths)
    needed = args.gallery * text.keys_and_values(tokens) + seen.pairs * text.attend(
        mean_length, tokens
    )
    needed_on, needed_bf16 = (
        args.gallery * (text.keys_and_values(tokens) + text.key_value_adapter(tokens))
        + pairs * (text.attend(mean_length, tokens) + text.adapters(mean_length))
        for pairs in (seen.pairs_on, seen.pairs_bf16)
    )
    per_pair = text.keys_and_values(tokens) + text.attend(PADDED_LENGTH, tokens)
    processed = [scores > -50 for scores in seen.lavis]
    differences = [
        float(np.abs(a[chosen] - b[chosen]).max())
        for a, b, chosen in zip(seen.off, seen.lavis, processed, strict=True)
    ]
    visual_to_text = timed_rerank(ours, loader, args.gallery, 0.0, device)[2][0]  # every pair
    differences_on = max(
        abs(float(visual_to_text[v, t]) - score)
        for (t, v), score in zip(sample, seen.alone, strict=True)
    )
    both = (seen.on[0] > -50) & (seen.bf16[0] > -50)
    result = {
        "case": name,
        "gallery": args.gallery,
        "k": args.k,
        "frames": frames,
        "image_size": image_size,
        "visual_tokens": tokens,
        "mean_text_tokens": mean_length,
        "pairs_asked_for": asked,
        "pairs_scored_by_ours": seen.pairs,
        "gflop": {
            "lavis": asked * per_pair,
            "ours, adapters off": needed,
            "pair by pair": asked * (per_pair + text.adapters(PADDED_LENGTH)),
            "ours": needed_on,
            "ours, bf16": needed_bf16,
        },
        "matmul_gflop_per_s": rate,
        "bf16_matmul_gflop_per_s": bf16_rate,
        "rerank_seconds": times,
        "encode_seconds_per_visual": encoding[False],
        "bf16_encode_seconds_per_visual": encoding[True],
        "bf16_feature_cosine": cosine,
        "largest_score_difference": {
            "lavis against ours, adapters off": max(differences),
            "pair by pair against ours": differences_on,
            "ours, bf16, against ours": float(np.abs(seen.bf16[0] - seen.on[0])[both].max()),
        },
        "score_standard_deviation": float(seen.on[0][both].std()),
    }
    result["share_of_limit"] = {
        peer: result["gflop"][peer]
        / (bf16_rate if peer.endswith("bf16") else rate)
        / times[peer]["median"]
        for peer in peers
    }
    result["faster"] = {
        "ours, adapters off, than lavis": times["lavis"]["median"]
        / times["ours, adapters off"]["median"],
        "ours than pair by pair": times["pair by pair"]["median"] / times["ours"]["median"],
        "ours, bf16, than ours": times["ours"]["median"] / times["ours, bf16"]["median"],
    }
    whole = {
        peer: t["median"] + args.gallery * encoding[peer.endswith("bf16")]
        for peer, t in times.items()
    }
    result["whole_evaluation_seconds"] = whole
    print(f"\n{name}: gallery {args.gallery}, k {args.k}, {tokens} visual tokens")
    measuring.print_table(
        ("peer", "rerank s", "GFLOP", "share of limit", "with encoding s"),
        [
            (
                *(peer, times[peer]["median"], result["gflop"][peer]),
                *(f"{100 * result['share_of_limit'][peer]:.0f}%", whole[peer]),
            )
            for peer in peers
        ],
    )
    print(f"encoding one: {encoding[False]:.3g} s, in bf16 {encoding[True]:.3g} s", end="")
    print(f" (cosine of the features {cosine:.6f})")
    for what, factor in result["faster"].items():
        print(f"{what}: {factor:.1f} times as fast")
    print("largest difference of a score:", result["largest_score_difference"])
    return result


def main() -> None:
    options = measuring.parser(__doc__)
    options.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options.add_argument("--gallery", type=int, default=32, help="visual inputs, and as many texts")
    options.add_argument("--k", type=int, default=16)
    options.add_argument("--shares", type=int, default=16, help="LAVIS works on one of so many")
    options.add_argument("--sampled-pairs", type=int, default=24)
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    for name in args.cases:
        case = run_case(name, args)
        path = measuring.save_case("retrieval_evaluation", case, "case", args.device, args.output)
    print("\nwritten:", path)


if __name__ == "__main__":
    main()
