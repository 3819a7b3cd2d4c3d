"""The embedded data set as LAVIS loads it, and that stale files are never taken for it."""

import pytest
from lavis.common.registry import registry
from omegaconf import OmegaConf
from shapes_data import CLIPS, FEW, STILLS, replace

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.common.schema.shapes import GENERATED, Clips, Stills
from lavis_uniadapter.datasets.layouts import DATASET_CLASSES
from lavis_uniadapter.datasets.records import DatasetError
from lavis_uniadapter.datasets.shapes import drawing, generation
from lavis_uniadapter.datasets.shapes.generation import ensure_generated

# Configuration


@pytest.mark.parametrize("config_cls", [Stills, Clips])
def test_an_unknown_key_is_named_with_the_known_ones(config_cls):
    with pytest.raises(ConfigError, match=r"'generate\.visible_framez'") as error:
        config_cls.read({"seed": 3, "visible_framez": 2}, "generate")
    assert ("visible_frames" in str(error.value)) == (config_cls is Clips)


@pytest.mark.parametrize(
    ("config_cls", "name", "value"),
    [
        (Stills, "num_test", 601),
        (Stills, "num_train", 0),
        (Stills, "seed", -1),
        (Stills, "seed", "7"),
        (Stills, "noise", -1.0),
        (Clips, "num_val", 201),
        (Clips, "image_size", 48),
        (Clips, "visible_frames", 17),
        (Clips, "visible_frames", 0),
        (Clips, "captions_per_train_clip", 6),
        (Clips, "questions_per_train_item", 5),
        (Stills, "questions_per_train_item", 0),
        (Clips, "distractors", True),
    ],
)
def test_a_value_out_of_range_is_named(config_cls, name, value):
    with pytest.raises(ConfigError, match=rf"generate\.{name} "):
        config_cls.read({name: value}, "generate")


# Finished or not


@pytest.mark.parametrize("config", FEW, ids=["stills", "clips"])
def test_a_finished_set_is_not_drawn_again_and_no_other_is_taken_for_it(
    config, tmp_path, monkeypatch
):
    folder = tmp_path / "set"
    ensure_generated(config, folder)
    monkeypatch.setattr(drawing, "_object_mask", None)
    ensure_generated(config, folder)
    with pytest.raises(FileExistsError, match="seed: 0 there, 1 wanted") as error:
        ensure_generated(replace(config, seed=1), folder)
    assert str(folder) in str(error.value)


def test_an_interrupted_generation_is_not_taken_as_finished(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    config = replace(CLIPS, num_train=2, num_val=1, num_test=1)
    write, written = generation.write_mp4, []

    def write_three(path, frames, fps):
        assert not folder.exists()  # so that a kill at any time leaves no such folder
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        write(path, frames, fps)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "write_mp4", write_three)
        with pytest.raises(KeyboardInterrupt):
            ensure_generated(config, folder)
    assert list(tmp_path.iterdir()) == []

    ensure_generated(config, folder)
    assert len(list((folder / "videos").iterdir())) == 4


def test_a_folder_of_something_else_is_neither_used_nor_touched(tmp_path):
    folder = tmp_path / "set"
    (folder / "annotations").mkdir(parents=True)
    (folder / "annotations" / "train.json").write_text("[]")
    with pytest.raises(FileExistsError, match="generated.json is missing"):
        ensure_generated(STILLS, folder)
    assert [path.name for path in folder.rglob("*")] == ["annotations", "train.json"]


def test_a_faster_process_wins(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    config = replace(STILLS, num_train=2, num_val=1, num_test=1)
    rename = generation.os.rename

    def rename_second(source, target):
        monkeypatch.setattr(generation.os, "rename", rename)
        ensure_generated(config, folder)
        rename(source, target)

    monkeypatch.setattr(generation.os, "rename", rename_second)
    ensure_generated(config, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert len(list((folder / "images").iterdir())) == 4


# LAVIS


@pytest.fixture
def cache_root(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", str(tmp_path))
    return tmp_path


def builder(name, **generate):
    builder_cls = registry.get_builder_class(name)
    config = OmegaConf.load(builder_cls.default_config_path()).datasets[name]
    made = builder_cls(OmegaConf.merge(config, {"generate": generate}))
    visual = {"name": "blip_image_eval", "image_size": 64}
    if made.data_type == "videos":
        visual = {"name": "blip_video_eval", "image_size": 64, "n_frms": 2}
    text = {"name": "blip_question" if name.endswith("qa") else "blip_caption"}
    made.config.vis_processor = {"train": visual, "eval": visual}
    made.config.text_processor = {"train": text, "eval": text}
    return made


@pytest.mark.parametrize("kind", ["stills", "clips"])
def test_lavis_loads_what_was_drawn_once_for_all_tasks(kind, cache_root, monkeypatch):
    prefix, key, data_type, shape, captions = {
        "stills": ("shapes_image", "image", "images", (3, 64, 64), 1),
        "clips": ("shapes", "video", "videos", (3, 2, 64, 64), 2),
    }[kind]
    asked = GENERATED[f"{prefix}_qa"]().questions_per_train_item
    sizes = {
        "retrieval": (2 * captions, 1, 3),
        "qa": (2 * asked, 4, 12),
        "caption": (2 * captions, 1, 3),
    }
    for task, (train, val, test) in sizes.items():
        made = builder(f"{prefix}_{task}", num_train=2, num_val=1, num_test=3)
        datasets = made.build_datasets()
        monkeypatch.setattr(drawing, "_object_mask", None)  # the first task has drawn everything
        assert (cache_root / "shapes" / kind / "generated.json").is_file()
        train_cls, eval_cls = DATASET_CLASSES[task, data_type]
        assert [(split, type(d), len(d)) for split, d in datasets.items()] == [
            ("train", train_cls, train),
            ("val", eval_cls, val),
            ("test", eval_cls, test),
        ]
        for split, dataset in datasets.items():
            annotation = dataset.annotation
            batch = dataset.collater([dataset[index] for index in range(len(dataset))])
            assert batch[key].shape == (len(dataset), *shape)
            if task == "qa":
                assert batch["text_input"] == [record["question"] for record in annotation]
                numbers = [record["question_id"] for record in annotation]
                assert batch["question_id"].tolist() == numbers
                answers = {label: answer for answer, label in dataset.class_labels.items()}
                assert len(answers) == len(dataset.class_labels) == 27
                given = [answers[label] for label in batch["answers"].tolist()]
                assert given == [record["answer"] for record in annotation]
            elif split == "train":
                assert batch["text_input"] == [record["caption"] for record in annotation]
                assert batch["image_id"].tolist() == [i for i in (0, 1) for _ in range(captions)]
            elif task == "caption":
                assert batch["image_id"].tolist() == list(range(len(dataset)))
            else:
                assert dataset.txt2img == {index: index for index in range(len(dataset))}


def test_builder_refuses_an_unknown_generate_key(cache_root):
    with pytest.raises(ConfigError, match="num_clips"):
        builder("shapes_retrieval", num_clips=3).build_datasets()
    assert list(cache_root.iterdir()) == []


def test_builder_follows_moved_storage_and_refuses_scattered_storage(cache_root):
    moved = builder("shapes_image_retrieval", num_train=1, num_val=1, num_test=1)
    info = moved.config.build_info
    info.images.storage = str(cache_root / "elsewhere" / "images")
    with pytest.raises(ConfigError, match=r"annotations\.train\.storage"):
        moved.build_datasets()
    assert list(cache_root.iterdir()) == []
    for split in info.annotations:
        info.annotations[split].storage = f"elsewhere/annotations/{split}.json"
    assert len(moved.build_datasets()["train"]) == 1


@pytest.mark.parametrize("key", ["annotations.val", "images"])
@pytest.mark.parametrize("storage", [None, ["a", "b"]])
def test_builder_refuses_storage_that_is_no_path(cache_root, key, storage):
    made = builder("shapes_image_retrieval", num_train=1, num_val=1, num_test=1)
    OmegaConf.update(made.config.build_info, f"{key}.storage", storage)
    with pytest.raises(ConfigError, match=rf"{key}\.storage is .*; it must be a path"):
        made.build_datasets()


def test_builder_refuses_annotations_that_it_does_not_generate(cache_root):
    questions = builder("shapes_qa", num_train=1, num_val=1, num_test=1)
    questions.config.build_info.annotations.ans2label.storage = "shapes/clips/annotations/x.json"
    with pytest.raises(DatasetError, match=r"annotations\.ans2label .*\s.*x\.json: cannot be read"):
        questions.build_datasets()
