"""DiDeMo's annotations: read back through LAVIS, or refused by name."""

import re

import pytest
from published import counts_in, evaluation_captions, training_pairs

from lavis_uniadapter.tools.prepare import benchmarks


def test_paragraphs_read_back(did, monkeypatch):
    did.save("utf-8-sig")
    did.succeed(*did.val)
    datasets = did.datasets("didemo_retrieval", monkeypatch)
    pairs = training_pairs(datasets["train"])
    assert pairs == [("1@N00_a", "first part then más"), ("2@N00_b", "one only")]
    assert evaluation_captions(datasets["val"]) == {"3@N00_c": ["begins goes on ends"]}
    assert evaluation_captions(datasets["test"]) == {
        "4@N00_d": ["all of it"],
        "5@N00_e": ["half and half"],
    }


def test_without_validation(did, monkeypatch):
    assert "'run.valid_splits=[]'" in did.succeed()
    assert len(did.datasets("didemo_retrieval", monkeypatch, ["train", "test"])["train"]) == 2


def test_empty_descriptions_are_left_out_of_their_paragraph(did):
    did.records["val"][1]["description"] = "  "
    did.save()
    did.succeed(*did.val)
    assert did.written("retrieval_val.json")[0]["caption"] == ["begins ends"]


def leak(records):
    records["train"].append(records["test"][0])


def not_text(records):
    records["train"][0]["description"] = ["a list"]


def outside(records):
    records["train"][0]["video"] = "../a.mp4"


def not_a_list(records):
    records["train"] = {}


def empty(records):
    for record in records["val"]:
        record["description"] = ""


def no_records(records):
    records["train"] = []


ERRORS = {
    leak: r"1 videos are both in .*train_data.json and in .*test_data.json: 4@N00_d.mpg;",
    not_text: r"data.json, record 0: needs a string under 'description', has \['a list'\]",
    outside: r"data.json, record 0: needs a file name below .* under 'video', has '../a.mp4'",
    not_a_list: r"train_data.json: must be a list",
    empty: r"1 videos of retrieval_val.json have no caption: 3@N00_c.3gp",
    no_records: r"train_data.json: has no records",
}


@pytest.mark.parametrize("spoil", ERRORS, ids=lambda spoil: spoil.__name__)
def test_what_is_wrong_is_named(did, spoil):
    spoil(did.records)
    did.save()
    assert re.search(ERRORS[spoil], did.fail(*did.val))
    assert not did.output.exists()


def test_published_numbers(did, undecoded, monkeypatch):
    message = did.fail(*did.val, counts=None)
    for split, found, published in (("train", 2, 8395), ("val", 1, 1065), ("test", 2, 1004)):
        counts = f"{found} videos and {found} captions, published {published} and {published}\n"
        assert re.search(rf"{split}_data.json: {counts}", message)
    numbers = {"train": 84, "val": 11, "test": 10}
    monkeypatch.setattr(benchmarks, "DIDEMO", numbers)
    for split, count in numbers.items():
        did.records[split] = [
            {"video": f"{split}{n}.avi", "description": "a", "annotation_id": n}
            for n in range(count)
        ]
        for n in range(count):
            (did.videos / f"{split}{n}.mp4").touch()
    did.save()
    assert counts_in(did.succeed(*did.val, counts=None))["retrieval_train.json"] == (84, 84)


def test_videos_in_subfolders_are_not_used(did):
    did.records["train"][0]["video"] = "part/1@N00_a.avi"
    did.save()
    (did.videos / "part").mkdir()
    (did.videos / "1@N00_a.avi").rename(did.videos / "part/1@N00_a.avi")
    assert "part/1@N00_a.avi: missing" in did.fail()
