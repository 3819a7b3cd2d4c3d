"""Where the vectors of segments are kept and searched."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from lavis_uniadapter.common.errors import ConfigError


class Store(Protocol):
    """Unit vectors by the number of their segment, searched by inner product."""

    def add(self, ids: Sequence[int], vectors: Tensor) -> None:
        """Add vectors (ids, dimensions); the ids must be new."""

    def delete(self, ids: Sequence[int]) -> None:
        """Delete vectors; unknown ids are skipped."""

    def search(self, query: Tensor, top: int) -> tuple[list[int], list[float]]:
        """Ids and similarities of the nearest vectors to one of (dimensions,), the best first."""

    def __len__(self) -> int:
        """Number of vectors."""

    def drop(self) -> None:
        """Delete all that is kept; the store cannot be used any more."""

    def close(self) -> None:
        """Release files and connections."""


class NumPyStore:
    """Exact search over two files: vectors in float16, and their ids.

    A deleted vector's id becomes -1, and its place is used again. A vector is written before its
    id, so that a killed process leaves none without the other.

    Args:
        folder: of the files.
        dim: dimensions of a vector.
        create: make the files where there are none.

    Raises:
        ConfigError: if a file is missing.
    """

    def __init__(self, folder: Path, dim: int, create: bool = True):
        self.dim = dim
        self._vectors_path, self._ids_path = folder / "vectors.f16", folder / "ids.i64"
        for path in (self._vectors_path, self._ids_path):
            if create:
                path.touch()
            elif not path.is_file():
                raise ConfigError(f"'{path}', a part of the index, is missing.")

    def _open(self, mode: Literal["r", "r+"] = "r") -> tuple[np.ndarray, np.ndarray]:
        """Vectors (rows, dim) and ids (rows,), mapped from the files as they are now."""
        rows = min(
            self._ids_path.stat().st_size // 8, self._vectors_path.stat().st_size // (2 * self.dim)
        )
        if rows == 0:
            return np.empty((0, self.dim), np.float16), np.empty(0, np.int64)
        vectors = np.memmap(self._vectors_path, np.float16, mode, shape=(rows, self.dim))
        return vectors, np.memmap(self._ids_path, np.int64, mode, shape=(rows,))

    def add(self, ids: Sequence[int], vectors: Tensor) -> None:
        values = vectors.to(torch.float16).cpu().numpy()
        rows, row_ids = self._open("r+")
        free = np.flatnonzero(row_ids == -1)[: len(ids)]
        rows[free] = values[: len(free)]
        row_ids[free] = ids[: len(free)]
        for path, end, new in (
            (self._vectors_path, len(rows) * self.dim * 2, values[len(free) :]),
            (self._ids_path, len(rows) * 8, np.asarray(ids[len(free) :], np.int64)),
        ):
            with open(path, "r+b") as file:
                file.seek(end)  # what follows the last whole row was cut short
                file.write(new.tobytes())

    def delete(self, ids: Sequence[int]) -> None:
        _, row_ids = self._open("r+")
        row_ids[np.isin(row_ids, ids)] = -1

    def search(self, query: Tensor, top: int) -> tuple[list[int], list[float]]:
        vectors, row_ids = self._open()
        if not len(row_ids):
            return [], []
        query = query.detach().float().cpu().reshape(-1)
        with warnings.catch_warnings():  # the files are only read
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            rows, ids = torch.from_numpy(vectors), torch.from_numpy(row_ids)
        # in float16 first, which reads each row once; then the best of them in float32
        scores = torch.mv(rows, query.half())
        scores[ids == -1] = -torch.inf
        near = scores.topk(min(2 * top + 16, len(ids))).indices
        near = near[ids[near] != -1]
        exact = (rows[near].float() @ query).sort(descending=True)
        best = exact.indices[:top]
        return ids[near[best]].tolist(), exact.values[:top].tolist()

    def __len__(self) -> int:
        return int((self._open()[1] != -1).sum())

    def drop(self) -> None:
        """Delete the files."""
        for path in (self._ids_path, self._vectors_path):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        pass


class MilvusStore:
    """Vectors in Milvus: in a file of its embedded version, or on a server or cluster.

    Args:
        uri: path of a file that ends in ``.db``, or ``http://host:19530``.
        collection: its name.
        dim: dimensions of a vector.
        create: make the collection if there is none.
        token: of a server that asks for one; ``$MILVUS_TOKEN`` by default.

    Raises:
        ConfigError: if pymilvus is not installed, the server cannot be reached, or the collection
            is missing.
    """

    def __init__(
        self, uri: str, collection: str, dim: int, create: bool = True, token: str | None = None
    ):
        local = uri.endswith(".db")
        if local and not create and not os.path.exists(uri):
            raise ConfigError(f"'{uri}', a part of the index, is missing.")
        try:
            from pymilvus import DataType, MilvusClient
        except ImportError as error:
            raise ConfigError(
                "The store 'milvus' needs pymilvus. Run: pip install 'lavis-uniadapter[milvus]'"
            ) from error
        self._collection = collection
        try:
            self._client = MilvusClient(uri, token=token or os.environ.get("MILVUS_TOKEN", ""))
            present = self._client.has_collection(collection)
            if create and not present:
                schema = self._client.create_schema(auto_id=False)
                schema.add_field("id", DataType.INT64, is_primary=True)
                schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
                index = self._client.prepare_index_params()
                kind = "FLAT" if local else "AUTOINDEX"
                index.add_index("vector", index_type=kind, metric_type="IP")
                self._client.create_collection(
                    collection, schema=schema, index_params=index, consistency_level="Strong"
                )
            if create or present:
                self._client.load_collection(collection)
        except Exception as error:  # of many layers: gRPC, the server, the embedded version
            raise ConfigError(f"Milvus at '{uri}' cannot be used: {error}") from error
        if not (create or present):
            raise ConfigError(f"Milvus at '{uri}' has no collection '{collection}'.")

    def drop(self) -> None:
        """Delete the collection."""
        self._client.drop_collection(self._collection)

    def add(self, ids: Sequence[int], vectors: Tensor) -> None:
        values = vectors.float().cpu().numpy()
        rows = [{"id": int(i), "vector": v} for i, v in zip(ids, values, strict=True)]
        if rows:
            self._client.upsert(self._collection, rows)

    def delete(self, ids: Sequence[int]) -> None:
        if ids:
            self._client.delete(self._collection, ids=[int(i) for i in ids])

    def search(self, query: Tensor, top: int) -> tuple[list[int], list[float]]:
        vector = query.detach().float().cpu().reshape(-1).numpy()
        # Milvus returns at most 16,384
        found = self._client.search(self._collection, [vector], limit=min(top, 16_384))[0]
        return [hit["id"] for hit in found], [hit["distance"] for hit in found]

    def __len__(self) -> int:
        counted = self._client.query(self._collection, filter="", output_fields=["count(*)"])
        return int(counted[0]["count(*)"])

    def close(self) -> None:
        self._client.close()


def open_store(spec: str, folder: Path, dim: int, collection: str, create: bool = True) -> Store:
    """Open the store of an index.

    Args:
        spec: ``numpy``, ``milvus`` (a file in the index's folder) or ``milvus:URI``.
        folder: of the index.
        dim: dimensions of a vector.
        collection: name of the index's collection in Milvus.
        create: make what is missing.

    Raises:
        ConfigError: for another spec, if Milvus cannot be used, or if something is missing.
    """
    kind, _, uri = spec.partition(":")
    if spec == "numpy":
        return NumPyStore(folder, dim, create)
    if kind != "milvus":
        raise ConfigError(f"The store is {spec!r}; it must be numpy, milvus or milvus:URI.")
    return MilvusStore(uri or str(folder / "milvus.db"), collection, dim, create)
