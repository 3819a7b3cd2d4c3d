"""Emoji as a benchmark: captioned stills by several artists, and animated clips by another one."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence
from tqdm.contrib.concurrent import thread_map

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.datasets.records import listing
from lavis_uniadapter.datasets.shapes.drawing import write_mp4
from lavis_uniadapter.processors.animations import on_white
from lavis_uniadapter.processors.images import images_read_whole
from lavis_uniadapter.tools.prepare.emoji import card, packages, start

# Concepts with a clip that are tested and never trained on, that are tested and trained on as
# stills alone, and that validate the training on clips; the others train it.
UNSEEN, SHARED, VALIDATION = 250, 400, 150
# Stills of one artist that validate the training on stills; other artists' show the same concepts.
STILLS_VALIDATION = 200
STILL_SIZE, CLIP_SIZE = 64, 256
STILL_FRAMES = 12  # of a clip that does not move
KEYWORDS = 4  # in a caption; a step takes twice as long with all of them


@dataclass(frozen=True)
class Concept:
    """An emoji: its code points, name and keywords (CLDR)."""

    code: str
    label: str
    tags: tuple[str, ...]

    def record(self, shown: Mapping[str, str], caption: str) -> dict[str, str]:
        """A record of custom data. Pictures of one concept match the same texts."""
        return {**shown, "caption": caption, "image_id": self.code}

    def training_records(self, shown: Mapping[str, str]) -> list[dict[str, str]]:
        """One with the name and, if there are any, one with keywords that the picture decides."""
        keywords = ranked(self.tags, self.code, *shown.values())[:KEYWORDS]
        captions = self.label, ", ".join(keywords)
        return [self.record(shown, caption) for caption in captions if caption]


def prepare(args: argparse.Namespace) -> int:
    """Write stills, clips, their annotations, a starting point and a data card; print a report.

    Raises:
        ConfigError: packages are missing, or the output folder exists.
    """
    found = packages.find(args.packages)
    output = Path(args.output)
    if output.exists():
        raise ConfigError(f"{output} exists. Delete it, or name another --output.")
    concepts = read_concepts(found["emojibase-data"])
    pictures = packages.stills(found)
    clips = {code: path for code, path in packages.clips(found).items() if code in concepts}
    split_of = split_concepts(clips, args.seed)
    moving = sum(map(packages.moves, clips.values()))
    partial_output = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial_output, ignore_errors=True)
    try:
        start.write(found[packages.MINILM], partial_output / "start", args.seed)
        annotations = _stills(concepts, pictures, split_of, args.seed, partial_output)
        annotations |= _clips(concepts, clips, split_of, partial_output)
        for name, records in annotations.items():
            lines = "".join(f"{json.dumps(record)}\n" for record in records)
            (partial_output / f"{name}.jsonl").write_text(lines, encoding="ascii")
        card.write(partial_output, found, annotations, moving, args.seed)
        partial_output.rename(output)
    except BaseException:
        shutil.rmtree(partial_output, ignore_errors=True)
        raise
    print((output / card.FILE).read_text(encoding="utf-8"))
    print(
        f"next, in the folder that holds {output.name}/:\n  uniadapter prepare frames --videos "
        f"{output.name}/clips --output {output.name}/frames --frames 16 --image-size 64\n"
        "  uniadapter compare emoji_methods --jobs 2  # trains the small BLIP, then all methods"
    )
    return 0


def read_concepts(emojibase: Path) -> dict[str, Concept]:
    """The emoji by their code points, without flags, skin tones and other components."""
    groups = json.loads((emojibase / "meta/groups.json").read_bytes())["groups"]
    used = {int(order) for order, name in groups.items() if name not in ("flags", "component")}
    concepts = {}
    for entry in json.loads((emojibase / "en/data.json").read_bytes()):
        if entry.get("group") in used:
            # a keyword may be a sign, such as "*", which is no caption
            words = tuple(tag for tag in entry.get("tags", ()) if any(map(str.isalnum, tag)))
            code = packages.code_of(entry["hexcode"])
            concepts[code] = Concept(code, entry["label"], words)
    return concepts


def ranked(items: Iterable[str], *source: object) -> list[str]:
    """Items in an order that depends on them and the ``source`` alone."""
    prefix = " ".join(map(str, source))
    return sorted(items, key=lambda item: hashlib.sha256(f"{prefix} {item}".encode()).digest())


def split_concepts(codes: Iterable[str], seed: int) -> dict[str, str]:
    """The split of each concept that has a clip: test_unseen, test, val or train.

    Raises:
        ConfigError: there are too few concepts.
    """
    order = ranked(codes, seed, "clips")
    borders = np.cumsum([UNSEEN, SHARED, VALIDATION])
    if len(order) <= borders[-1]:
        raise ConfigError(
            f"The packages have clips of {len(order)} emoji, and the splits need more than "
            f"{borders[-1]}. Unpack all packages again."
        )
    names = ("test_unseen", "test", "val", "train")
    split = np.searchsorted(borders, np.arange(len(order)), side="right")
    return {code: names[number] for code, number in zip(order, split, strict=True)}


def _stills(
    concepts: Mapping[str, Concept],
    pictures: Mapping[str, Mapping[str, Path]],
    split_of: Mapping[str, str],
    seed: int,
    output: Path,
) -> dict[str, list[dict[str, str]]]:
    """Write the stills of all concepts but the unseen ones; returns their records by file name."""
    usable = [code for code in concepts if split_of.get(code) != "test_unseen"]
    drawn = [(code, artist) for code in usable for artist in pictures if code in pictures[artist]]
    several = [code for code in usable if sum(code in by_code for by_code in pictures.values()) > 1]
    held_out = {
        # the artist changes from concept to concept
        (code, ranked((a for a in pictures if code in pictures[a]), seed, code)[0])
        for code in ranked(several, seed, "stills")[:STILLS_VALIDATION]
    }
    records: dict[str, list[dict[str, str]]] = {"stills_train": [], "stills_val": []}
    jobs = []
    for code, artist in drawn:
        concept, name = concepts[code], f"{artist}/{code}.png"
        jobs.append((pictures[artist][code], output / "stills" / name))
        if (code, artist) in held_out:
            records["stills_val"].append(concept.record({"image": name}, concept.label))
        else:
            records["stills_train"] += concept.training_records({"image": name})
    _each(_write_still, jobs, "stills")
    return records


def _clips(
    concepts: Mapping[str, Concept],
    clips: Mapping[str, Path],
    split_of: Mapping[str, str],
    output: Path,
) -> dict[str, list[dict[str, str]]]:
    """Write the clips; returns their records by file name."""
    records: dict[str, list[dict[str, str]]] = {
        f"clips_{split}": [] for split in ("train", "val", "test", "test_unseen")
    }
    for code, split in sorted(split_of.items()):
        concept, shown = concepts[code], {"video": f"{code}.mp4"}
        records[f"clips_{split}"] += (
            concept.training_records(shown)
            if split == "train"
            else [concept.record(shown, concept.label)]
        )
    jobs = [(path, output / "clips" / f"{code}.mp4") for code, path in clips.items()]
    _each(_write_clip, jobs, "clips")
    return records


def _each(write: Callable[[Path, Path], None], jobs: list[tuple[Path, Path]], title: str) -> None:
    """Write files, several at a time. ConfigError names what cannot be read."""
    for folder in {target.parent for _, target in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
    run = partial(_reason, write)
    with images_read_whole():
        reasons = thread_map(run, *zip(*jobs, strict=True), max_workers=os.cpu_count(), desc=title)
    if failures := [reason for reason in reasons if reason]:
        raise ConfigError(f"Unpack the packages again; these cannot be read:{listing(failures)}")


def _reason(write: Callable[[Path, Path], None], source: Path, target: Path) -> str | None:
    try:
        write(source, target)
    except (OSError, ValueError) as error:
        return f"{source}: {error}"
    return None


def _write_still(source: Path, target: Path) -> None:
    with packages.open_picture(source, STILL_SIZE) as image:
        on_white(image, STILL_SIZE).save(target)


def _write_clip(source: Path, target: Path) -> None:
    with Image.open(source) as image:
        frames = [
            (np.asarray(on_white(frame, CLIP_SIZE)), frame.info.get("duration", 0))
            for frame in ImageSequence.Iterator(image)
        ]
    if len(frames) == 1:
        frames *= STILL_FRAMES
    milliseconds = np.mean([duration for _, duration in frames]) or 1000 / STILL_FRAMES
    write_mp4(target, np.stack([picture for picture, _ in frames]), 1000 / float(milliseconds))
