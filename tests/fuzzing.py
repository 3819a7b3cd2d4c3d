"""What files may hold: mostly what they should, and damage of any kind."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st


def examples(number: int) -> settings:
    """How many to try where the profile's 100 take long or find little; others in proportion."""
    return settings(max_examples=max(1, settings.default.max_examples * number // 100))


strings = st.text(max_size=5) | st.sampled_from(["", " ", "\ud800", "\0", "../a.mp4", "/a.mp4"])
EXTREMES = {
    "digits": "1" * 5000,
    "lists in lists": "[" * 5000 + "]" * 5000,
    "objects in objects": '{"a":' * 5000 + "1" + "}" * 5000,
}
# JSON texts: of some no value of Python is the origin
scalar_texts = (
    st.builds(json.dumps, st.none() | st.booleans() | st.integers() | st.floats() | strings)
    | st.integers(10**30, 10**31).map(str)
    | st.sampled_from(sorted(EXTREMES)).map(EXTREMES.get)
)


def list_text(items: list[str]) -> str:
    return f"[{', '.join(items)}]"


def object_text(items: dict[str, str]) -> str:
    return f"{{{', '.join(f'{json.dumps(key)}: {text}' for key, text in items.items())}}}"


value_texts = st.recursive(
    scalar_texts,
    lambda inner: (
        st.lists(inner, max_size=3).map(list_text)
        | st.dictionaries(strings, inner, max_size=3).map(object_text)
    ),
    max_leaves=5,
)
FIELDS = ["video", "image", "caption", "question", "answer", "image_id", "question_id"]
NEARLY_RIGHT = [
    '"a"',
    '" a "',
    '""',
    '" "',
    "5",
    "true",
    "null",
    "[]",
    '["a"]',
    '["a", 5]',
    '[" "]',
]


@st.composite
def sound_records(draw, listed: bool = False) -> dict[str, object]:
    """A record as any task may read it; `listed`: with a list of captions, as in evaluation."""
    number = draw(st.integers(0, 1))
    name = draw(st.sampled_from(["", "./"])) + ["a.mp4", "b.mp4"][number]
    captions = draw(st.lists(st.sampled_from(["one", "two", " three"]), min_size=1, max_size=2))
    answer = draw(st.sampled_from(["red", "blue"]))
    caption = captions if listed else captions[0]
    values = (name, name, caption, "what?", answer, number, draw(st.integers(0, 9)))
    return dict(zip(FIELDS, values, strict=True))


@st.composite
def record_texts(draw, listed: bool = False, spoilt: Sequence[str] = FIELDS) -> str:
    """A record as JSON text, half of the time with one of the `spoilt` fields spoilt."""
    texts = {key: json.dumps(value) for key, value in draw(sound_records(listed)).items()}
    if draw(st.booleans()):
        key = draw(st.sampled_from(spoilt))
        near = st.sampled_from(NEARLY_RIGHT)
        texts[key] = draw(near | near | value_texts | st.none())
        if texts[key] is None:
            del texts[key]
    return object_text(texts)


@st.composite
def harmed(draw, content: bytes) -> bytes:
    """Content with a byte changed, bytes put in or taken out, or the end cut off."""
    at = draw(st.integers(0, max(0, len(content) - 1)))
    harm = draw(st.sampled_from(["change", "insert", "remove", "cut"]))
    if harm == "cut":
        return content[:at]
    if harm == "remove":
        return content[:at] + content[at + draw(st.integers(1, 4)) :]
    new = draw(st.binary(min_size=1, max_size=1 if harm == "change" else 4))
    return content[:at] + new + content[at + (harm == "change") :]


cells = st.text('",\t \r\n\0ab', max_size=6) | st.sampled_from(["a.mp4", "b.mp4", "1"])


@st.composite
def tables(draw, delimiter: str) -> str:
    """A table with a header, most of its rows as they should be."""
    header = draw(st.permutations(FIELDS) | st.lists(st.sampled_from(FIELDS), max_size=4))
    rows = []
    for _ in range(draw(st.integers(0, 3))):
        record = draw(sound_records())
        row = [str(record[key]) for key in header]
        if row and draw(st.integers(0, 2)) == 0:
            row[draw(st.integers(0, len(row) - 1))] = draw(cells)
        if draw(st.integers(0, 4)) == 0:
            row += draw(st.lists(cells, max_size=2))
        rows.append(row)
    if draw(st.booleans()):  # nothing quoted that should be
        return "\n".join(delimiter.join(row) for row in [header, *rows])
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter).writerows([header, *rows])
    return buffer.getvalue()


def encoded(texts: st.SearchStrategy[str]) -> st.SearchStrategy[bytes]:
    """In UTF-8, with a byte-order mark or without."""
    return st.builds(
        lambda mark, text: mark + text.encode("utf-8", "surrogatepass"),
        st.sampled_from([b"", b"", b"\xef\xbb\xbf"]),
        texts,
    )


def proper(ending: str, spoilt: Sequence[str] = FIELDS) -> st.SearchStrategy[bytes]:
    """A file of the format that its ending names, with records whose `spoilt` fields may be so."""
    if ending in (".csv", ".tsv"):
        return encoded(tables({".csv": ",", ".tsv": "\t"}[ending]))
    if ending == ".txt":
        return encoded(st.lists(st.sampled_from(["red", "blue", "", " "])).map("\n".join))
    join = {".json": list_text, ".jsonl": "\n".join}[ending]
    return encoded(
        st.booleans().flatmap(
            lambda listed: st.lists(record_texts(listed, spoilt), min_size=1, max_size=3).map(join)
        )
    )


strange = st.binary(max_size=30) | encoded(
    value_texts
    | st.lists(value_texts, max_size=3).map(list_text)
    | st.lists(value_texts, max_size=3).map("\n".join)
    | st.text('{}[]:,"\n\r\t\0a1 ', max_size=30)
)


def files(*endings: str, spoilt: Sequence[str] = FIELDS) -> st.SearchStrategy[tuple[str, bytes]]:
    """An ending, and what a file of that format may hold: mostly records, most of them sound."""
    return st.sampled_from(endings).flatmap(
        lambda ending: st.tuples(
            st.just(ending),
            proper(ending, spoilt)
            | proper(ending, spoilt)
            | proper(ending, spoilt).flatmap(harmed)
            | strange
            | st.sampled_from(FORMATS).flatmap(proper),
        )
    )


FORMATS = (".json", ".jsonl", ".csv", ".tsv")
