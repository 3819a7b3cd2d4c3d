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
UNSCORED = -50  # scores of pairs that were not scored are below


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


class Peers:
    """The peers of a case, on the same weights and features; each returns its seconds."""

    def __init__(self, frames: int, image_size: int, args):
        self.args, self.device, self.frames = args, args.device, frames
        self.ours = our_retrieval(image_size, frame_aware=frames > 1, device=self.device)
        self.theirs = lavis_retrieval(image_size, device=self.device)
        same_blip(self.ours, self.theirs)
        self.encoding, self.cosine = time_encoding(
            self.ours, frames, image_size, args.repeats, self.device
        )
        generator = torch.Generator().manual_seed(args.seed)
        self.tokens = frames * Vision().tokens(image_size)
        self.embeds = torch.randn(args.gallery, self.tokens, 768, generator=generator)
        give_features(self.ours, self.theirs, self.embeds, frames)
        self.loader = DataLoader(Gallery(args.gallery, args.seed), batch_size=8)
        picker = random.Random(args.seed)
        self.sample = [
            (picker.randrange(args.gallery), picker.randrange(args.gallery))
            for _ in range(args.sampled_pairs)
        ]
        # pairs that LAVIS and the released code score
        self.asked = 2 * args.gallery * args.k
        self.pairs: dict[str, int] = {}  # that ours score
        self.scores: dict[str, object] = {}

    def lavis(self) -> float:
        seconds, pairs, self.scores["lavis"] = lavis_share(
            self.theirs, self.loader, self.args.k, self.args.shares, self.device
        )
        return seconds * self.asked / pairs

    def pair_by_pair(self) -> float:
        seconds, self.scores["pair by pair"] = pair_by_pair(
            *(self.ours, self.embeds, self.frames, self.loader.dataset.text),
            *(self.sample, self.device),
        )
        return seconds * self.asked / len(self.sample)

    def rerank(self, name: str, itc_weight: float = 0.0) -> float:
        seconds, self.pairs[name], self.scores[name] = timed_rerank(
            self.ours, self.loader, self.args.k, itc_weight, self.device
        )
        return seconds

    def ours_off(self) -> float:
        with self.ours.disable_adapter():
            return self.rerank("ours, adapters off", itc_weight=1.0)

    def ours_bf16(self) -> float:
        with measuring.autocast(True, self.device):
            return self.rerank("ours, bf16")

    def time(self) -> dict[str, dict]:
        """Seconds of each peer, by name."""
        peers = {
            "lavis": self.lavis,
            "ours, adapters off": self.ours_off,
            "pair by pair": self.pair_by_pair,
            "ours": lambda: self.rerank("ours"),
            "ours, bf16": self.ours_bf16,
        }
        return measuring.interleaved(peers, self.args.repeats)

    def gflop(self, text_tokens: float) -> dict[str, float]:
        """What each peer's shapes need."""
        text, tokens = Text(), self.tokens
        project, attend = text.keys_and_values(tokens), text.attend(text_tokens, tokens)
        adapted = attend + text.adapters(text_tokens)
        per_pair = project + text.attend(PADDED_LENGTH, tokens)
        gallery = self.args.gallery
        once = gallery * (project + text.key_value_adapter(tokens))
        return {
            "lavis": self.asked * per_pair,
            "ours, adapters off": gallery * project + self.pairs["ours, adapters off"] * attend,
            "pair by pair": self.asked * (per_pair + text.adapters(PADDED_LENGTH)),
            "ours": once + self.pairs["ours"] * adapted,
            "ours, bf16": once + self.pairs["ours, bf16"] * adapted,
        }

    def differences(self) -> dict[str, float]:
        """Largest differences of scores that peers share."""
        off, lavis = self.scores["ours, adapters off"], self.scores["lavis"]
        against_lavis = [np.abs(a - b)[b > UNSCORED].max() for a, b in zip(off, lavis, strict=True)]
        every_pair = timed_rerank(self.ours, self.loader, self.args.gallery, 0.0, self.device)[2][0]
        against_pairs = [
            abs(float(every_pair[visual, text]) - score)
            for (text, visual), score in zip(self.sample, self.scores["pair by pair"], strict=True)
        ]
        ours, bf16 = self.scores["ours"][0], self.scores["ours, bf16"][0]
        both = (ours > UNSCORED) & (bf16 > UNSCORED)
        return {
            "lavis against ours, adapters off": float(max(against_lavis)),
            "pair by pair against ours": max(against_pairs),
            "ours, bf16, against ours": float(np.abs(bf16 - ours)[both].max()),
        }


def run_case(name: str, args) -> dict:
    case = CASES[name]
    peers = Peers(**case, args=args)
    with measuring.Limits(args.device, bf16=True) as limits:
        seconds = peers.time()
    texts = peers.loader.dataset.text
    text_tokens = sum(map(len, peers.ours.tokenizer(texts).input_ids)) / len(texts)
    gflop = peers.gflop(text_tokens)
    median = {peer: taken["median"] for peer, taken in seconds.items()}
    scores = peers.scores["ours"][0]
    return {
        "case": name,
        "gallery": args.gallery,
        "k": args.k,
        **case,
        "visual_tokens": peers.tokens,
        "mean_text_tokens": text_tokens,
        "pairs_asked_for": peers.asked,
        "pairs_scored_by_ours": peers.pairs["ours"],
        "gflop": gflop,
        **limits.rates,
        "rerank_seconds": seconds,
        "encode_seconds_per_visual": peers.encoding[False],
        "bf16_encode_seconds_per_visual": peers.encoding[True],
        "bf16_feature_cosine": peers.cosine,
        "largest_score_difference": peers.differences(),
        "score_standard_deviation": float(scores[scores > UNSCORED].std()),
        "share_of_limit": {
            peer: limits.share(peer, gflop[peer], taken) for peer, taken in median.items()
        },
        "faster": {
            "ours, adapters off, than lavis": median["lavis"] / median["ours, adapters off"],
            "ours than pair by pair": median["pair by pair"] / median["ours"],
            "ours, bf16, than ours": median["ours"] / median["ours, bf16"],
        },
        "whole_evaluation_seconds": {
            peer: taken + args.gallery * peers.encoding[peer.endswith("bf16")]
            for peer, taken in median.items()
        },
    }


def report(case: dict) -> None:
    print(f"\n{case['case']}: gallery {case['gallery']}, k {case['k']}", end=", ")
    print(f"{case['visual_tokens']} visual tokens")
    measuring.print_table(
        ("peer", "rerank s", "GFLOP", "share of limit", "with encoding s"),
        [
            (
                *(peer, seconds["median"], case["gflop"][peer]),
                f"{100 * case['share_of_limit'][peer]:.0f}%",
                case["whole_evaluation_seconds"][peer],
            )
            for peer, seconds in case["rerank_seconds"].items()
        ],
    )
    print(
        f"encoding one: {case['encode_seconds_per_visual']:.3g} s, in bf16 "
        f"{case['bf16_encode_seconds_per_visual']:.3g} s "
        f"(cosine of the features {case['bf16_feature_cosine']:.6f})"
    )
    for what, factor in case["faster"].items():
        print(f"{what}: {factor:.1f} times as fast")
    print("largest difference of a score:", case["largest_score_difference"])


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
        report(case)
        path = measuring.save_case("retrieval_evaluation", case, "case", args.device, args.output)
    print("\nwritten:", path)


if __name__ == "__main__":
    main()
