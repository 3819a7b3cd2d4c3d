"""An index of images and videos: build it, bring it up to date, search it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lavis_uniadapter.backbone.features import TextFeatures, VisualFeatures
from lavis_uniadapter.common.config import validate
from lavis_uniadapter.common.distributed import (
    choose_device,
    init_process_group,
    on_main_process,
)
from lavis_uniadapter.common.errors import CheckpointError, ConfigError
from lavis_uniadapter.runners.run_folders import FolderInUse, sole_user
from lavis_uniadapter.search.building import (
    DEFAULTS,
    RECIPE,
    adapter_of,
    check_arguments,
    check_fingerprint,
    check_same,
    check_store,
    clear,
    given_of,
    keep,
    new_collection,
    open_own_store,
    rebuild_command,
)
from lavis_uniadapter.search.engine import Engine, TokenCache, batches
from lavis_uniadapter.search.hits import Candidate, Hit, Stage, moments
from lavis_uniadapter.search.indexing import Summary, Work, compare, update
from lavis_uniadapter.search.manifest import FILE, Manifest, StoredSegment
from lavis_uniadapter.search.reading import image_clip, read_segment
from lavis_uniadapter.search.store import Store
from lavis_uniadapter.tools import recipes

RERANK = 32
_STEP = 8  # candidates that are judged together, at most
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
        store: str | None = None,
        window: float | None = None,
        workers: int = 2,
        timeout: float = 120,
        rebuild: bool = False,
    ) -> Summary:
        """Build an index, or bring it up to date. Under torchrun every process encodes a share.

        Args:
            folder: of the index; made if it does not exist.
            source: folder of images and videos. For an index that exists, the folder it is of or
                one below that, outside of which nothing is looked at.
            cfg: name or file of a retrieval recipe. None: the one that the index was built with.
            options: ``section.key=value`` over the recipe.
            adapter: folder of a trained adapter.
            store: ``numpy``, ``milvus`` or ``milvus:URI``. None: as built, ``numpy`` at first.
            window: seconds of a segment. None: as built, 10 at first.
            workers: processes that read files. 0: this process reads them, and a file at which
                the decoder crashes or hangs stops it.
            timeout: seconds without a new segment after which the file being read counts as
                unreadable.
            rebuild: start anew, with another model or other options if these are given.

        Raises:
            ConfigError, CheckpointError: naming what is wrong; also if the index was built with
                another model, adapter, processor, store or window.
            FolderInUse: if another process changes the index.
        """
        folder, source = Path(folder).expanduser(), Path(source).expanduser().resolve()
        check_arguments(source, window)
        command = rebuild_command(folder, source, cfg, adapter, store, window, options)
        if cfg is None:
            if not (rebuild and (folder / RECIPE).is_file()):
                Manifest(folder).close()  # or the error that there is none
            recipe, adapter = folder / RECIPE, adapter or adapter_of(folder)
        else:
            recipe = recipes.find(str(cfg), recipes.runs())
        device = validate(recipe, [*options, "run.evaluate=True"])["run"]["device"]
        init_process_group(choose_device(device))
        engine = Engine(recipe, options, adapter)
        asked = {"store": store, "window": window, "fingerprint": engine.fingerprint()}
        with contextlib.ExitStack() as held:
            opened: list[Any] = [None, None]  # on the other ranks

            def prepare() -> tuple[dict[str, Any], Work]:
                held.enter_context(sole_user(folder))
                built = clear(folder, engine) if rebuild else {}
                if not (folder / FILE).is_file():
                    keep(folder, engine)
                about = {"root": str(source), **DEFAULTS, **built, **given_of(asked)}
                manifest = Manifest(folder, {**about, "collection": new_collection()})
                held.callback(manifest.close)
                check_same(folder, source, manifest.about, given_of(asked), command)
                vectors = open_own_store(folder, manifest.about, engine, create=True)
                held.callback(vectors.close)
                manifest.recover(vectors)
                check_store(folder, manifest, vectors)
                opened[:] = manifest, vectors
                return manifest.about, compare(manifest, Path(manifest.about["root"]), source)

            about, work = on_main_process(prepare, errors=_ERRORS)
            reading = {"window": about["window"], "workers": workers, "timeout": timeout}
            manifest, vectors = opened
            return update(manifest, vectors, engine, work, Path(about["root"]), **reading)

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike,
        options: Sequence[str] = (),
        *,
        token_cache: float = 1.0,
    ) -> Index:
        """Open an index to search it.

        Args:
            folder: of the index.
            options: ``section.key=value`` over the recipe, such as ``run.device=cpu``.
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
        engine = Engine(folder / RECIPE, options, adapter_of(folder))
        command = rebuild_command(folder, Path(manifest.about["root"]))
        check_fingerprint(folder, manifest.about, engine.fingerprint(), command)
        store = open_own_store(folder, manifest.about, engine)
        check_store(folder, manifest, store)
        return cls(folder, manifest, store, engine, token_cache)

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
            min_probability: 0 to 1; hits of a text that match with less are left out.

        Raises:
            ConfigError: for no query or several, an empty or very long text, an unknown segment,
                or a ``min_probability`` where nothing is judged.
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
        _check_threshold(min_probability, judged=text is not None and rerank > 0)
        encoded, vector = self._encode(text, image, like)
        candidates = self._shortlist(vector, max(4 * top, rerank))
        if encoded is None or rerank == 0:
            yield Stage("done", moments(candidates, vector, self.root, top))
            return
        yield Stage("shortlist", moments(candidates, vector, self.root, top))
        judged: list[Candidate] = []
        total = min(rerank, len(candidates))
        for some in batches(candidates[:total], min(self.engine.batch_size, _STEP)):
            read = {c.stored.id: self._read(c.stored) for c in some}
            with self._lock:
                judged += self._match(encoded, some, read)
            yield Stage("matching", [], len(judged), total)
        likely = [c for c in judged if (c.probability or 0) >= min_probability]
        rest = candidates[total:] if min_probability == 0 else []
        ordered = sorted([*likely, *rest], key=lambda c: c.order)
        ranked = [replace(candidate, rank=rank) for rank, candidate in enumerate(ordered)]
        yield Stage("done", moments(ranked, vector, self.root, top), total, total)

    def _encode(
        self, text: str | None, image: Image.Image | None, like: int | None
    ) -> tuple[TextFeatures | None, Tensor]:
        """A query's text, if it is one, and its vector."""
        with self._lock:
            if text is not None:
                encoded = self.engine.encode_texts([_checked(text)])
                return encoded, encoded.feat[0]
            if image is not None:
                clip = image_clip(image, self.engine.processor.options.image_size)
                return None, self.engine.encode(clip).feat[0]
            return None, self.segment(int(like or 0)).feat.float()

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

    def _match(
        self,
        text: TextFeatures,
        some: Sequence[Candidate],
        read: dict[int, VisualFeatures | Tensor | None],
    ) -> list[Candidate]:
        """Judge candidates by the matching head; one that could not be read stays as it is."""
        features = {number: self._features(number, what) for number, what in read.items()}
        readable = [c for c in some if features[c.stored.id] is not None]
        judged = {}
        by_frames: dict[int, list[Candidate]] = {}
        for candidate in readable:
            by_frames.setdefault(len(candidate.stored.segment.times), []).append(candidate)
        for group in by_frames.values():
            visuals = _stack([features[c.stored.id] for c in group], self.engine.model.device)
            pairs = torch.tensor([(0, position) for position in range(len(group))])
            scores = self.engine.match(text, visuals, pairs)
            for i, candidate in enumerate(group):
                judged[candidate.stored.id] = replace(
                    candidate,
                    ranking=float(scores.ranking[i]),
                    probability=float(scores.probability[i]),
                )
        return [judged.get(c.stored.id, c) for c in some]

    def _read(self, stored: StoredSegment) -> VisualFeatures | Tensor | None:
        """A segment's visual tokens if they are cached, or its frames; None: it cannot be read."""
        if (known := self._tokens.get(stored.id)) is not None:
            return known
        path = self.root / stored.file
        try:
            stored.check_file(path)
            return read_segment(path, stored.segment, self.engine.processor.options)
        except (RuntimeError, ValueError, OSError):
            return None  # it was readable when it was indexed; the next update lists it

    def _features(self, number: int, read: VisualFeatures | Tensor | None) -> VisualFeatures | None:
        if not isinstance(read, Tensor):
            return read
        encoded = self.engine.encode(read)
        self._tokens.put(number, encoded)
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


def _check_threshold(min_probability: float, judged: bool) -> None:
    if not 0 <= min_probability <= 1:
        raise ConfigError(f"min_probability is {min_probability:g}; it must be from 0 to 1.")
    if min_probability and not judged:
        raise ConfigError(
            "min_probability needs a text and rerank above 0: only the matching head gives "
            "probabilities."
        )
