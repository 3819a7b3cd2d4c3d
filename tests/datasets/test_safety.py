"""What a foreign annotation, archive or checkpoint cannot do."""

from __future__ import annotations

import ast
import io
import json
import os
import reprlib
import zipfile
from pathlib import Path

import pytest
import torch
from clips import write_clip
from hypothesis import given
from hypothesis import strategies as st
from lavis.common.registry import registry
from lavis.datasets.datasets.retrieval_datasets import VideoRetrievalEvalDataset
from lavis.processors.base_processor import BaseProcessor
from omegaconf import OmegaConf
from PIL import Image

from lavis_uniadapter.common.paths import PACKAGE_ROOT
from lavis_uniadapter.datasets import preflight
from lavis_uniadapter.datasets.preflight import check_annotations, check_dataset
from lavis_uniadapter.datasets.records import DatasetError, escapes_root
from lavis_uniadapter.processors import extracted_frames
from lavis_uniadapter.processors.decoding import VideoDecodeError, decode_frames
from lavis_uniadapter.processors.extracted_frames import EXTRACTED_SUFFIX, read_about
from lavis_uniadapter.tools.prepare.command import main

# --- file names of records ------------------------------------------------------------------------

OUTSIDE = [
    "../secret.mp4",
    "part/../../secret.mp4",
    "..",
    "./..//secret.mp4",
    "/etc/secret.mp4",
    "//server/share/secret.mp4",
    "C:\\secret.mp4",
    "c:/secret.mp4",
    "\\\\server\\share\\secret.mp4",
    "\\secret.mp4",
    "part\\..\\..\\secret.mp4",
]
ESCAPES = "needs a file name below the visual folder under 'video', has"
BELOW = ["a.mp4", "part/a.mp4", "part/../a.mp4", "./a.mp4", "..a.mp4", "a..b/..c.mp4", "1:2.mp4"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_escape_are_recognised(name):
    assert escapes_root(name)


@pytest.mark.parametrize("name", BELOW)
def test_names_below_the_folder_are_accepted(name):
    assert not escapes_root(name)


@given(st.lists(st.sampled_from(["..", ".", "a", "b", "", "a..", "C:", "\\"])).map("/".join))
def test_only_what_stays_below_is_accepted(name):
    joined = os.path.normpath(os.path.join("/data/videos", name))
    stays = joined == "/data/videos" or joined.startswith("/data/videos/")
    if not escapes_root(name):
        assert stays
    elif "\\" not in name and not name.startswith("C:/"):
        assert not stays or name.startswith("/")


def config_of(folder, names):
    path = folder / "val.json"
    path.write_text(json.dumps([{"video": name, "caption": ["x"]} for name in names]))
    return OmegaConf.create(
        {
            "data_type": "videos",
            "build_info": {
                "annotations": {"val": {"storage": str(path)}},
                "videos": {"storage": str(folder / "videos")},
            },
        }
    )


@pytest.fixture
def folder(tmp_path):
    """A folder with videos, and one beside it that is not to be reached."""
    write_clip(tmp_path / "videos/a.mp4")
    (tmp_path / "videos/part").mkdir()
    write_clip(tmp_path / "secret.mp4")
    return tmp_path


@pytest.mark.parametrize("name", OUTSIDE)
def test_lavis_annotations_cannot_escape_the_folder(folder, name):
    builder = registry.get_builder_class("msrvtt_retrieval")(config_of(folder, ["a.mp4", name]))
    with pytest.raises(DatasetError) as caught:
        check_annotations(builder)
    expected = f"{folder / 'val.json'}, record 1: {ESCAPES} {reprlib.repr(name)}"
    assert expected in str(caught.value)


def test_what_escapes_from_a_built_dataset_is_named_and_not_opened(folder, monkeypatch):
    config_of(folder, ["a.mp4", "../secret.mp4", str(folder / "videos/a.mp4")])
    dataset = VideoRetrievalEvalDataset(
        BaseProcessor(), BaseProcessor(), str(folder / "videos"), [str(folder / "val.json")]
    )
    opened = []
    monkeypatch.setattr(preflight, "frames_problem", lambda path, _: opened.append(path))
    with pytest.raises(DatasetError, match=r"2 problem\(s\)") as caught:
        check_dataset(dataset, "val")
    assert f"record 1: {ESCAPES} '../secret.mp4'" in str(caught.value)
    assert f"record 2: {ESCAPES}" in str(caught.value)
    assert opened == []


@pytest.mark.parametrize("name", OUTSIDE)
def test_own_records_cannot_escape_the_folder(folder, name):
    path = folder / "train.jsonl"
    path.write_text(
        "".join(json.dumps({"video": n, "caption": "x"}) + "\n" for n in ("a.mp4", name))
    )
    config = config_of(folder, [])
    config.build_info.annotations = {"train": {"storage": str(path)}}
    with pytest.raises(DatasetError) as caught:
        registry.get_builder_class("custom_retrieval")(config).prepare()
    assert f"{path}:2: {ESCAPES} {reprlib.repr(name)}" in str(caught.value)


MSRVTT_DATA = {
    "videos": [{"video_id": "video1", "split": "test"}],
    "sentences": [{"video_id": "video1", "caption": "x", "sen_id": 0}],
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_published_names_become_files_of_the_folder_alone(folder, name, capsys):
    for split in ("train", "test"):
        record = {"video": name if split == "train" else "a", "description": "x"}
        (folder / f"{split}.json").write_text(json.dumps([{**record, "annotation_id": 0}]))
    didemo = ["didemo", "--train", f"{folder}/train.json", "--test", f"{folder}/test.json"]
    (folder / "data.json").write_text(json.dumps(MSRVTT_DATA))
    (folder / "test.csv").write_text(f"video_id,sentence\n{name},x\n")
    msrvtt = ["msrvtt", "--data", f"{folder}/data.json", "--test-csv", f"{folder}/test.csv"]
    options = ["--videos", f"{folder}/videos", "--output", f"{folder}/out", "--skip-missing"]
    for command, problem in (
        (didemo, "train.json, record 0: needs a file name below the visual folder under 'video'"),
        (msrvtt, "test.csv:2: needs 'video<number>' under 'video_id'"),
    ):
        assert main([*command, *options, "--allow-other-counts"]) == 2
        said = capsys.readouterr().err
        assert f"{problem}, has {reprlib.repr(name)}" in said
    assert not (folder / "out").exists()


# --- archives of frames ---------------------------------------------------------------------------


def write_archive(path, method=zipfile.ZIP_STORED, **members):
    about = b'{"num_frames": 1, "image_size": 32, "source_frames": 1, "video": [1, 1, ""]}'
    members = {"about": about, "picture": jpeg(32, 32), **members}
    with zipfile.ZipFile(f"{path}{EXTRACTED_SUFFIX}", "w", method) as archive:
        archive.writestr("about.json", members["about"])
        archive.writestr("00000.jpg", members["picture"])
    return Path(f"{path}{EXTRACTED_SUFFIX}")


def jpeg(width, height):
    content = io.BytesIO()
    Image.new("L", (width, height)).save(content, "JPEG")
    return content.getvalue()


def decode(path):
    return decode_frames(path, lambda n: [0], 32)


@pytest.mark.parametrize("member", ["about", "picture"])
@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_is_compressed_is_refused_unread(tmp_path, member, method):
    """A small archive may unpack to any size."""
    bomb = write_archive(tmp_path / "a.mp4", method, **{member: bytes(10_000_000)})
    assert bomb.stat().st_size < 200_000
    with pytest.raises(VideoDecodeError, match=r"about\.json is compressed"):
        decode(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"about\.json is compressed"):
        read_about(str(bomb))


@pytest.mark.parametrize("side", [5_000, 15_000])
def test_a_picture_of_too_many_pixels_is_refused(tmp_path, side, monkeypatch):
    write_archive(tmp_path / "a.mp4", picture=jpeg(side, side))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(VideoDecodeError, match="pixels"):
        decode(tmp_path / "a.mp4")


def test_two_processes_that_extract_the_same_video_do_not_write_one_file(tmp_path, monkeypatch):
    temporary = []
    monkeypatch.setattr(os, "replace", lambda new, old: temporary.append(new))
    path = str(tmp_path / f"a.mp4{EXTRACTED_SUFFIX}")
    for _ in range(2):
        extracted_frames.write_extracted_frames(path, torch.zeros(1, 8, 8, 3).byte(), 1, (1, 1, ""))
    assert len(set(temporary)) == 2
    assert {Path(path).parent for path in temporary} == {tmp_path}


# --- the source -----------------------------------------------------------------------------------

# What runs what it is given, or may; torch.load only where it unpickles tensors alone.
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "yaml.load", "yaml.unsafe_load"),
    *("yaml.full_load", "yaml.load_all", "joblib.load", "hub.load", "torch.hub.load"),
}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def dangers(source):
    """What a module must not do, by line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or "", *(f"{node.module}.{name}" for name in modules)]
            for module in modules:
                if module.split(".")[0] in FORBIDDEN_MODULES or module in FORBIDDEN_CALLS:
                    yield node.lineno, module
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in FORBIDDEN_CALLS:
            yield node.lineno, called
        if called == "torch.load" and given.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True"
        if given.get("shell", "False") != "False":
            yield node.lineno, "shell"
        if given.get("allow_pickle", "False") != "False":
            yield node.lineno, "allow_pickle"
        if called.endswith((".extractall", ".extract")):
            yield node.lineno, called


@pytest.mark.parametrize(
    "source",
    [
        "subprocess.run(command, shell=True)",
        "os.system(command)",
        "import pickle",
        "from pickle import load",
        "from os import system",
        "eval(text)",
        "exec(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text)",
        "np.load(path, allow_pickle=True)",
        "archive.extractall(folder)",
        "tempfile.mktemp()",
    ],
)
def test_dangers_are_recognised(source):
    assert list(dangers(source))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "torch.load(path, weights_only=True)",
        "yaml.safe_load(text)",
        "subprocess.run([program, name])",
        "re.compile(pattern)",
        "torch.compile(model)",
    ],
)
def test_safe_calls_are_accepted(source):
    assert not list(dangers(source))


def test_nothing_in_the_source_runs_what_it_is_given():
    root = PACKAGE_ROOT.parent
    paths = [*PACKAGE_ROOT.rglob("*.py"), *(root / "benchmarks").rglob("*.py"), *root.glob("*.py")]
    assert len(paths) > 60
    found = [
        f"{path}:{line}: {what}"
        for path in paths
        for line, what in dangers(path.read_text(encoding="utf-8"))
    ]
    assert found == []
