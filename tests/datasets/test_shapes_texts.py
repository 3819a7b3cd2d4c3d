"""How the embedded data set is split, and its captions, questions and vocabulary."""

import itertools
import json
from collections import Counter

import pytest
from lavis.processors import load_processor
from shapes_data import (
    CLIPS,
    STILLS,
    TRAIN_CONTENTS,
    content,
    file_name,
    records,
)
from transformers import BertTokenizer

from lavis_uniadapter.common.paths import PACKAGE_ROOT
from lavis_uniadapter.common.schema.shapes import Clips, Stills
from lavis_uniadapter.datasets.records import SPLITS
from lavis_uniadapter.datasets.shapes.contents import (
    ANSWERS,
    CLIP_TEMPLATES,
    COLOURS,
    POSITIONS,
    QUESTIONS,
    SHAPES,
    SIZES,
    STILL_TEMPLATES,
    deal_contents,
)

TOKENIZER = PACKAGE_ROOT / "configs" / "tokenizers" / "shapes"


# Splits


def combinations(config, split):
    return {dealt[:3] for dealt in deal_contents(config)[split]}


@pytest.mark.parametrize("seed", range(3))
def test_no_combination_is_in_two_splits_of_stills_or_clips(seed):
    train, val, test = (
        combinations(Stills(seed=seed), split) | combinations(Clips(seed=seed), split)
        for split in SPLITS
    )
    assert [len(train), len(val), len(test)] == [176, 100, 300]
    assert len(train | val | test) == 576


def test_the_split_of_a_combination_depends_on_the_seed_but_not_on_the_counts():
    few = Clips(num_train=9, num_val=7, num_test=5)
    for split in SPLITS:
        dealt = deal_contents(few)[split]
        assert dealt == deal_contents(Stills())[split][: getattr(few, f"num_{split}")]
        assert combinations(Clips(seed=1), split) != combinations(Clips(), split)


def limit(config_cls, name):
    """The largest value that the schema allows."""
    return next(m.le for m in config_cls.model_fields[name].metadata if hasattr(m, "le"))


@pytest.mark.parametrize("config_cls", [Stills, Clips])
def test_as_many_items_are_dealt_as_configured_and_evaluation_repeats_none(config_cls):
    most = {f"num_{split}": limit(config_cls, f"num_{split}") for split in ("val", "test")}
    assert most == {"num_val": 200, "num_test": 600}
    dealt = deal_contents(config_cls(num_train=800, **most))
    assert {split: len(items) for split, items in dealt.items()} == {
        "train": 800,
        "val": 200,
        "test": 600,
    }
    assert all(len(set(dealt[split])) == len(dealt[split]) for split in ("val", "test"))
    assert len(set(dealt["train"][:TRAIN_CONTENTS])) == TRAIN_CONTENTS
    assert dealt["train"][TRAIN_CONTENTS:] == dealt["train"][: 800 - TRAIN_CONTENTS]
    assert limit(config_cls, "questions_per_train_item") == len(QUESTIONS)
    assert limit(Clips, "captions_per_train_clip") == len(CLIP_TEMPLATES)


@pytest.mark.parametrize("seed", range(5))
def test_every_attribute_value_occurs_early_in_training(seed):
    train = deal_contents(Stills(seed=seed))["train"][:100]
    colours, forms, positions, sizes = map(set, zip(*train, strict=True))
    assert (colours, forms) == (set(COLOURS), set(SHAPES))
    assert (positions, sizes) == (set(POSITIONS), set(SIZES))


@pytest.mark.parametrize("split", SPLITS)
def test_the_annotations_describe_what_was_dealt(stills, clips, split):
    for folder, config in ((stills, STILLS), (clips, CLIPS)):
        by_file = {file_name(record): content(record) for record in records(folder, split)}
        assert list(by_file.values()) == deal_contents(config)[split]
        for record in records(folder, split):
            assert by_file[file_name(record)] == content(record)


def test_training_stills_share_an_image_id_exactly_if_they_show_the_same(stills):
    train = records(stills, "train")
    assert len({record["image_id"] for record in train}) == TRAIN_CONTENTS < len(train)
    assert len({content(record) for record in train}) == TRAIN_CONTENTS
    assert len({(record["image_id"], content(record)) for record in train}) == TRAIN_CONTENTS
    pictures = {(stills / "images" / record["image"]).read_bytes() for record in train}
    assert len(pictures) == len(train)


# Captions


def wording(caption, content):
    """A caption with the thing and the place of a content cut out."""
    colour, shape, position, size = content
    thing, place = f"a {size} {colour} {shape}", POSITIONS[position]
    assert thing in caption and place in caption
    return caption.replace(thing, "THING").replace(place, "PLACE")


def test_captions_name_what_is_shown_in_various_wordings(stills, clips):
    for folder, number in ((stills, 1), (clips, 2)):
        by_file = {}
        for record in records(folder, "train"):
            by_file.setdefault(file_name(record), set()).add(
                wording(record["caption"], content(record))
            )
        assert {len(wordings) for wordings in by_file.values()} == {number}
        assert len(set.union(*by_file.values())) == 5


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_captions_all_have_the_same_wording(stills, clips, split):
    for folder, verb in ((stills, ""), (clips, "appears ")):
        for record in records(folder, split):
            colour, shape, position, size = content(record)
            place = POSITIONS[position]
            assert record["caption"] == [f"a {size} {colour} {shape} {verb}{place}"]


@pytest.mark.parametrize("split", SPLITS)
def test_captioning_numbers_the_items_and_has_the_captions_of_retrieval(stills, clips, split):
    """In evaluation every wording is right, as a generated caption may use any."""
    for folder in (stills, clips):
        retrieval, captioning = records(folder, split), records(folder, split, "cap_")
        names = [file_name(record) for record in captioning]
        assert names == [file_name(record) for record in retrieval]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        assert [record["image_id"] for record in captioning] == [numbers[name] for name in names]
        trained = {
            wording(record["caption"], content(record)) for record in records(folder, "train")
        }
        for record, described in zip(captioning, retrieval, strict=True):
            if split == "train":
                assert record["caption"] == described["caption"]
            else:
                right = [wording(caption, content(described)) for caption in record["caption"]]
                assert len(right) == 5 and set(right) == trained
                assert record["caption"][:1] == described["caption"]


# Questions


def questions_about(content):
    """Every question about a content, with its right answer."""
    colour, shape, position, size = content
    return {
        f"what colour is the {shape}?": colour,
        f"what {colour} shape can be seen?": shape,
        f"where is the {colour} shape?": position,
        f"how big is the {colour} shape?": size,
    }


@pytest.mark.parametrize("split", SPLITS)
def test_questions_are_about_what_is_shown_and_answered_truly(stills, clips, split):
    for folder, trained in ((stills, 2), (clips, 4)):
        shown = {file_name(record): content(record) for record in records(folder, split)}
        questions = records(folder, split, "qa_")
        asked = {}
        for record in questions:
            pair = (record["question"], record["answer"])
            asked.setdefault(file_name(record), []).append(pair)
            assert record["answer"] not in record["question"].rstrip("?").split()
        assert asked.keys() == shown.keys()
        for name, pairs in asked.items():
            assert len(dict(pairs)) == len(pairs) == (trained if split == "train" else 4)
            assert dict(pairs).items() <= questions_about(shown[name]).items()
        assert len({record["question_id"] for record in questions}) == len(questions)


def test_training_asks_about_all_attributes_alike(stills):
    starts = Counter(
        " ".join(record["question"].split()[:2]) for record in records(stills, "train", "qa_")
    )
    about_shapes = sum(starts.pop(f"what {colour}") for colour in COLOURS)
    assert starts.keys() == {"what colour", "where is", "how big"}
    assert sum(starts.values()) + about_shapes == 2 * STILLS.num_train
    assert min(*starts.values(), about_shapes) > 0.4 * STILLS.num_train


def test_answers_are_labelled_from_zero_and_each_is_trained(stills, clips):
    labels = json.loads((stills / "annotations" / "qa_ans2label.json").read_text())
    assert sorted(labels.values()) == list(range(8 + 8 + 9 + 2))
    assert labels == json.loads((clips / "annotations" / "qa_ans2label.json").read_text())
    train, *evaluation = (
        {record["answer"] for folder in (stills, clips) for record in records(folder, split, "qa_")}
        for split in SPLITS
    )
    assert train == set(labels) and set.union(*evaluation) <= set(labels)


# Vocabulary


def words(*texts):
    """The words of texts and templates."""
    plain = " ".join(texts)
    for field in ("{thing}", "{place}", "{colour}", "{shape}", "?"):
        plain = plain.replace(field, " ")
    return set(plain.split())


CAPTION_WORDS = words(
    *(*STILL_TEMPLATES, *CLIP_TEMPLATES, *POSITIONS.values(), *COLOURS, *SHAPES, *SIZES, "a", "an")
)
QUESTION_WORDS = words(*QUESTIONS.values(), *ANSWERS)


def test_the_words_of_questions_are_behind_those_of_captions():
    tokens = (TOKENIZER / "vocab.txt").read_text().splitlines()
    assert len(tokens) == len(set(tokens))
    assert (tokens[5], tokens[108]) == ("a", "~")
    assert tokens[109:158] == sorted(CAPTION_WORDS - {"a"})
    assert tokens[158:] == sorted(QUESTION_WORDS - CAPTION_WORDS)
    # with the two tokens of BLIP
    med = json.loads((PACKAGE_ROOT / "configs/models/shapes_med_config.json").read_text())
    assert med["vocab_size"] >= len(tokens) + 2


def test_every_word_of_captions_questions_and_answers_is_one_token(stills, clips):
    tokenizer = BertTokenizer.from_pretrained(str(TOKENIZER), local_files_only=True)
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]"]) == [0, 1]
    captions, questions, answers = set(), set(), set()
    for folder, split in itertools.product((stills, clips), SPLITS):
        for record in records(folder, split, "cap_"):
            captions.update([record["caption"]] if split == "train" else record["caption"])
        for record in records(folder, split, "qa_"):
            questions.add(record["question"])
            answers.add(record["answer"])

    as_caption, as_question = load_processor("blip_caption"), load_processor("blip_question")
    for caption in (*captions, *answers):
        assert tokenizer.tokenize(as_caption(caption)) == caption.split()
        assert tokenizer.unk_token_id not in tokenizer(caption)["input_ids"]
    for question in questions:
        expected = [*question.removesuffix("?").split(), "?"]
        assert tokenizer.tokenize(as_question(question)) == expected
    assert words(*captions) <= CAPTION_WORDS and words(*questions, *answers) <= QUESTION_WORDS


def test_other_text_is_lower_cased_and_never_unknown():
    tokenizer = BertTokenizer.from_pretrained(str(TOKENIZER), local_files_only=True)
    tokens = ["a", "red", "z", "##o", "##o", ",", "7", "##x", "!"]
    assert tokenizer.tokenize("A RED Zoo, 7x!") == tokens
