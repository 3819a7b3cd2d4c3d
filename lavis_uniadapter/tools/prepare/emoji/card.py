"""The data card of the emoji benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lavis_uniadapter.common.atomic import write_text
from lavis_uniadapter.tools.prepare.emoji.packages import PACKAGES

FILE = "README.md"
_CARD = """# Emoji: captioned stills and clips

Stills of emoji by {artists} artists, on white, and clips of emoji by another artist. Captions
are the names and keywords of the Unicode consortium (CLDR), in English. Made by
`uniadapter prepare emoji --seed {seed}`.

| Annotations | Files | Concepts | Records |
|---|---:|---:|---:|
{rows}

A concept is an emoji without skin tone; flags are left out. Of the {clips} clips, {moving}
move; the others show a still.

* `stills_train.jsonl` trains a base. A still has two captions: its name, and up to four of its
  keywords.
* `stills_val.jsonl` has one artist's stills of concepts whose other stills are trained on.
* `clips_train.jsonl` and `clips_val.jsonl` adapt the base to clips.
* `clips_test.jsonl`: concepts that training stills show and training clips do not.
* `clips_test_unseen.jsonl`: concepts that no training still and no training clip shows. Parts
  of their names occur in training: "woman running" and "person running" are two concepts.

In validation and test the caption is the name. `start/` holds BERT's vocabulary and a small
BLIP: its text encoder has layers of MiniLM, its other weights are random.

| Source | Content | Licence |
|---|---|---|
{sources}

The pictures and clips keep these licences. Name the authors where you show them.
"""


def write(
    folder: Path,
    packages: Mapping[str, Path],
    annotations: Mapping[str, Sequence[Mapping[str, str]]],
    moving: int,
    seed: int,
) -> None:
    """Write what the data is, how it is split and whose it is."""
    rows = [
        f"| `{name}.jsonl` | {len({r.get('image', r.get('video')) for r in records})} "
        f"| {len({r['image_id'] for r in records})} | {len(records)} |"
        for name, records in annotations.items()
    ]
    sources = [f"| {n} | {PACKAGES[n].content} | {PACKAGES[n].licence} |" for n in packages]
    text = _CARD.format(
        artists=sum(PACKAGES[name].artist is not None for name in packages),
        seed=seed,
        rows="\n".join(rows),
        clips=sum(1 for _ in (folder / "clips").iterdir()),
        moving=moving,
        sources="\n".join(sources),
    )
    write_text(folder / FILE, text)
