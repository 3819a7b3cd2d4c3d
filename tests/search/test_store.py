"""All stores keep one contract."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.search.store import NumPyStore, open_store

DIM = 16
milvus = pytest.mark.skipif(
    importlib.util.find_spec("milvus_lite") is None, reason="milvus-lite is not installed"
)


def vectors(number: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(number, DIM, generator=generator), dim=1)


@pytest.fixture(params=["numpy", pytest.param("milvus", marks=milvus)])
def store(request, tmp_path):
    opened = open_store(request.param, tmp_path, DIM, "tests")
    yield opened
    opened.close()


def test_finds_the_nearest_of_what_is_there(store):
    assert store.search(vectors(1)[0], 3) == ([], [])
    all_vectors = vectors(50)
    store.add(range(1, 51), all_vectors)
    assert len(store) == 50
    query = vectors(1, seed=1)[0]
    exact = all_vectors @ query
    ids, similarities = store.search(query, 5)
    assert ids == (exact.argsort(descending=True)[:5] + 1).tolist()
    torch.testing.assert_close(
        torch.tensor(similarities), exact.sort(descending=True).values[:5], atol=2e-3, rtol=0
    )


def test_deleted_vectors_are_gone_and_others_take_their_place(store):
    some = vectors(6)
    store.add([1, 2, 3], some[:3])
    store.delete([2, 99])
    assert len(store) == 2 and 2 not in store.search(some[1], 9)[0]
    store.add([4, 5, 6], some[3:])
    assert len(store) == 5
    for number, vector in zip([1, 3, 4, 5, 6], some[[0, 2, 3, 4, 5]], strict=True):
        assert store.search(vector, 1)[0] == [number]
    store.delete([1, 3, 4, 5, 6])
    assert len(store) == 0 and store.search(some[0], 3) == ([], [])


@pytest.mark.parametrize("kind", ["numpy", pytest.param("milvus", marks=milvus)])
def test_what_was_added_is_there_when_opened_again(kind, tmp_path):
    first = open_store(kind, tmp_path, DIM, "tests")
    first.add([7, 8], vectors(2))
    first.delete([7])
    first.close()
    again = open_store(kind, tmp_path, DIM, "tests")
    assert len(again) == 1 and again.search(vectors(2)[1], 5)[0] == [8]
    again.close()


@settings(max_examples=30)
@given(
    changes=st.lists(
        st.tuples(st.sampled_from(["add", "delete"]), st.lists(st.integers(0, 30), max_size=6)),
        max_size=12,
    )
)
def test_any_changes_leave_what_a_dictionary_holds(changes, tmp_path_factory):
    store = NumPyStore(tmp_path_factory.mktemp("store"), DIM)
    all_vectors, held = vectors(31), {}
    for change, numbers in changes:
        numbers = list(dict.fromkeys(numbers))
        if change == "add":
            numbers = [n for n in numbers if n not in held]
            store.add(numbers, all_vectors[numbers])
            held.update({n: all_vectors[n] for n in numbers})
        else:
            store.delete(numbers)
            held = {n: vector for n, vector in held.items() if n not in numbers}
    assert len(store) == len(held)
    ids, _ = store.search(all_vectors[0], 100)
    assert sorted(ids) == sorted(held)
    for number, vector in held.items():
        assert store.search(vector, 1)[0] == [number]


def test_a_cut_off_end_is_written_over(tmp_path):
    store, some = NumPyStore(tmp_path, DIM), vectors(4)
    store.add([1, 2], some[:2])
    with open(tmp_path / "vectors.f16", "ab") as file:  # killed before the id was written
        file.write(b"\x01" * (2 * DIM + 5))
    with open(tmp_path / "ids.i64", "ab") as file:
        file.write(b"\x01\x02\x03")
    store = NumPyStore(tmp_path, DIM)
    assert len(store) == 2
    store.add([3], some[2:3])
    assert len(store) == 3 and store.search(some[2], 1)[0] == [3]


def test_an_unknown_store_or_a_server_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="'faiss'.*numpy, milvus"):
        open_store("faiss", tmp_path, DIM, "tests")


@milvus
def test_a_milvus_server_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="http://127.0.0.1:1"):
        open_store("milvus:http://127.0.0.1:1", tmp_path, DIM, "tests")
