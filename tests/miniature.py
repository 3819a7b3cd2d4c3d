"""Miniature data sets, in the folders, file names and fields that LAVIS's builders expect.

Written below a cache root from the paths in LAVIS's own configuration files
(``lavis/configs/datasets``). All words are in the vocabulary of the embedded example.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 50), "blue": (30, 60, 220)}
SHAPES = ("circle", "square", "star")
SIDE = 64


def content(index: int) -> tuple[str, str]:
    """What item ``index`` shows."""
    return list(COLOURS)[index % 3], SHAPES[index // 3 % 3]


def caption(index: int, wording: int = 0) -> str:
    colour, shape = content(index)
    return (f"a {colour} {shape}", f"there is a {colour} {shape} on the left")[wording % 2]


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_image(path: Path, index: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIDE, SIDE), COLOURS[content(index)[0]]).save(path)


def write_video(path: Path, index: int, num_frames: int = 6) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = "mp4v" if path.suffix == ".mp4" else "MJPG"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 8, (SIDE, SIDE))
    assert writer.isOpened()
    for frame in range(num_frames):
        picture = np.full((SIDE, SIDE, 3), COLOURS[content(index)[0]][::-1], np.uint8)
        picture[:, : 8 * frame] //= 2
        writer.write(picture)
    writer.release()


def video_retrieval(cache: Path, folder: str, names: Sequence[str]) -> None:
    """``retrieval_{train,val,test}.json`` and ``videos/``: the first names train, four evaluate."""
    train, val, test = names[:-4], names[-4:-2], names[-2:]
    for index, name in enumerate(names):
        write_video(cache / folder / "videos" / name, index)
    write_json(
        cache / folder / "annotations/retrieval_train.json",
        [{"video": n, "caption": caption(i, w)} for i, n in enumerate(train) for w in (0, 1)],
    )
    for split, part in (("val", val), ("test", test)):
        write_json(
            cache / folder / f"annotations/retrieval_{split}.json",
            [{"video": n, "caption": [caption(names.index(n))]} for n in part],
        )


def video_qa(cache: Path, folder: str, names: Sequence[str]) -> None:
    """``qa_{train,val,test}.json`` and ``qa_ans2label.json``; an answer in each is no class."""
    for index, name in enumerate(names):
        write_video(cache / folder / "videos" / name, index)
    labels = {"red": 0, "green": 1, "blue": 2, "circle": 3, "square": 4}
    write_json(cache / folder / "annotations/qa_ans2label.json", labels)
    parts = {"train": names[:-4], "val": names[-4:-2], "test": names[-2:]}
    number = 0
    for split, part in parts.items():
        records = []
        for name in part:
            colour, shape = content(names.index(name))
            for question, answer in (
                ("what colour is it?", colour),
                ("who holds it?", "star"),
                ("where is it?", shape),
            ):
                records.append(
                    {"video": name, "question": question, "answer": answer, "question_id": number}
                )
                number += 1
        write_json(cache / folder / f"annotations/qa_{split}.json", records)


def video_caption(cache: Path, folder: str, names: Sequence[str]) -> None:
    """``cap_{train,val,test}.json``: a caption a record in training, several in evaluation."""
    for index, name in enumerate(names):
        write_video(cache / folder / "videos" / name, index)
    parts = {"train": names[:-4], "val": names[-4:-2], "test": names[-2:]}
    for split, part in parts.items():
        records = [
            {"video": n, "image_id": names.index(n), "caption": caption(names.index(n), w)}
            for n in part
            for w in (0, 1)
        ]
        write_json(cache / folder / f"annotations/cap_{split}.json", records)


def _coco_name(index: int, split: str) -> str:
    year = "train2014" if split == "train" else "val2014"
    return f"{year}/COCO_{year}_{index + 9:012d}.jpg"


def coco(cache: Path) -> None:
    """Karpathy's splits, for retrieval and captioning: six images to train on, 2 + 2 others."""
    for split, indices in (("train", range(6)), ("val", range(6, 8)), ("test", range(8, 10))):
        names = {i: _coco_name(i, split) for i in indices}
        for index, name in names.items():
            write_image(cache / "coco/images" / name, index)
        if split == "train":
            records = [
                {"image": name, "caption": caption(i, w), "image_id": f"coco_{i}"}
                for i, name in names.items()
                for w in (0, 1)
            ]
        else:
            records = [
                {"image": n, "caption": [caption(i, w) for w in (0, 1)]} for i, n in names.items()
            ]
        write_json(cache / f"coco/annotations/coco_karpathy_{split}.json", records)


def coco_ground_truth(cache: Path) -> None:
    """The files in COCO's own layout that LAVIS's ``captioning`` task scores against."""
    for split in ("val", "test"):
        records = json.loads((cache / f"coco/annotations/coco_karpathy_{split}.json").read_text())
        ids = [int(r["image"].rsplit("_", 1)[1].removesuffix(".jpg")) for r in records]
        pairs = [(i, text) for i, r in zip(ids, records, strict=True) for text in r["caption"]]
        write_json(
            cache / f"coco_gt/coco_karpathy_{split}_gt.json",
            {
                "images": [{"id": i} for i in ids],
                "annotations": [
                    {"image_id": i, "id": n, "caption": text} for n, (i, text) in enumerate(pairs)
                ],
            },
        )


def vqav2(cache: Path) -> None:
    """VQAv2 on COCO's images, and Visual Genome's questions."""
    coco(cache)
    questions = ("what colour is it?", "where is the shape?")

    def records(indices: Sequence[int], split: str) -> list[dict]:
        return [
            {
                "question_id": 10 * i + n,
                "question": question,
                "answer": [content(i)[0]] * 7 + ["left"] * 3 if n == 0 else ["left"] * 10,
                "image": _coco_name(i, split),
                "dataset": "vqa",
            }
            for i in indices
            for n, question in enumerate(questions)
        ]

    folder = cache / "coco/annotations"
    val = records(range(6, 8), "val")
    write_json(folder / "vqa_train.json", records(range(6), "train"))
    write_json(folder / "vqa_val.json", val)
    without_answers = [{k: v for k, v in r.items() if k != "answer"} for r in val]
    write_json(folder / "vqa_val_eval.json", without_answers)
    # VQAv2's test questions are about COCO's images of 2015
    tested = [{**r, "image": r["image"].replace("val2014", "test2015")} for r in without_answers]
    for index, name in enumerate(dict.fromkeys(record["image"] for record in tested)):
        write_image(cache / "coco/images" / name, index)
    write_json(folder / "vqa_test.json", tested)
    write_json(folder / "answer_list.json", [*COLOURS, "left", "right"])
    write_json(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        {
            "info": {},
            "task_type": "Open-Ended",
            "data_type": "mscoco",
            "data_subtype": "val2014",
            "license": {},
            "questions": [
                {"image_id": r["question_id"] // 10, "question": r["question"]}
                | {"question_id": r["question_id"]}
                for r in val
            ],
        },
    )
    write_json(
        folder / "v2_mscoco_val2014_annotations.json",
        {
            "annotations": [
                {
                    "question_id": r["question_id"],
                    "image_id": r["question_id"] // 10,
                    "question_type": "what",
                    "answer_type": "other",
                    "multiple_choice_answer": r["answer"][0],
                    "answers": [
                        {"answer": a, "answer_confidence": "yes", "answer_id": n + 1}
                        for n, a in enumerate(r["answer"])
                    ],
                }
                for r in val
            ]
        },
    )
    visual_genome = []
    for index in range(3):
        write_image(cache / f"vg/images/VG_100K/{index + 1}.jpg", index)
        visual_genome.append(
            {
                "image": f"VG_100K/{index + 1}.jpg",
                "question": "what shape is it?",
                "answer": content(index)[1],
                "question_id": 1000 + index,
                "dataset": "vg",
            }
        )
    write_json(cache / "vg/annotations/vg_qa.json", visual_genome)


def flickr30k(cache: Path) -> None:
    names = [f"flickr30k-images/{1000092795 + i}.jpg" for i in range(8)]
    for index, name in enumerate(names):
        write_image(cache / "flickr30k/images" / name, index)
    write_json(
        cache / "flickr30k/annotations/train.json",
        [
            {"image": name, "caption": caption(i, w), "image_id": i}
            for i, name in enumerate(names[:4])
            for w in (0, 1)
        ],
    )
    for split, part in (("val", names[4:6]), ("test", names[6:])):
        write_json(
            cache / f"flickr30k/annotations/{split}.json",
            [{"image": n, "caption": [caption(names.index(n), w) for w in (0, 1)]} for n in part],
        )


def custom(folder: Path, task: str) -> None:
    """A user's own clips with ``train.csv`` (``qa_train.csv``) and so on."""
    parts = {"train": range(5), "val": range(5, 7), "test": range(7, 9)}
    for split, indices in parts.items():
        rows = ["video,caption" if task != "qa" else "video,question,answer"]
        for index in indices:
            name = f"clip_{index}.mp4"
            write_video(folder / "videos" / name, index)
            colour, shape = content(index)
            if task == "qa":
                rows += [f"{name},what colour is it?,{colour}", f"{name},what is it?,{shape}"]
            else:
                rows += [f'{name},"{caption(index, w)}"' for w in (0, 1)]
        name = f"qa_{split}.csv" if task == "qa" else f"{split}.csv"
        (folder / name).write_text("\n".join(rows) + "\n")


MSRVTT_VIDEOS = tuple(f"video{i}.mp4" for i in range(9))
MSVD_VIDEOS = tuple(f"clip_{i}_{i + 5}.avi" for i in range(9))
DIDEMO_VIDEOS = tuple(f"54322086@N00_{2408598493 + i}_274c77d26a.mp4" for i in range(9))

# What each benchmark's configuration reads, by its name.
BENCHMARKS: dict[str, Callable[[Path], None]] = {
    "msrvtt_retrieval": lambda cache: video_retrieval(cache, "msrvtt", MSRVTT_VIDEOS),
    "didemo_retrieval": lambda cache: video_retrieval(cache, "didemo", DIDEMO_VIDEOS),
    "coco_retrieval": coco,
    "flickr_retrieval": flickr30k,
    "msrvtt_qa": lambda cache: video_qa(cache, "msrvtt", MSRVTT_VIDEOS),
    "msvd_qa": lambda cache: video_qa(cache, "msvd", MSVD_VIDEOS),
    "vqav2": vqav2,
    "coco_caption": coco,
    "msrvtt_caption": lambda cache: video_caption(cache, "msrvtt", MSRVTT_VIDEOS),
    "msvd_caption": lambda cache: video_caption(cache, "msvd", MSVD_VIDEOS),
}
