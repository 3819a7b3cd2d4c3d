"""``uniadapter predict``: what it writes, against the models called directly."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lavis.common.registry import registry
from tiny_runs import ROOT, status_of
from torch import Tensor

from lavis_uniadapter.common import resumable
from lavis_uniadapter.common.distributed import destroy_process_group
from lavis_uniadapter.search.engine import Recipe
from lavis_uniadapter.tools.predict import Captioner, Matcher, predict
from uniadapter_cli.main import main

READABLE = [*(f"{i}.mp4" for i in range(5)), "a.png", "sub/b.jpg", "sub/long.mp4"]
ASKED = {
    "retrieval": ["--text", "a red circle", "--text", "a blue star", "--rerank", "3"],
    "qa": ["--question", "what colour is the shape?", "--question", "where is it?"],
    "caption": [],
}
ANSWERS = ["red", "blue", "left", "a green star"]


def arguments(recipe, source, output, *more):
    """The command line; options come last."""
    start = ["predict", recipe.task, str(source), "--cfg", recipe.name, "--output", str(output)]
    rest = ["--adapter", str(recipe.adapter), *map(str, more), "--options", *recipe.options]
    return [*start, "--workers", "0", *ASKED[recipe.task], *rest]


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def model_of(recipe_of):
    """The model of a recipe, built once."""
    built = {}

    def build(task):
        if task not in built:
            recipe = recipe_of(task)
            built[task] = Recipe(recipe.name, recipe.options, recipe.adapter).model
        return built[task]

    return build


def clip(path: Path) -> Tensor:
    """(1, 3, frames, H, W), by the registered processors."""
    if path.suffix == ".mp4":
        return registry.get_processor_class("blip_video_eval")(image_size=64, n_frms=2)(str(path))[
            None
        ]
    from PIL import Image

    processor = registry.get_processor_class("blip_image_eval")(image_size=64)
    return processor(Image.open(path).convert("RGB"))[None, :, None]


def test_captions_with_scores_and_what_cannot_be_read(recipe_of, model_of, media, tmp_path, capsys):
    recipe, output = recipe_of("caption"), tmp_path / "out.jsonl"
    assert main(arguments(recipe, media, output)) == 1
    printed = capsys.readouterr().out
    assert f"{output}: 8 records of 8 files\nunreadable: 1, in " in printed
    assert "broken.mp4: it cannot be read as a video" in printed
    unreadable = tmp_path / "out.jsonl.unreadable.jsonl"
    assert [r["file"] for r in records(unreadable)] == ["broken.mp4"]
    found = records(output)
    assert [list(record) for record in found] == [["file", "caption", "score"]] * 8
    assert [record["file"] for record in found] == sorted(READABLE)
    for record in found:
        how = {"num_beams": 3, "max_length": 20, "min_length": 3}
        ((text, score),) = model_of("caption").generate_with_scores(
            {"video": clip(media / record["file"])}, **how
        )
        assert record["caption"] == text
        assert record["score"] == pytest.approx(score, abs=2e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == [output.name, unreadable.name]

    table = tmp_path / "out.csv"
    assert main(arguments(recipe, media / "sub", table)) == 0
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == ["b.jpg", "long.mp4"]
    of_sub = {record["file"]: record for record in found if record["file"].startswith("sub/")}
    for row in rows:
        same = of_sub[f"sub/{row['file']}"]
        assert row["caption"] == same["caption"]
        assert float(row["score"]) == pytest.approx(same["score"], abs=2e-4)


def test_several_captions_of_one_file(recipe_of, media, tmp_path):
    output = tmp_path / "out.jsonl"
    assert main(arguments(recipe_of("caption"), media / "a.png", output, "--captions", 3)) == 0
    found = records(output)
    assert [record["file"] for record in found] == ["a.png"] * 3
    assert len({record["caption"] for record in found}) == 3


def test_ranked_answers_with_their_probabilities(recipe_of, model_of, media, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe, output = recipe_of("qa"), tmp_path / "out.jsonl"
    (tmp_path / "answers.txt").write_text("\n".join(ANSWERS) + "\n")
    (tmp_path / "more.csv").write_text("file,question\nsub/long.mp4,how large is it?\n")
    more = ["--answers=~/answers.txt", "--questions", tmp_path / "more.csv", "--top", 4]
    assert main(arguments(recipe, media, output, *more)) == 1
    found = records(output)
    assert len(found) == 4 * (2 * 8 + 1)
    of_long = [r["question"] for r in found if r["file"] == "sub/long.mp4" and r["rank"] == 1]
    assert of_long == [ASKED["qa"][1], ASKED["qa"][3], "how large is it?"]
    asked = registry.get_processor_class("blip_question")()
    for start in range(0, len(found), 4):
        four = found[start : start + 4]
        assert [r["rank"] for r in four] == [1, 2, 3, 4]
        (best,) = model_of("qa").rank_answers(
            {
                "video": clip(media / four[0]["file"]),
                "text_input": [asked(four[0]["question"])],
            },
            ANSWERS,
        )
        assert [r["answer"] for r in four] == [a.answer for a in best]
        assert [r["probability"] for r in four] == pytest.approx(
            [a.probability for a in best], abs=2e-4
        )


def test_generated_answers_with_scores_and_the_recipes_own_list(
    recipe_of, model_of, media, tmp_path
):
    recipe, output = recipe_of("qa"), tmp_path / "out.jsonl"
    assert main(arguments(recipe, media / "0.mp4", output)) == 0
    asked = registry.get_processor_class("blip_question")()
    for record in records(output):
        samples = {"video": clip(media / "0.mp4"), "text_input": [asked(record["question"])]}
        ((text, score),) = model_of("qa").generate_with_scores(samples)
        assert list(record) == ["file", "question", "answer", "score"]
        assert (record["answer"], record["score"]) == (text, pytest.approx(score, abs=2e-4))

    labels = tmp_path / "shapes/clips/annotations/qa_ans2label.json"
    labels.parent.mkdir(parents=True)
    labels.write_text(json.dumps({"left": 0, "red": 1}))
    recipe.options.append(f"run.cache_root={tmp_path}")
    try:
        assert main(arguments(recipe, media / "0.mp4", output, "--overwrite", "--top", 3)) == 0
    finally:
        recipe.options.pop()
    found = records(output)
    assert sorted(record["answer"] for record in found[:2]) == ["left", "red"]
    assert sum(record["probability"] for record in found[:2]) == pytest.approx(1, abs=1e-4)


def test_matches_are_those_of_the_model(recipe_of, model_of, media, tmp_path):
    output = tmp_path / "out.jsonl"
    assert main(arguments(recipe_of("retrieval"), media, output)) == 1
    found, model = records(output), model_of("retrieval")
    columns = ["text", "rank", "file", "probability", "similarity"]
    assert [list(record) for record in found] == [columns] * 16
    clips = {name: clip(media / name) for name in READABLE}
    for text in ("a red circle", "a blue star"):
        rows = [record for record in found if record["text"] == text]
        with torch.no_grad():
            encoded = model.encode_text([text])
            visuals = {name: model.encode_visual({"video": video}) for name, video in clips.items()}
            similarity = {n: float(encoded.feat @ v.feat[0]) for n, v in visuals.items()}
            by_similarity = sorted(similarity, key=lambda name: -similarity[name])
            logits = {n: model.match(encoded, visuals[n])[0] for n in by_similarity[:3]}
        order = sorted(logits, key=lambda name: -float(logits[name][1])) + by_similarity[3:]
        assert [row["file"] for row in rows] == order
        assert [row["rank"] for row in rows] == list(range(1, 9))
        for row in rows:
            assert row["similarity"] == pytest.approx(similarity[row["file"]], abs=2e-4)
            probability = None
            if row["rank"] <= 3:
                probability = float(logits[row["file"]].softmax(dim=0)[1])
                probability = pytest.approx(probability, abs=2e-4)
            assert row["probability"] == probability


def test_recall_equals_the_retrieval_tasks(recipe_of, run, tmp_path):
    recipe = recipe_of("retrieval")
    more = [o for o in recipe.options if not o.startswith("run.cache_root")]
    more += [f"run.cache_root={tmp_path}", "run.k_test=8"]
    more += ["datasets.shapes_retrieval.generate.num_test=24"]
    task = run("shapes_retrieval", *more, f"model.adapter_ckpt={recipe.adapter}", evaluate=True)
    truth = json.loads((tmp_path / "shapes/clips/annotations/test.json").read_text())
    clips = tmp_path / "test_clips"
    clips.mkdir()
    for record in truth:
        shutil.copy(tmp_path / "shapes/clips/videos" / record["video"], clips)
    texts = [record["caption"][0] for record in truth]
    options = [*recipe.options, "run.k_test=8"]
    matcher = Matcher(
        recipe.name, options, recipe.adapter, texts=list(dict.fromkeys(texts)), top=24
    )
    predict(matcher, clips, tmp_path / "out.jsonl", workers=0)
    rank = {(r["text"], r["file"]): r["rank"] for r in records(tmp_path / "out.jsonl")}
    for k in (1, 5, 10):
        recall = sum(rank[text, r["video"]] <= k for text, r in zip(texts, truth, strict=True))
        assert 100 * recall / 24 == pytest.approx(task.metrics["test"][f"t2v_r{k}"], abs=1e-6)


# --- continued ------------------------------------------------------------------------------------


def killed_after(monkeypatch, batches: int, arguments: list[str]) -> None:
    """Run the command in a child that is killed when it has written some batches and a bit."""
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)  # the threads of the parent are not there
        add, calls = resumable.Partial.add, []

        def add_and_die(self, entries):
            if len(calls) == batches:
                add(self, entries[:1])
                with open(self._path, "a") as file:
                    file.write('{"file": "0.mp')
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(1)
            add(self, entries)

        monkeypatch.setattr(resumable.Partial, "add", add_and_die)
        main(arguments)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_a_killed_run_continues_and_leaves_the_same_file(
    every_task, media, tmp_path, monkeypatch, capsys
):
    assert main(arguments(every_task, media, tmp_path / "whole.csv")) == 1
    output = tmp_path / "out.csv"
    killed_after(monkeypatch, 2, arguments(every_task, media, output))
    assert not output.exists()
    capsys.readouterr()
    assert main(arguments(every_task, media, output)) == 1
    earlier = 3 if every_task.task == "qa" else 7  # batches of one file, because of two questions
    assert f"of 8 files, {earlier} done earlier" in capsys.readouterr().out
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()


@pytest.mark.processes
def test_two_processes_write_what_one_writes(recipe_of, media, tmp_path):
    """Also where the second process has nothing to read."""
    together = []
    for name, source in (("all", media), ("few", media / "sub")):
        for task in ("caption", "retrieval"):
            line = arguments(recipe_of(task), source, tmp_path / f"{task}-{name}-1.jsonl")
            assert main(line) == (source is media)
            together.append([word.replace("-1.jsonl", "-2.jsonl") for word in line])
    destroy_process_group()
    script = ROOT / "tests/predict_over_ranks.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), json.dumps(together)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        **{"capture_output": True, "text": True, "timeout": 300},
    )
    assert done.returncode == 0, done.stderr
    for path in tmp_path.glob("*-1.jsonl"):
        for one, two in zip(
            records(path), records(Path(str(path).replace("-1.", "-2."))), strict=True
        ):
            for key in ("probability", "similarity"):  # the last digit depends on the batch
                assert one.pop(key, None) == pytest.approx(two.pop(key, None), abs=2e-5)
            assert one == two


def test_what_was_begun_with_something_else_is_not_continued(
    recipe_of, media, tmp_path, monkeypatch, capsys
):
    recipe, output = recipe_of("qa"), tmp_path / "out.jsonl"
    killed_after(monkeypatch, 1, arguments(recipe, media, output))
    for more, other in (
        (["--question", "why?"], "questions"),
        (["--adapter", recipe_of("qa").adapter.parent / "other"], "adapter"),
    ):
        if other == "adapter":
            model = Recipe(recipe.name, recipe.options).model
            model.adapters.active = "default"
            model.save_adapter(more[1])
        assert main(arguments(recipe, media, output, *more)) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"was begun with another {other}." in error and "--overwrite" in error
    assert main(arguments(recipe, media, output, "--question", "why?", "--overwrite")) == 1
    assert len(records(output)) == 24


def test_a_file_that_changed_meanwhile_is_read_again(recipe_of, media, tmp_path, monkeypatch):
    recipe, output = recipe_of("caption"), tmp_path / "out.jsonl"
    own = Path(shutil.copytree(media, tmp_path / "own"))
    killed_after(monkeypatch, 2, arguments(recipe, own, output))
    shutil.copy(own / "0.mp4", own / "3.mp4")
    assert main(arguments(recipe, own, output)) == 1
    captions = {record["file"]: record["caption"] for record in records(output)}
    assert captions["0.mp4"] == captions["3.mp4"]


def test_an_output_that_another_process_writes_is_refused(recipe_of, media, tmp_path, capsys):
    output = tmp_path / "out.csv"
    with resumable.continued(output, {}, overwrite=False):
        assert main(arguments(recipe_of("caption"), media, output)) == 2
    assert "Another process is writing" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_what_was_done_is_kept(
    recipe_of, media, tmp_path, monkeypatch, capsys
):
    line = arguments(recipe_of("caption"), media / "sub", tmp_path / "out.csv")
    monkeypatch.setattr(
        resumable, "atomic", lambda path: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    assert main(line) == 2
    assert "No space left. Fix that" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(line) == 0
    assert "2 records of 2 files, 2 done earlier" in capsys.readouterr().out


def test_matches_do_not_depend_on_a_file_that_is_gone(recipe_of, media, tmp_path, monkeypatch):
    """It may have kept others from being judged."""
    recipe, own = recipe_of("retrieval"), Path(shutil.copytree(media, tmp_path / "own"))
    (own / "4.mp4").unlink()
    (own / "sub/long.mp4").unlink()
    lines = {
        name: [
            *arguments(recipe, own, tmp_path / f"{name}.jsonl", "--rerank", "1", "--top", "1"),
            "run.batch_size_eval=1",
        ]
        for name in ("out", "anew")
    }
    killed_after(monkeypatch, 6, lines["out"])
    for line in (tmp_path / "out.jsonl.partial").read_text().splitlines()[1:-1]:
        if (entry := json.loads(line)).get("records"):
            (own / entry["file"]).unlink()
    for line in lines.values():
        assert main(line) == 1
    assert records(tmp_path / "out.jsonl") == records(tmp_path / "anew.jsonl")


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "given", "named"),
    [
        ("caption", ["--output", "out.txt"], "must end in .jsonl or .csv"),
        ("caption", ["--output", "no/out.csv"], "Cannot write 'no/out.csv'"),
        (
            "caption",
            ["--output", "there.csv"],
            "exists and is complete. To replace it, give --over",
        ),
        (
            "caption",
            ["--cfg", "shapes_qa", "--options", "run.seed=1"],
            "Use 'uniadapter predict qa'",
        ),
        ("caption", ["--cfg", "shapes_captoin"], "Did you mean 'shapes_caption'"),
        ("caption", ["--captions", "0"], "0 is not a whole number of 1 or more"),
        ("caption", ["--captions", "4"], "no more than beams"),
        ("caption", ["--adapter", "none"], "no adapter folder 'none'"),
        ("caption", ["--options", "model.pretrained=null"], "would be random"),
        ("qa", [], "Give --question TEXT or --questions FILE"),
        ("qa", ["--question", " "], "is not a text with words"),
        ("qa", ["--questions", "none.txt"], "none.txt is not an existing file"),
        ("qa", ["--questions", "bad.csv"], "bad.csv:1: has no column 'question'"),
        ("qa", ["--questions", "elsewhere.csv"], "question about 'x.mp4'"),
        ("qa", ["--question", "a", "--answers", "bad.txt"], "bad.txt:2"),
        ("qa", ["--question", "a", "--answers", "odd.txt"], "which has no token"),
        ("qa", ["--question", "..."], "'...' has no words"),
        ("qa", ["--question", "???"], "'???' has no words"),
        ("retrieval", ["--text", "a", "--rerank", "-1"], "-1 is not a whole number of 0"),
        ("retrieval", ["--text", "..."], "'...' has no words"),
    ],
)
def test_a_mistake_is_one_line(recipe_of, task, given, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "media").mkdir()
    (tmp_path / "media/a.png").write_bytes(b"never read")
    (tmp_path / "there.csv").write_text("")
    (tmp_path / "bad.csv").write_text("file,qestion\na.png,why?\n")
    (tmp_path / "elsewhere.csv").write_text("file,question\nx.mp4,why?\n")
    (tmp_path / "bad.txt").write_text("red\n\nblue")
    (tmp_path / "odd.txt").write_text("red\n\u200b", encoding="utf-8")
    before = sorted(path.name for path in tmp_path.iterdir())
    start = ["predict", task, "media", "--cfg", f"shapes_{task}", "--output", "out.csv"]
    options = [] if "--options" in given else ["--options", *recipe_of(task).options]
    assert status_of([*start, *given, *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in error and named in error
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_scores_that_are_not_finite_are_refused(recipe_of, media, tmp_path, capsys, monkeypatch):
    compute = Recipe.computing

    def spoilt(self):
        torch.nn.init.constant_(self.model.visual_encoder.patch_embed.proj.bias, float("nan"))
        return compute(self)

    monkeypatch.setattr(Recipe, "computing", spoilt)
    for task in ("retrieval", "caption"):
        assert main(arguments(recipe_of(task), media, tmp_path / "out.csv")) == 2
        assert "Scores are not finite" in capsys.readouterr().err.splitlines()[-1]
        (tmp_path / "out.csv.partial").unlink()


def test_a_folder_without_media_and_a_file_that_is_none(recipe_of, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no picture")
    for source, named in ((tmp_path, "holds no images"), (tmp_path / "notes.txt", "no folder")):
        assert main(arguments(recipe_of("caption"), source, tmp_path / "out.csv")) == 2
        assert named in capsys.readouterr().err


def test_a_base_without_the_heads_is_refused_unless_an_adapter_has_them(
    recipe_of, media, tmp_path, capsys
):
    recipe = recipe_of("retrieval")
    (path,) = (o.split("=")[1] for o in recipe.options if o.startswith("model.pretrained"))
    state = torch.load(path, weights_only=True)["model"]
    headless = {k: v for k, v in state.items() if "_proj." not in k and "itm_head" not in k}
    torch.save({"model": headless}, tmp_path / "headless.pth")
    start = ["predict", "retrieval", str(media / "a.png"), "--cfg", recipe.name, "--text", "a"]
    start += ["--output", str(tmp_path / "out.csv"), "--workers", "0", "--options"]
    assert main([*start, *recipe.options, f"model.pretrained={tmp_path / 'headless.pth'}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "has no vision_proj, text_proj, itm_head" in error


def test_from_python(recipe_of, media):
    recipe = recipe_of("caption")
    captioner = Captioner(recipe.name, recipe.options, recipe.adapter, captions=2)
    records = captioner(["x", "y"], torch.zeros(2, 1, 64, 64, 3, dtype=torch.uint8))
    assert [len(each) for each in records] == [2, 2] and records[0] == records[1]
