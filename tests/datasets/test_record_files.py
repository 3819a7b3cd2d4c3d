"""Files of records: every format gives the same, and every problem its place."""

import csv
import io
import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ConfigDict

from lavis_uniadapter.datasets.custom import (
    CustomCaptionBuilder,
    CustomQABuilder,
    CustomRetrievalBuilder,
)
from lavis_uniadapter.datasets.layouts import Answer, layout
from lavis_uniadapter.datasets.records import Problem, Record, listing, read_records

SCHEMAS = {
    task: layout("image", **builder_cls.fields)
    for task, builder_cls in {
        "retrieval": CustomRetrievalBuilder,
        "caption": CustomCaptionBuilder,
        "qa": CustomQABuilder,
    }.items()
}


class Anything(Record):
    model_config = ConfigDict(extra="allow")


class Two(Anything):
    two: str


def read(name, text, schema=Anything):
    """Records as (number, fields) and problems as (number, text), of a file with this text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        items = list(read_records(path, schema))
    assert all(item.place.path == str(path) for item in items)
    return (
        [(i.place.number, i.record.model_dump()) for i in items if not isinstance(i, Problem)],
        [(item.place.number, item.text) for item in items if isinstance(item, Problem)],
    )


# Every now and then one of the characters that files are made of or that some hold for line ends.
any_character = st.characters(exclude_categories=["Cs"], exclude_characters="\0") | st.sampled_from(
    "\"',\\\t \n\r\x0b\x0c\x1c\x85\u2028\ufeff"
)
any_text = st.text(any_character, max_size=6)
any_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(st.dictionaries(any_text, any_value, max_size=3), min_size=1), st.booleans())
def test_json_is_read_as_by_json(elements, bom):
    content = "\ufeff" * bom + json.dumps(elements, indent=1, ensure_ascii=bom)
    assert read("a.json", content) == (list(enumerate(elements)), [])


@given(
    st.lists(
        st.dictionaries(any_text, any_value, max_size=3) | st.just(None), min_size=1, max_size=5
    ),
    st.sampled_from(["\n", "\r\n"]),
)
def test_jsonl_is_read_line_by_line(elements, newline):
    lines = ["" if e is None else json.dumps(e, ensure_ascii=False) for e in elements]
    expected = [(line, e) for line, e in enumerate(elements, start=1) if e is not None]
    found, problems = read("a.jsonl", newline.join(lines))
    assert found == expected
    assert bool(problems) == (not expected)


@given(
    st.lists(st.lists(any_text, min_size=2, max_size=2).filter(any) | st.just([]), max_size=5),
    st.sampled_from([",", "\t"]),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_tables_are_read_as_they_are_written_with_true_lines(rows, delimiter, newline, bom):
    buffer = io.StringIO(newline="")
    writer = csv.writer(
        buffer, delimiter=delimiter, lineterminator=newline, quoting=csv.QUOTE_NONNUMERIC
    )
    writer.writerow(["one", "two"])
    expected = []
    for row in rows:
        line = len(re.findall("\r\n|\r|\n", buffer.getvalue())) + 1
        writer.writerow(row)
        if row:
            expected.append((line, dict(zip(["one", "two"], row, strict=True))))
    name = {",": "a.csv", "\t": "a.TSV"}[delimiter]
    found, problems = read(name, "\ufeff" * bom + buffer.getvalue(), Two)
    assert found == expected
    assert problems == ([] if expected else [(0, "has no records")])


def test_spaces_after_separators_and_empty_rows_are_passed_over():
    found, _ = read("a.csv", 'one, two\na, b\n\n,\n "c, d", "e"\n', Two)
    assert found == [(2, {"one": "a", "two": "b"}), (5, {"one": "c, d", "two": "e"})]


def test_a_carriage_return_alone_ends_a_line_of_a_table():
    found, problems = read("a.csv", 'one,two\r"a\rb",c\rd,e\r')
    assert found == [(2, {"one": "a\rb", "two": "c"}), (4, {"one": "d", "two": "e"})]
    assert problems == []


def test_a_column_without_a_name_is_no_problem():
    found, problems = read("a.csv", ",one,\n0,a,\n")
    assert (found[0][0], found[0][1]["one"], problems) == (2, "a", [])


def test_single_values_are_read_as_records_of_a_field(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo", newline="")
    items = list(read_records(tmp_path / "a.txt", Answer, [".txt"]))
    assert [item.place.number for item in items] == [1, 2, 3]
    assert [items[0].record.answer, items[2].record.answer] == ["one", "two"]
    assert isinstance(items[1], Problem)


# Problems


QA = {"image": "two.png", "question": "?", "answer": "x"}
CAPTION = {"image": "two.png", "caption": "x"}


@pytest.mark.parametrize(
    ("task", "change", "problem"),
    [
        (
            "retrieval",
            {"image": 3},
            "needs a file name below the visual folder under 'image', has 3",
        ),
        ("retrieval", {"caption": []}, "under 'caption', has []"),
        ("retrieval", {"caption": ["fine", ""]}, "under 'caption', has ['fine', '']"),
        ("retrieval", {"caption": ["fine", 3]}, "under 'caption', has ['fine', 3]"),
        ("caption", {"caption": None}, "under 'caption', has None"),
        ("caption", {"caption": {"a": "b"}}, "under 'caption', has {'a': 'b'}"),
        ("qa", {"question": " "}, "needs a non-empty string under 'question', has ' '"),
        ("qa", {"answer": ""}, "needs a non-empty string under 'answer', has ''"),
        ("qa", {"answer": ["a", "list"]}, "under 'answer', has ['a', 'list']"),
        ("qa", {"answer": 2}, "under 'answer', has 2"),
        ("qa", {"question_id": "q1"}, "needs a whole number, or nothing, under 'question_id'"),
        ("qa", {"question_id": 1.5}, "under 'question_id', has 1.5"),
        ("qa", {"question_id": -1}, "under 'question_id', has -1"),
        ("qa", {"question_id": 2**63}, "under 'question_id', has 9223372036854775808"),
        ("caption", {"image_id": "video7"}, "whole number, or nothing, under 'image_id'"),
        (
            "retrieval",
            {"image_id": [1]},
            "a string or a whole number, or nothing, under 'image_id'",
        ),
    ],
)
def test_values_of_a_wrong_type_are_named(task, change, problem, tmp_path):
    sound = QA if task == "qa" else CAPTION
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in (sound, {**sound, **change})))
    first, second = read_records(path, SCHEMAS[task])
    assert not isinstance(first, Problem)
    assert f"{path}:2: " in str(second) and problem in second.text


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", b"", ": is empty"),
        ("a.jsonl", b"\xef\xbb\xbf\n \n", ": is empty"),
        ("a.csv", b"image,caption\r\n\r\n", ": has no records"),
        ("a.json", b" [ ]", ": has no records"),
        (
            "a.csv",
            b"image,text\ntwo.png,x\n",
            ":1: has no column 'caption'; its columns are 'image', 'text'.",
        ),
        (
            "a.csv",
            b"\n\nimage;caption\n",
            ":3: has no column 'image', 'caption'; its columns are 'image;caption'. "
            "Separate them by a comma, not by ';'",
        ),
        (
            "a.csv",
            b"image,captions\n",
            ":1: has no column 'caption'; its columns are 'image', 'captions'. "
            "Rename 'captions' to 'caption'",
        ),
        (
            "a.csv",
            b"Image,Caption\n",
            ":1: has no column 'image', 'caption'; its columns are 'Image', 'Caption'. "
            "Rename 'Image' to 'image'",
        ),
        (
            "a.json",
            b'{"image": "a"}\n{"image": "b"}\n',
            ":2: is not valid JSON (Extra data); name the file .jsonl if each line is a record",
        ),
        ("a.csv", b"image,caption,caption\na,b,c\n", ":1: has the column 'caption' twice"),
        ("a.csv", b"image,caption\ntwo.png\n", ":2: has 1 cells, but the header has 2; put a cell"),
        ("a.csv", b"image,caption\ntwo.png,a, b\n", ":2: has 3 cells, but the header has 2"),
        ("a.tsv", b"image\tcaption\ntwo.png\ta\tb\n", ":2: has 3 cells, but the header has 2; put"),
        (
            "a.csv",
            b'image,caption\ntwo.png,"a\nb\n',
            ":2: is not a valid row (unexpected end of data)",
        ),
        ("a.csv", b'image,caption\ntwo.png,"a" b\n', ":2: is not a valid row ("),
        ("a.csv", b'image,"caption\n', ":1: is not a valid row (unexpected end of data)"),
        ("a.csv", b"image,caption\n\ntwo.png,caf\xe9\n", ":3: is not UTF-8 (byte 0xe9); save the"),
        ("a.csv", b"\xef\xbb\xbfimage,caption\ntwo.png,caf\xe9\n", ":2: is not UTF-8 (byte 0xe9)"),
        ("a.csv", "image,caption".encode("utf-16"), ":1: is not UTF-8 (byte 0xff)"),
        ("a.json", b'{"image":\n "two.png"}', ": must be a list, [...]"),
        (
            "a.json",
            b'\n[{"image": "two.png", "caption": "a"},\n\n3]',
            ", record 1: must be an object, {...}, not 3",
        ),
        (
            "a.json",
            b'[{"image": "two.png", "captoin": "a"}]',
            ", record 0: needs a non-empty string (or a list) under 'caption', has None. Did you "
            "mean 'captoin'?",
        ),
        ("a.json", b"[{}]", ", record 0: needs a file name below"),
        ("a.json", b'[\n{"image":\n two}]', ":3: is not valid JSON (Expecting value)"),
        ("a.json", b"[\n{}\n{}]", ":3: is not valid JSON ("),
        ("a.json", b"[{}]\n\nx", ":3: is not valid JSON (Extra data)"),
        ("a.jsonl", b'\n{"image": "two.png",\n"caption": "a"}\n', ":2: is not valid JSON ("),
        ("a.jsonl", b'["two.png", "a"]\n', ":1: must be an object, {...}, not ['two.png', 'a']"),
        ("a.txt", b"two.png a\n", ": the file's name must end in .json or .jsonl or .csv or .tsv"),
    ],
)
def test_broken_files_are_named_with_the_line(name, content, problem, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    items = list(read_records(path, SCHEMAS["retrieval"]))
    assert any(str(item).startswith(f"{path}{problem}") for item in items)


def test_reading_goes_on_after_a_broken_line():
    table = 'image,caption\ntwo.png,"a" b\ntwo.png,a,b\n\ntwo.png,\ntwo.png,d\n'
    found, problems = read("a.csv", table, SCHEMAS["retrieval"])
    assert ([n for n, _ in found], [n for n, _ in problems]) == ([6], [2, 3, 5])
    lines = '{"image"\n\n3\n{"image": "two.png", "caption": "c"}\n'
    found, problems = read("a.jsonl", lines, SCHEMAS["retrieval"])
    assert ([n for n, _ in found], [n for n, _ in problems]) == ([4], [1, 3])


def test_the_first_twenty_problems_are_shown_and_the_others_counted():
    shown = listing([f"{i}.png" for i in range(23)]).splitlines()
    assert shown == ["", *(f"    {i}.png" for i in range(20)), "    and 3 more"]
