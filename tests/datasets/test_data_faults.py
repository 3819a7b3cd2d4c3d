"""Files that vanish or break while a run is under way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from rotten_videos import KINDS, make_rotten
from tiny_runs import TRAIN, torchrun
from torch._utils import ExceptionWrapper

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.datasets import loading, reading
from lavis_uniadapter.datasets.reading import EvaluationItems, file_of
from lavis_uniadapter.datasets.records import DatasetError
from lavis_uniadapter.evaluation import caption_metrics
from lavis_uniadapter.evaluation.ranking_metrics import retrieval_metrics, retrieval_ranks
from lavis_uniadapter.processors.video import BlipVideoEvalProcessor
from lavis_uniadapter.runners import launch, run_checkpoints
from lavis_uniadapter.runners.faults import UNREADABLE

DATASET = "datasets.shapes_retrieval"
HALVES = (KINDS[:4], KINDS[4:])  # there are six clips to train on


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(reading, "RETRY_AFTER", 0.0)


@pytest.fixture
def clips(run, tmp_path, tiny_cache):
    """Options of a run on clips of its own, all whole so far, and their folder."""
    if not (tiny_cache / "shapes/clips").is_dir():
        run("shapes_retrieval", evaluate=True)  # which generates them
    shutil.copytree(tiny_cache / "shapes/clips", tmp_path / "cache/shapes/clips")
    options = (f"run.cache_root={tmp_path / 'cache'}", "run.max_epoch=2", "run.num_workers=1")
    options += ("run.batch_size_train=3", "run.unreadable_threshold=1")
    return options, tmp_path / "cache/shapes/clips/videos"


def rot(kind: str, path: Path) -> None:
    path.unlink()
    make_rotten(kind, path)


def videos_of(folder: Path, split: str) -> list[Path]:
    annotation = folder.parent / f"annotations/{split}.json"
    names = dict.fromkeys(record["video"] for record in json.loads(annotation.read_text()))
    return [folder / name for name in names]


@pytest.fixture
def unchecked(monkeypatch):
    """What a file becomes after the checks before training."""
    from lavis_uniadapter.datasets import building

    def rot_after_the_checks(do):
        check = building.unreadable_files

        def check_then_rot(dataset, split):
            result = check(dataset, split)
            do(split)
            return result

        monkeypatch.setattr(building, "unreadable_files", check_then_rot)

    return rot_after_the_checks


@pytest.mark.parametrize("kinds", HALVES)
def test_rotten_while_training_is_replaced_and_named(run, clips, unchecked, caplog, kinds):
    options, folder = clips
    bad = dict(zip(kinds, videos_of(folder, "train"), strict=False))
    unchecked(lambda split: [rot(*each) for each in bad.items()] if split == "train" else None)
    with caplog.at_level("WARNING"):
        result = run("shapes_retrieval", *options, "run.valid_splits=[]", "run.num_workers=2")
    noted = [json.loads(line) for line in (result.output_dir / UNREADABLE).read_text().splitlines()]
    for video in bad.values():
        mine = [line for line in noted if line["file"] == str(video)]
        # two captions of each clip, each epoch
        assert [line["epoch"] for line in mine] == [0, 0, 1, 1], video
        assert all(line["reason"] for line in mine)
        assert f"'{video}' cannot be read and is replaced" in caplog.text
    log = [json.loads(line) for line in (result.output_dir / "log.txt").read_text().splitlines()]
    counted = [line["train_unreadable"] for line in log if "train_unreadable" in line]
    assert counted == [2 * len(kinds)] * 2
    assert result.metrics["test"]["mean_recall"] >= 0


@pytest.mark.parametrize("kinds", HALVES)
def test_rotten_before_training_stops_the_run(run, clips, kinds):
    options, folder = clips
    bad = dict(zip(kinds, videos_of(folder, "train"), strict=False))
    for kind, path in bad.items():
        rot(kind, path)
    with pytest.raises(DatasetError) as raised:
        run("shapes_retrieval", *options)
    assert [path.name for path in bad.values() if path.name not in str(raised.value)] == []


@pytest.mark.parametrize("kind", ["truncated", "vanished"])
def test_rotten_in_evaluation_is_an_error_that_names_it(run, clips, unchecked, kind):
    options, folder = clips
    bad = videos_of(folder, "test")[3]
    unchecked(lambda split: rot(kind, bad) if split == "test" else None)
    with pytest.raises(DatasetError, match=rf"{bad.name}' cannot be read .*allow_missing"):
        run("shapes_retrieval", *options, evaluate=True)


def test_rotten_in_evaluation_is_scored_as_wrong_where_that_is_allowed(run, clips, caplog):
    options, folder = clips
    whole = run("shapes_retrieval", *options, evaluate=True).metrics["test"]
    bad = dict(zip(("truncated", "vanished"), videos_of(folder, "test")[3:], strict=True))
    for kind, path in bad.items():
        rot(kind, path)
    with caplog.at_level("WARNING"):
        allowed = (f"{DATASET}.allow_missing=True", "run.job_id=allowed")
        result = run("shapes_retrieval", *options, *allowed, evaluate=True)
    metrics = result.metrics["test"]
    assert metrics["unreadable"] == 2 and "unreadable" not in whole
    noted = json.loads((result.output_dir / "result/unreadable_test.json").read_text())
    assert {line["index"]: line["file"] for line in noted} == {
        index: str(path) for index, path in enumerate(bad.values(), start=3)
    }
    assert "test: 2 unreadable items are scored as wrong" in caplog.text


def test_what_was_not_seen_ranks_last_both_ways(build_model, run, clips):
    """And the others as they would without it, ties and the first stage alone included."""
    options, folder = clips
    bad = videos_of(folder, "test")[3]
    bad.unlink()
    for k_test in (0, 3):
        allowed = (f"{DATASET}.allow_missing=True", f"run.k_test={k_test}")
        runner = run("shapes_retrieval", *options, *allowed, evaluate=True).runner
        loader = runner.dataloaders["test"]
        model = runner.unwrap_dist_model(runner.model)
        v2t, t2v = model.compute_sim_matrix(loader, task_cfg=runner.config.run_cfg)
        dataset = loader.dataset
        ranks = retrieval_ranks(v2t, t2v, dataset.txt2img, dataset.img2txt, "video")
        metrics = retrieval_metrics(ranks)
        mine = dataset.img2txt[3]
        assert all((t2v[text].argsort()[0] == 3) for text in mine)
        others = [text for text in range(v2t.shape[1]) if text not in mine]
        assert v2t[3, mine].max() < v2t[3, others].min()
        assert metrics["v2t_meanr"] >= v2t.shape[1] / len(v2t) / 2


def test_too_many_unreadable_files_stop_the_run_and_save_it(run, clips, unchecked, tmp_path):
    options, folder = clips
    videos = videos_of(folder, "train")

    unchecked(lambda split: [rot("vanished", v) for v in videos[:3]] if split == "train" else 0)
    with pytest.raises(DatasetError, match=r"could not be read.*run.unreadable_threshold 0.2"):
        run("shapes_retrieval", *options, "run.unreadable_threshold=0.2", "run.job_id=stopped")
    run_checkpoints.read(
        folder.parents[3] / "output/shapes_retrieval/stopped/checkpoint_latest.pth"
    )


def test_a_batch_without_any_readable_file_takes_others(run, clips, unchecked):
    options, folder = clips
    bad = videos_of(folder, "train")[0]
    unchecked(lambda split: rot("vanished", bad) if split == "train" else None)
    result = run("shapes_retrieval", *options, "run.batch_size_train=1", "run.valid_splits=[]")
    noted = (result.output_dir / UNREADABLE).read_text().splitlines()
    assert len(noted) == 2 * 2


def test_nothing_readable_at_all_is_an_error(run, clips, unchecked):
    options, folder = clips
    videos = videos_of(folder, "train")
    unchecked(lambda split: [rot("vanished", v) for v in videos] if split == "train" else 0)
    with pytest.raises(DatasetError, match="is .*videos still there"):
        run("shapes_retrieval", *options)


def test_a_file_that_comes_back_is_read(run, clips, monkeypatch):
    options, folder = clips
    options += ("run.num_workers=0",)
    whole = run("shapes_retrieval", *options, "run.job_id=whole")
    whole = run_checkpoints.read(whole.output_dir / "checkpoint_latest.pth")
    decode = BlipVideoEvalProcessor._decode
    failed = set()

    def first_time_fails(processor, path, positions):
        if path not in failed:
            failed.add(path)
            raise OSError(5, "Input/output error")
        return decode(processor, path, positions)

    monkeypatch.setattr(BlipVideoEvalProcessor, "_decode", first_time_fails)
    result = run("shapes_retrieval", *options)
    assert failed and not (result.output_dir / UNREADABLE).exists()
    again = run_checkpoints.read(result.output_dir / "checkpoint_latest.pth")
    for name, value in whole["model"].items():
        assert torch.equal(again["model"][name], value), name


@pytest.mark.parametrize("end", ["hangs", "dies"])
def test_a_worker_that_hangs_or_dies_is_noticed_and_its_file_named(run, clips, monkeypatch, end):
    options, folder = clips
    bad = videos_of(folder, "train")[2]
    decode = BlipVideoEvalProcessor._decode
    main = os.getpid()

    def hang_or_die(processor, path, positions):
        if os.getpid() != main and Path(path).name == bad.name:
            if end == "dies":
                os.kill(os.getpid(), signal.SIGSEGV)
            time.sleep(600)
        return decode(processor, path, positions)

    monkeypatch.setattr(BlipVideoEvalProcessor, "_decode", hang_or_die)
    # PyTorch learns of a death from the signal, from the silence or from the broken connection
    said = {"hangs": "returned no batch for 5 s", "dies": r"A data worker died \("}[end]
    with pytest.raises(DatasetError, match=rf"(?s)({said}).*{bad.name}"):
        run("shapes_retrieval", *options, "run.data_timeout=5", "run.job_id=stopped")
    # what was computed before is kept
    run_checkpoints.read("output/shapes_retrieval/stopped/checkpoint_latest.pth")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(104, "reset by peer"),
        EOFError(),
        # on a GPU, of a thread that lost its worker
        RuntimeError("Pin memory thread exited unexpectedly"),
    ],
)
def test_a_connection_to_a_worker_that_breaks_is_its_death(run, clips, monkeypatch, error):
    options, _ = clips

    def broken(*_):
        raise error
        yield

    monkeypatch.setattr(loading, "from_workers", broken)
    with pytest.raises(DatasetError, match=r"A data worker died \("):
        run("shapes_retrieval", *options)


def test_images_too(run, tmp_path, monkeypatch):
    from lavis_uniadapter.datasets import building

    options = (f"run.cache_root={tmp_path / 'cache'}", "run.unreadable_threshold=1")
    run("shapes_pretrain", *options, "run.job_id=whole", "run.max_epoch=1")
    bad = sorted((tmp_path / "cache").rglob("train_*.png"))[0]
    check = building.unreadable_files

    def check_then_cut(dataset, split):
        result = check(dataset, split)
        bad.write_bytes(bad.read_bytes()[:60])
        return result

    monkeypatch.setattr(building, "unreadable_files", check_then_cut)
    result = run("shapes_pretrain", *options, "run.max_epoch=1", "run.test_splits=[]")
    noted = [json.loads(line) for line in (result.output_dir / UNREADABLE).read_text().splitlines()]
    assert {line["file"] for line in noted} == {str(bad)}


@pytest.mark.parametrize(
    ("name", "answer"), [("shapes_qa", "prediction"), ("shapes_caption", "caption")]
)
def test_questions_and_captions_count_what_is_missing_as_wrong(
    run, tmp_path, monkeypatch, name, answer
):
    monkeypatch.setattr(caption_metrics, "has_java", lambda: False)  # takes seconds to start
    config, section = TRAIN / f"{name}.yaml", f"datasets.{name}"
    options = [
        *(f"run.cache_root={tmp_path / 'cache'}", "run.device=cpu", "run.num_workers=0"),
        *(f"{section}.generate.num_train=6", f"{section}.generate.num_val=4"),
        *(f"{section}.generate.num_test=5", f"{section}.generate.num_frames=6"),
        *(f"{section}.vis_processor.eval.n_frms=2", "model.vit.depth=1", "run.num_beams=1"),
    ]
    launch.check(config, options, evaluate=True)  # which generates the clips
    (folder,) = (tmp_path / "cache").rglob("videos")
    bad = videos_of(folder, "test")[2]
    bad.unlink()
    with pytest.raises(DatasetError, match=bad.name):
        launch.check(config, options, evaluate=True)
    result = launch.run(config, [*options, f"{section}.allow_missing=True"], evaluate=True)
    (path,) = (result.output_dir / "result").glob("test_epoch_*.json")
    items = json.loads(path.read_text())
    missing = [item for item in items if item["file"] == bad.name]
    assert missing and all(item[answer] == "" and item["unreadable"] for item in missing)
    assert result.metrics["test"]["unreadable"] == len(missing)
    assert all("unreadable" not in item for item in items if item["file"] != bad.name)
    assert not any(item.get("correct") for item in missing)


def test_only_tasks_that_score_missing_items_allow_them(run, tmp_path):
    config = OmegaConf.load(TRAIN / "shapes_caption.yaml")
    config.run.task = "captioning"
    config.run.pop("selection_metric", None)
    OmegaConf.save(config, tmp_path / "lavis.yaml")
    with pytest.raises(ConfigError, match="run.task 'captioning'.*cannot score what is missing"):
        launch.run(tmp_path / "lavis.yaml", ["datasets.shapes_caption.allow_missing=True"])


def test_unchecked_files_are_not_opened_before_training(run, clips):
    options, folder = clips
    bad = videos_of(folder, "train")[2]
    bad.write_bytes(b"")
    result = run("shapes_retrieval", *options, "run.check_files=False")
    assert (result.output_dir / UNREADABLE).is_file()
    with pytest.raises(ConfigError, match="skip_missing is True, and run.check_files is False"):
        run("shapes_retrieval", *options, "run.check_files=False", f"{DATASET}.skip_missing=True")


def test_an_unreadable_item_shows_another_file_and_keeps_its_record(run, clips):
    options, folder = clips
    runner = run("shapes_retrieval", *options, evaluate=True).runner
    dataset = runner.datasets["test"]
    items = EvaluationItems(dataset, 0, allow_missing=True)
    before = [dict(record) for record in dataset.annotation]
    Path(file_of(dataset, 1)).unlink()
    (_, second), indices, unreadable = items.__getitems__([0, 1])
    assert [fault.index for fault in unreadable] == [1] and indices == [0, 1]
    assert dataset.annotation == before
    assert second["index"] == 1
    assert torch.equal(second["video"], dataset[2]["video"])


def test_an_unreadable_file_with_many_records_shows_another_file(run, clips, monkeypatch):
    """MSRVTT-QA asks about 24 questions in a row about one clip."""
    monkeypatch.setattr(reading, "RETRY_AFTER", 0.0)
    options, _ = clips
    dataset = run("shapes_retrieval", *options, evaluate=True).runner.datasets["test"]
    shown = dataset[1]["video"]
    first = dataset.annotation[0]
    dataset.annotation[:] = [first] * (reading.MAX_REPLACEMENTS + 4) + dataset.annotation[1:]
    Path(file_of(dataset, 0)).unlink()
    items = EvaluationItems(dataset, 0, allow_missing=True)
    (item,), _, (fault,) = items.__getitems__([0])
    assert fault.index == 0 and torch.equal(item["video"], shown)


def test_lavis_own_retrieval_task_may_not_leave_items_out(run, clips):
    options, _ = clips
    lavis = [*options, f"{DATASET}.allow_missing=True", "run.task=retrieval"]
    with pytest.raises(ConfigError, match="run.task 'retrieval'.*cannot score what is missing"):
        run("shapes_retrieval", *lavis, evaluate=True)


@pytest.mark.processes
def test_a_rank_without_data_ends_the_others_and_says_why(tmp_path, clips):
    """No rank waits for the process group's timeout; the failing rank prints its error."""
    options, folder = clips
    done = torchrun(
        2,
        "tests/rank_without_data.py",
        [*clips_options(options), "run.job_id=one", "run.batch_size_train=1"],
        tmp_path,
        check=False,
    )
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1, done.stderr
    assert "error: rank 1: An item" in errors[0] and "the disk of rank 1 is gone" in errors[0]
    run_checkpoints.read(tmp_path / "output/shapes_retrieval/one/checkpoint_latest.pth")


def clips_options(options):
    from tiny_runs import TINY_CLIPS, TINY_RUN

    return [*TINY_CLIPS, *TINY_RUN, *options]


def test_an_unreadable_item_of_any_dataset_is_named():
    """Also where records are no list called annotation."""

    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise OSError("gone")

    for allow_missing in (False, True):
        with pytest.raises(DatasetError, match="'item 1' cannot be read .OSError: gone"):
            EvaluationItems(Broken(), 0, allow_missing).__getitems__([1])


def test_a_batch_that_cannot_be_pinned_is_named(run, clips, monkeypatch):
    """The thread that pins batches for a GPU hands its errors over as workers do."""
    options, _ = clips
    runner = run("shapes_retrieval", *options, evaluate=True).runner
    from_workers = loading.from_workers

    def fail_to_pin_the_second(*arguments):
        yield next(from_workers(*arguments))
        try:
            raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")
        except RuntimeError:
            ExceptionWrapper(where="in pin memory thread for device 0").reraise()

    monkeypatch.setattr(loading, "from_workers", fail_to_pin_the_second)
    with pytest.raises(DatasetError, match=r"pinned.*\(RuntimeError: CUDA error: .*\)") as raised:
        list(runner.dataloaders["test"])
    # batches of three of the five test clips
    names = [Path(file_of(runner.datasets["test"], index)).name for index in range(5)]
    assert [name in str(raised.value) for name in names] == [False, False, False, True, True]
