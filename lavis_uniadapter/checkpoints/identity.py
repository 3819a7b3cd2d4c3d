"""What a result depends on besides configuration and trained weights: noted, and compared."""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from lavis_uniadapter.common.errors import CheckpointError
from lavis_uniadapter.common.schema.processors import VideoEval

logger = logging.getLogger(__name__)

RUN_CONFIG = "config.json"  # of a run's folder; LAVIS's runners write no identity into checkpoints
# Options of a visual processor that decide what a model sees, and the defaults of LAVIS's.
VISUAL_OPTIONS = ("image_size", "n_frms", "mean", "std")
_COLOURS = {name: list(VideoEval.model_fields[name].default) for name in ("mean", "std")}
IMAGE_SIZE = "eval.image_size"
# Evaluation at another size or with more frames is common: DiDeMo trains on 8 and tests on 16.
EVALUATION_MAY_DIFFER = (IMAGE_SIZE, "eval.n_frms")


class Source(BaseModel, extra="forbid"):
    """A name for people, and a hash of the content."""

    name: str
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.name!r} ({self.fingerprint[:8]})"


class Identity(BaseModel, extra="forbid"):
    """The parts that are known; others are not compared.

    Attributes:
        base: the frozen BLIP, if there is one.
        vocabulary: the tokenizer's words, in their order.
        processors: by mode and option, as in ``eval.image_size``, the values of all datasets.
        data: the training records, by dataset.
    """

    base: Source | None = None
    vocabulary: Source | None = None
    processors: dict[str, list[str]] = {}
    data: dict[str, Source] = {}


def hash_bytes(contents: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


def of_tokenizer(tokenizer: Any) -> Source:
    vocabulary = tokenizer.get_vocab()
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    content = hash_bytes([json.dumps(words).encode()])
    return Source(name=f"{len(words)} tokens", fingerprint=content)


def of_model(model: Any) -> Identity:
    """What a model, also one of LAVIS's own, knows of itself."""
    known = Identity()
    if getattr(model, "_frozen", None):
        known.base = Source(name=model.base_name, fingerprint=model.base_fingerprint)
    if hasattr(getattr(model, "tokenizer", None), "get_vocab"):  # LAVIS's CLIP has a function
        known.vocabulary = of_tokenizer(model.tokenizer)
    if hasattr(model, "section"):
        known.processors = {IMAGE_SIZE: [str(model.section.image_size)]}
    return known


def of_run(model: Any, config: Any, datasets: Mapping[str, Mapping[str, Any]]) -> Identity:
    """That of a run; one that evaluates has no training data, and only evaluation's processors."""
    known, evaluates = of_model(model), config.run_cfg.evaluate
    sections = config.to_dict()["datasets"].values()
    for mode in ("eval",) if evaluates else ("train", "eval"):
        given = [(section.get("vis_processor") or {}).get(mode) for section in sections]
        for name in VISUAL_OPTIONS:
            values = {str(p.get(name) or _COLOURS.get(name)) for p in given if p}
            if values - {"None"}:
                known.processors[f"{mode}.{name}"] = sorted(values - {"None"})
    for name, by_split in datasets.items() if not evaluates else ():
        records = getattr(by_split.get("train"), "annotation", None)
        if records is not None:
            content = hash_bytes(repr(record).encode() for record in records)
            known.data[name] = Source(name=f"{len(records)} records", fingerprint=content)
    return known


def of_checkpoint(path: str | Path) -> Identity:
    """What a run noted in a checkpoint or, with LAVIS's runners, beside it; of others, nothing."""
    if not (Path(path).is_file() and zipfile.is_zipfile(path)):
        return Identity()
    try:
        # mapped, so that no tensor is read
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
        noted = content.get("identity")
        beside = Path(path).with_name(RUN_CONFIG)
        if noted is None and "optimizer" in content and beside.is_file():
            config = json.loads(beside.read_bytes())
            noted = config.get("identity") if isinstance(config, dict) else None
        return Identity.model_validate(noted or {})
    except Exception as error:
        raise CheckpointError(
            f"'{path}' is not a checkpoint, or is damaged. Copy it again."
        ) from error


def check(
    saved: Identity, now: Identity, source: object, force: bool, may_differ: Collection[str] = ()
) -> None:
    """Compare what came from ``source`` with what it is used with now.

    Differences of ``may_differ`` are only logged, with ``force`` all of them. Otherwise the first
    raises CheckpointError, with both sides and the fix.
    """
    if saved == Identity():
        logger.warning(
            "'%s' does not say which base checkpoint and vocabulary it was trained with.", source
        )
    for what, theirs, ours, fix in _differences(saved, now):
        message = f"'{source}' was trained with another {what}: {theirs} then, {ours} now."
        if force or what in may_differ:
            logger.warning(message)
        else:
            raise CheckpointError(
                f"{message} {fix}, or set model.force=True (Python: force=True) to use it anyway."
            )


def _differences(saved: Identity, now: Identity) -> Iterator[tuple[str, object, object, str]]:
    """What differs, on both sides, and how to put it right."""
    parts = {"base checkpoint": ("base", "pretrained"), "vocabulary": ("vocabulary", "tokenizer")}
    for what, (part, key) in parts.items():
        theirs, ours = getattr(saved, part), getattr(now, part)
        if theirs and ours and theirs.fingerprint != ours.fingerprint:
            yield what, theirs, ours, f"Set model.{key} to the one that it was trained with"
    for key, values in now.processors.items():
        known = saved.processors.get(key, values)
        if not set(values) <= set(known):
            yield key, " and ".join(known), " and ".join(values), f"Set vis_processor.{key} back"
    for name in sorted({*saved.data, *now.data}) if saved.data and now.data else ():
        old, new = saved.data.get(name), now.data.get(name)
        if old != new:
            what = f"set of training records of {name}"
            yield what, old or "none", new or "none", "Restore the records, start a new run"
