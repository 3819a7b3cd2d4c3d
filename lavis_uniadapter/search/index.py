"""An index of images and videos: build it, bring it up to date, search it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from lavis_uniadapter.backbone.features import TextFeatures, VisualFeatures
from lavis_uniadapter.common.atomic import atomic
from lavis_uniadapter.common.config import read_yaml, validate
from lavis_uniadapter.common.distributed import (
    choose_device,
    init_process_group,
    on_main_process,
)
from lavis_uniadapter.common.errors import CheckpointError, ConfigError
from lavis_uniadapter.runners.run_folders import FolderInUse, sole_user
from lavis_uniadapter.search.engine import Engine, TokenCache, batches
from lavis_uniadapter.search.hits import Candidate, Hit, Stage, moments
from lavis_uniadapter.search.indexing import Summary, Work, compare, describe_difference, update
from lavis_uniadapter.search.manifest import FILE, Manifest, StoredSegment
from lavis_uniadapter.search.reading import image_clip, read_segment
from lavis_uniadapter.search.store import Store, open_store
from lavis_uniadapter.tools import recipes

RECIPE = "recipe.yaml"
ADAPTER = "adapter"
WINDOW = 10.0
RERANK = 32
MAX_TEXT = 1000  # characters of a query
_ERRORS = (ConfigError, CheckpointError, FolderInUse, FileNotFoundError)


class Index:
    """Images and segments of videos below a folder, searched by text or image.

    ``Index.build`` and ``Index.open`` make one. The index keeps the recipe and the adapter that it
    was built with; the base weights stay where they are. Queries of several threads wait for each
    other.

    Attributes:
        folder: of the index.
        root: the folder that it is of.
        engine: the model.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        store: Store,
        engine: Engine,
        token_cache: float = 1.0,
    ):
        self.folder = folder
        self.engine = engine
        self.manifest = manifest
        self.store = store
        self.root = Path(manifest.about["root"])
        self._tokens = TokenCache(token_cache)
        self._lock = threading.Lock()

    # --- building ---------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        folder: str | os.PathLike,
        source: str | os.PathLike,
        cfg: str | os.PathLike | None = None,
        options: Sequence[str] = (),
        *,
        adapter: str | os.PathLike | None = None,
        store: str = "numpy",
        window: float = WINDOW,
        workers: int = 2,
        timeout: float = 120,
    ) -> Summary:
        """Build an index, or bring it up to date. Under torchrun every process encodes a share.

        Args:
            folder: of the index; made if it does not exist.
            source: folder of images and videos. For an index that exists, the folder it is of or
                one below that, outside of which nothing is looked at.
            cfg: name or file of a retrieval recipe. None: the one that the index was built with.
            options: ``section.key=value`` over the recipe.
            adapter: folder of a trained adapter.
            store: ``numpy``, ``milvus`` or ``milvus:URI``.
            window: seconds of a segment.
            workers: processes that read files.
            timeout: seconds that a file may take before it counts as unreadable.

        Raises:
            ConfigError, CheckpointError: naming what is wrong; also if the index was built with
                another model, adapter, processor, store or window.
            FolderInUse: if another process changes the index.
        """
        folder, source = Path(folder).expanduser(), Path(source).expanduser().resolve()
        if not source.is_dir():
            raise ConfigError(f"There is no folder '{source}'.")
        if window <= 0:
            raise ConfigError(f"The window is {window:g} s; it must be more than 0.")
        if cfg is None:
            Manifest(folder).close()  # or the error that there is none
            recipe, adapter = folder / RECIPE, adapter or _adapter_of(folder)
        else:
            recipe = recipes.find(str(cfg), recipes.runs())
        device = validate(recipe, [*options, "run.evaluate=True"])["run"]["device"]
        init_process_group(choose_device(device))
        engine = Engine.from_config(recipe, options, adapter)
        asked = {"store": store, "window": window, "fingerprint": engine.fingerprint()}
        with contextlib.ExitStack() as held:
            opened: list[Any] = [None, None]

            def prepare() -> tuple[Path, Work]:
                held.enter_context(sole_user(folder))
                if not (folder / FILE).is_file():
                    _keep(folder, recipe, options, adapter)
                manifest = Manifest(folder, {"root": str(source), **asked, "collection": _name()})
                held.callback(manifest.close)
                root = _check_same(folder, source, manifest.about, asked)
                vectors = _open_store(folder, manifest, engine)
                held.callback(vectors.close)
                manifest.recover(vectors)
                opened[:] = manifest, vectors
                return root, compare(manifest, root, source)

            root, work = on_main_process(prepare, errors=_ERRORS)
            options_of_reading = {"window": window, "workers": workers, "timeout": timeout}
            return update(*opened, engine, work, root, **options_of_reading)

    @classmethod
    def open(cls, folder: str | os.PathLike, *, token_cache: float = 1.0) -> Index:
        """Open an index to search it.

        Args:
            folder: of the index.
            token_cache: gigabytes of visual tokens of recent results that are kept in memory.

        Raises:
            ConfigError, CheckpointError: if it is damaged, or the base weights, tokenizer or
                adapter are no longer those that it was built with.
        """
        folder = Path(folder).expanduser()
        manifest = Manifest(folder)
        if not (folder / RECIPE).is_file():
            raise ConfigError(
                f"The index in '{folder}' is incomplete: {RECIPE} is missing. Delete the folder "
                "and build the index again."
            )
        init_process_group("cpu")
        engine = Engine.from_config(folder / RECIPE, adapter=_adapter_of(folder))
        _check_fingerprint(folder, manifest.about, engine.fingerprint())
        return cls(folder, manifest, _open_store(folder, manifest, engine), engine, token_cache)

    def close(self) -> None:
        """Release files and connections."""
        self.store.close()
        self.manifest.close()

    def __len__(self) -> int:
        return self.manifest.counts()[1]

    # --- searching --------------------------------------------------------------------------------

    def query(
        self,
        text: str | None = None,
        *,
        image: Image.Image | None = None,
        like: int | None = None,
        top: int = 10,
        rerank: int = RERANK,
        min_probability: float = 0.0,
    ) -> list[Hit]:
        """Search by a text, an image, or a segment of the index.

        Args:
            text: scored in two stages: similarity, then the matching head.
            image: upright and RGB (``processors.images.read_image``); by similarity alone.
            like: id of a segment; by similarity alone.
            top: hits at most.
            rerank: candidates that the matching head judges; 0: none.
            min_probability: hits of text that match with less are left out.

        Raises:
            ConfigError: for no query or several, an empty or very long text, or an unknown segment.
        """
        for stage in self.stages(
            text,
            image=image,
            like=like,
            top=top,
            rerank=rerank,
            min_probability=min_probability,
        ):
            hits = stage.hits
        return hits

    def stages(
        self,
        text: str | None = None,
        *,
        image: Image.Image | None = None,
        like: int | None = None,
        top: int = 10,
        rerank: int = RERANK,
        min_probability: float = 0.0,
    ) -> Iterator[Stage]:
        """``query``, step by step: the shortlist, progress of matching, and the result."""
        if sum(given is not None for given in (text, image, like)) != 1:
            raise ConfigError("Search by one of: a text, an image, a segment of the index.")
        if top < 1 or rerank < 0:
            raise ConfigError(f"top is {top} and rerank {rerank}; both must be positive.")
        encoded: TextFeatures | None = None
        with self._lock:
            if text is not None:
                encoded = self.engine.encode_text(_checked(text))
                vector = encoded.feat[0]
            elif image is not None:
                clip = image_clip(image, self.engine.visual.image_size)
                vector = self.engine.encode(clip).feat[0]
            else:
                vector = self.segment(int(like or 0)).feat.float()
        candidates = self._shortlist(vector, max(4 * top, rerank))
        reranked = rerank if encoded is not None else 0
        if not reranked:
            yield Stage("done", moments(candidates, vector, self.root, top))
            return
        yield Stage("shortlist", moments(candidates, vector, self.root, top))
        judged: list[Candidate] = []
        total = min(reranked, len(candidates))
        for some in batches(candidates[:total], self.engine.batch_size):
            with self._lock:
                judged += self._match(encoded, some)
            yield Stage("matching", [], len(judged), total)
        likely = [c for c in judged if (c.probability or 0) >= min_probability]
        rest = candidates[total:] if min_probability == 0 else []
        ordered = sorted([*likely, *rest], key=lambda c: c.order)
        ranked = [replace(candidate, rank=rank) for rank, candidate in enumerate(ordered)]
        yield Stage("done", moments(ranked, vector, self.root, top), total, total)

    def segment(self, number: int) -> StoredSegment:
        """A segment by its id.

        Raises:
            ConfigError: if there is none.
        """
        found = self.manifest.segments([number]) if number < 2**63 else []
        if not found:
            raise ConfigError(f"The index has no segment {number}.")
        return found[0]

    def _shortlist(self, vector: Tensor, number: int) -> list[Candidate]:
        ids, similarities = self.store.search(vector, number)
        by_id = dict(zip(ids, similarities, strict=True))
        stored = self.manifest.segments(ids)
        return [Candidate(rank, s, by_id[s.id]) for rank, s in enumerate(stored)]

    def _match(self, text: TextFeatures | None, some: Sequence[Candidate]) -> list[Candidate]:
        """Judge candidates by the matching head; one whose file is gone stays as it is."""
        features = {c.stored.id: self._features(c.stored) for c in some}
        readable = [c for c in some if features[c.stored.id] is not None]
        judged = {}
        by_frames: dict[int, list[Candidate]] = {}
        for candidate in readable:
            by_frames.setdefault(len(candidate.stored.segment.times), []).append(candidate)
        for group in by_frames.values():
            visuals = _stack([features[c.stored.id] for c in group], self.engine.model.device)
            scores = self.engine.match(text, visuals)
            for i, candidate in enumerate(group):
                judged[candidate.stored.id] = replace(
                    candidate,
                    ranking=float(scores.ranking[i]),
                    probability=float(scores.probability[i]),
                )
        return [judged.get(c.stored.id, c) for c in some]

    def _features(self, stored: StoredSegment) -> VisualFeatures | None:
        """Visual tokens of a segment, from the cache or its file; None if that cannot be read."""
        if (known := self._tokens.get(stored.id)) is not None:
            return known
        try:
            clip = read_segment(self.root / stored.file, stored.segment, self.engine.visual)
        except (RuntimeError, ValueError, OSError):
            return None  # it was readable when it was indexed; the next update lists it
        encoded = self.engine.encode(clip)
        self._tokens.put(stored.id, encoded)
        return encoded


def _stack(features: Sequence[VisualFeatures | None], device: torch.device) -> VisualFeatures:
    present = [f for f in features if f is not None]
    return VisualFeatures(
        *(
            torch.cat([getattr(f, name).float().to(device) for f in present])
            for name in ("embeds", "feat", "frame_feat")
        )
    )


def _checked(text: str) -> str:
    if not text.strip():
        raise ConfigError("The query is empty.")
    if len(text) > MAX_TEXT:
        raise ConfigError(f"The query has {len(text)} characters; {MAX_TEXT} is the most.")
    return text


def _keep(
    folder: Path, recipe: Path, options: Sequence[str], adapter: str | os.PathLike | None
) -> None:
    """Keep the recipe and the adapter in the index."""
    content = read_yaml(recipe, options)
    for key in ("pretrained", "tokenizer", "med_config_path"):
        path = (content.get("model") or {}).get(key)
        if path and os.path.exists(path):  # relative to the current folder
            content["model"][key] = os.path.abspath(path)
    with atomic(folder / RECIPE) as temporary:
        OmegaConf.save(OmegaConf.create(content), temporary)
    shutil.rmtree(folder / ADAPTER, ignore_errors=True)
    if adapter:
        shutil.copytree(adapter, folder / ADAPTER)


def _adapter_of(folder: Path) -> Path | None:
    return folder / ADAPTER if (folder / ADAPTER).is_dir() else None


def _name() -> str:
    return f"uniadapter_{secrets.token_hex(8)}"


def _open_store(folder: Path, manifest: Manifest, engine: Engine) -> Store:
    about = manifest.about
    return open_store(about["store"], folder, engine.model.embed_dim, about["collection"])


def _check_same(folder: Path, source: Path, about: dict[str, Any], asked: dict[str, Any]) -> Path:
    """The root of an index, if it was built with what is asked for now."""
    root = Path(about["root"])
    if source != root and root not in source.parents:
        raise ConfigError(
            f"The index in '{folder}' is of '{root}', and '{source}' is not inside. Name another "
            "--index."
        )
    for key in ("store", "window"):
        if about[key] != asked[key]:
            raise ConfigError(
                f"The index in '{folder}' was built with {key} {about[key]}, not {asked[key]}. "
                f"Give --{key} {about[key]}, or delete the folder and build the index anew."
            )
    _check_fingerprint(folder, about, asked["fingerprint"])
    return root


def _check_fingerprint(folder: Path, about: dict[str, Any], now: dict[str, str]) -> None:
    if different := describe_difference(about["fingerprint"], now):
        raise ConfigError(
            f"The index in '{folder}' was built with another {different}. Build it anew: delete "
            f"the folder, and run: uniadapter search index {about['root']} --index {folder} ..."
        )
