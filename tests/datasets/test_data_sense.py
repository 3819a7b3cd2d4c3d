"""Data that can be read but makes no sense: tested on what was trained on, texts without words."""

import logging
import os

import pytest
from custom_data import KEY, build, config_of, error_of, write
from lavis.datasets.datasets.caption_datasets import CaptionDataset, CaptionEvalDataset
from lavis.datasets.datasets.coco_vqa_datasets import COCOVQADataset, COCOVQAEvalDataset
from lavis.datasets.datasets.retrieval_datasets import RetrievalDataset, RetrievalEvalDataset
from lavis.processors.base_processor import BaseProcessor
from lavis.processors.blip_processors import BlipCaptionProcessor

from lavis_uniadapter.datasets.building import check_built
from lavis_uniadapter.datasets.preflight import check_dataset
from lavis_uniadapter.datasets.records import DatasetError

PROCESSORS = {mode: {"name": "blip_caption"} for mode in ("train", "eval")}


def captioned(*rows, kind="images"):
    return [{KEY[kind]: name, "caption": caption} for name, caption in rows]


def asked(*rows):
    return [{"image": n, "question": question, "answer": "x"} for n, question in rows]


def built(mine, task, **rows):
    """Datasets of a user's rows, by split, checked as before training."""
    splits = {
        split: str(write(mine / f"{split}.csv", of_split)) for split, of_split in rows.items()
    }
    config = config_of("images", splits)
    check_built({"mine": build(task, "images", splits)}, {"mine": config})


TRAIN = captioned(("sub/one.png", "a"), ("two.png", "b"))


def test_files_that_are_trained_and_tested_on_are_counted(mine, caplog):
    images = mine / "images"
    (images / "link.png").symlink_to("two.png")
    (images / "three.png").write_bytes((images / "two.png").read_bytes())
    test = captioned(("link.png", "c"), ("sub/../sub/one.png", "d"), ("three.png", "e"))
    with caplog.at_level(logging.WARNING, "lavis_uniadapter"):
        built(mine, "retrieval", train=TRAIN, val=test[2:], test=test)
    (line,) = caplog.messages
    assert line.startswith("mine, test: 2 of 3 items are also in the training data")
    assert line.endswith(os.path.join(images, "sub/one.png"))


@pytest.mark.parametrize("task", ["retrieval", "caption", "qa"])
@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_that_is_the_training_data_is_refused(mine, task, split):
    rows = asked(("two.png", "Why?"), ("two.png", "How?")) if task == "qa" else TRAIN
    expected = rf"mine, {split} is the same as the training data: 2 items.*annotations\.{split}"
    with pytest.raises(DatasetError, match=expected):
        built(mine, task, **{"train": rows, split: rows[::-1]})


@pytest.mark.parametrize("task", ["retrieval", "caption"])
def test_other_captions_of_the_same_files_are_no_error(mine, task, caplog):
    with caplog.at_level(logging.WARNING, "lavis_uniadapter"):
        built(mine, task, train=TRAIN, test=captioned(("sub/one.png", "c"), ("two.png", "d")))
    (line,) = caplog.messages
    assert "2 of 2 items" in line


def test_other_questions_about_the_same_files_are_common_practice(mine, caplog):
    train = asked(("two.png", "Which colour?"), ("sub/one.png", "Why?"))
    with caplog.at_level(logging.WARNING, "lavis_uniadapter"):
        built(mine, "qa", train=train, test=asked(("two.png", "Why?")))
        assert caplog.messages == []
        test = asked(("two.png", "which  Colour?"), ("two.png", "How many?"))
        built(mine, "qa", train=train, test=test)
    (line,) = caplog.messages
    assert "mine, test: 1 of 2 items are also in the training data" in line
    assert line.endswith("two.png which colour?")


def lavis_dataset(cls, root, records, text_processor=None):
    """A dataset of LAVIS's with these records, which are not in files."""
    dataset = cls.__new__(cls)
    texts = text_processor or BaseProcessor()
    vars(dataset).update(annotation=records, vis_root=str(root), text_processor=texts)
    return dataset


def check_lavis(train, *evaluated, others=()):
    datasets = {"lavis": {"train": train, **{f"test{i}": d for i, d in enumerate(evaluated)}}}
    datasets |= {f"other{i}": {"train": d} for i, d in enumerate(others)}
    check_built(datasets, {name: {} for name in datasets}, files=False)


@pytest.mark.parametrize(
    ("train_cls", "eval_cls", "text"),
    [
        (RetrievalDataset, RetrievalEvalDataset, {"caption": ["c"]}),
        (CaptionDataset, CaptionEvalDataset, {"caption": None}),
        (CaptionDataset, CaptionEvalDataset, {"caption": "c"}),
    ],
)
def test_benchmarks_of_lavis_too(tmp_path, caplog, train_cls, eval_cls, text):
    images = {"image": "a.jpg", "image_id": 1}, {"image": "b.jpg", "image_id": 2}
    train = lavis_dataset(train_cls, tmp_path, [{**each, "caption": "a"} for each in images[:1]])
    test = lavis_dataset(eval_cls, tmp_path, [{**each, **text} for each in images])
    other = lavis_dataset(train_cls, tmp_path, [{**images[1], "caption": "b"}])
    check_lavis(train, test)
    check_lavis(train, test, others=[other])
    assert [line.split(" are ")[0] for line in caplog.messages] == [
        "lavis, test0: 1 of 2 items",
        "lavis, test0: 2 of 2 items",
    ]
    same = lavis_dataset(eval_cls, tmp_path, [{**images[1], "caption": ["B"]}])
    with pytest.raises(DatasetError, match="lavis, test0 is the same as the training data"):
        check_lavis(train, same, others=[other])


def test_vqa_trains_and_tests_on_the_same_images(tmp_path, caplog):
    record = {"image": "a.jpg", "question": "Why?", "answer": ["x"], "question_id": 1}
    train = lavis_dataset(COCOVQADataset, tmp_path, [record, {**record, "question": "How?"}])
    test = lavis_dataset(COCOVQAEvalDataset, tmp_path, [{**record, "question": "When?"}])
    check_lavis(train, test)
    assert caplog.messages == []
    check_lavis(train, lavis_dataset(COCOVQAEvalDataset, tmp_path, [record]))
    assert "1 of 1 items" in caplog.messages[0]


# Texts without words


@pytest.mark.parametrize("split", ["train", "test"])
def test_captions_without_words_are_named_by_line(mine, split):
    rows = captioned(("two.png", "fine"), ("two.png", "..."), ("sub/one.png", "(!)"))
    path = write(mine / "a.csv", rows)
    message = error_of("retrieval", "images", {split: str(path)}, text_processor=PROCESSORS)
    assert f"build_info.annotations.{split} has 2 problem(s)" in message
    assert f"{path}:{3 if split == 'train' else 2}: the caption '...' is empty after" in message
    assert f"{path}:4: the caption '(!)' is empty after preprocessing" in message


def test_questions_without_words_are_named_and_prompts_are_no_words(mine):
    path = write(mine / "a.csv", asked(("two.png", "Why?"), ("two.png", "...")))
    questions = {mode: {"name": "blip_question"} for mode in ("train", "eval")}
    message = error_of("qa", "images", {"train": str(path)}, text_processor=questions)
    assert f"{path}:3: the question '...' is empty after preprocessing" in message
    path = write(mine / "b.csv", captioned(("two.png", "...")))
    prompted = {"train": {"name": "blip_caption", "prompt": "a photo of "}}
    message = error_of("caption", "images", {"train": str(path)}, text_processor=prompted)
    assert f"{path}:2: the caption '...' is empty" in message


def test_without_a_text_processor_every_word_counts(mine):
    path = write(mine / "a.csv", captioned(("two.png", "...")))
    assert len(build("retrieval", "images", {"train": str(path)})["train"]) == 1


def test_texts_without_words_of_lavis_s_layouts(tmp_path, caplog):
    process = BlipCaptionProcessor()
    records = [{"image": "a.jpg", "image_id": 1, "caption": c} for c in ("fine", "...", "(!)")]
    train = lavis_dataset(RetrievalDataset, tmp_path, records, process)
    check_dataset(train, "train")
    (line,) = caplog.messages
    assert "record 1: the caption '...' is empty" in line and "one of 2 such texts" in line
    records = [{"image": "a.jpg", "image_id": 1, "caption": ["fine", "..."]}]
    check_dataset(lavis_dataset(CaptionEvalDataset, tmp_path, records, process), "test")
    assert "record 0: the caption '...' is empty" in caplog.messages[1]
    test = lavis_dataset(RetrievalEvalDataset, tmp_path, records, process)
    with pytest.raises(DatasetError, match=r"record 0: the caption '\.\.\.' is empty after"):
        check_dataset(test, "test")
