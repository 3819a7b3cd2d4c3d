"""The command ``uniadapter prepare``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

from lavis_uniadapter.tools import arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands; returns its exit status, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="uniadapter prepare",
        description="Convert the published files of a benchmark to LAVIS's annotations, and videos "
        "to frames that train faster; check files.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_benchmarks(commands)
    _add_frames(commands)
    _add_check(commands)
    _add_emoji(commands)
    args = parser.parse_args(argv)

    import lavis_uniadapter.registration  # noqa: F401
    from lavis_uniadapter.common.errors import ConfigError, disk_problem
    from lavis_uniadapter.datasets.records import DatasetError

    module, function = args.run
    try:
        return getattr(import_module(f"lavis_uniadapter.tools.prepare.{module}"), function)(args)
    except (ConfigError, DatasetError, OSError) as error:
        print(f"error: {disk_problem(error) or error}", file=sys.stderr)
        return 2


def _add_benchmarks(commands: argparse._SubParsersAction) -> None:
    shared = argparse.ArgumentParser(add_help=False)
    add = partial(shared.add_argument, required=True, metavar="DIR")
    add("--videos", type=arguments.folder, help="folder of the videos")
    add("--output", type=Path, help="folder of the annotation files")
    flag = partial(shared.add_argument, action="store_true")
    flag("--skip-missing", help="leave missing and undecodable videos out of training")
    flag("--allow-other-counts", help="accept numbers that differ from the published ones")
    flag("--overwrite", help="replace annotation files that differ")

    msrvtt = commands.add_parser(
        "msrvtt",
        parents=[shared],
        help="MSR-VTT: retrieval (1k-A) and captioning",
        description="Write MSR-VTT's annotations for retrieval (1k-A test) and captioning "
        "(official splits) in LAVIS's layout.",
    )
    add = partial(msrvtt.add_argument, type=Path, metavar="FILE")
    add("--data", required=True, help="MSRVTT_data.json")
    add("--test-csv", required=True, help="MSRVTT_JSFUSION_test.csv: the 1k-A test")
    text = "MSRVTT_train.9k.csv or MSRVTT_train.7k.csv; without it, the list is made from --data"
    add("--train-csv", help=text)
    add = msrvtt.add_argument
    add("--split", choices=("9k", "7k"), default="9k", help="training list (default 9k)")
    text = "hold N videos out of training for validation, which 1k-A does not have (default 0)"
    add("--num-val", type=int, default=0, metavar="N", help=text)
    add("--seed", type=int, default=42, help="seed that picks those N (default 42)")
    text = "write nothing for captioning, and need none of its videos"
    add("--retrieval-only", action="store_true", help=text)
    msrvtt.set_defaults(run=("annotations", "prepare"), benchmark="msrvtt")

    didemo = commands.add_parser(
        "didemo",
        parents=[shared],
        help="DiDeMo: paragraph retrieval",
        description="Write DiDeMo's annotations for paragraph retrieval in LAVIS's layout: all "
        "descriptions of a video, in the order of the file, are one caption.",
    )
    add = partial(didemo.add_argument, type=Path, metavar="FILE")
    add("--train", required=True, help="train_data.json")
    add("--val", help="val_data.json; without it there is no validation split")
    add("--test", required=True, help="test_data.json")
    didemo.set_defaults(run=("annotations", "prepare"), benchmark="didemo", num_val=0, seed=0)


def _add_frames(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "frames",
        help="extract frames of any videos, to train faster",
        description="Write frames of every video in a folder as <video>.frames.zip, which is read "
        "wherever the video is asked for. Existing archives are kept, so a stopped run continues.",
    )
    add = partial(parser.add_argument, metavar="DIR")
    add("--videos", type=arguments.folder, required=True, help="folder of the videos")
    add("--output", type=Path, help="where to write (default: beside the videos)")
    add = partial(parser.add_argument, type=arguments.positive, metavar="N")
    text = "evenly spaced frames of each video; all of them if it has fewer (default 64)"
    add("--frames", default=64, help=text)
    add("--image-size", default=224, help="their height and width in pixels (default 224)")
    add("--threads", default=os.cpu_count() or 1, help="videos at a time")
    parser.set_defaults(run=("frames", "extract"))


def _add_check(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "check",
        help="find videos, images and extracted frames that cannot be read",
        description="Decode every image below a folder, and of every video or archive of extracted "
        "frames the first frame, the last, and the 8 that evaluation samples by default. Exit "
        "status: 0 if all can be read, 1 if not, 2 for a wrong call, 130 if interrupted, after "
        "reporting what was found so far.",
    )
    add = parser.add_argument
    add("folder", type=arguments.folder, metavar="DIR", help="searched with its subfolders")
    text = "also report files that these annotations (.json, .jsonl, .csv, .tsv) name, if missing"
    add("--annotations", type=Path, nargs="+", default=[], metavar="FILE", help=text)
    add("--thorough", action="store_true", help="decode every frame; give more --timeout")
    text = "write a line of JSON, with file and reason, for each file that cannot be read"
    add("--output", type=arguments.new_file, metavar="FILE", help=text)
    text = "time limit per file (default 60); a file that takes longer counts as unreadable"
    add("--timeout", type=arguments.seconds, default=60, metavar="SECONDS", help=text)
    text = "files at a time"
    add("--threads", type=arguments.positive, default=os.cpu_count() or 1, metavar="N", help=text)
    parser.set_defaults(run=("check", "check"))


def _add_emoji(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "emoji",
        help="a benchmark of emoji, from packages of npm and PyPI",
        description="Write captioned stills of emoji by several artists and clips of emoji by "
        "another one, to train a small BLIP on and to adapt it to. Packages that are missing are "
        "named with the commands that fetch them.",
    )
    add = parser.add_argument
    text = "folder below which the packages are unpacked"
    add("--packages", type=arguments.folder, required=True, metavar="DIR", help=text)
    text = "folder to create (default emoji, where the recipes look)"
    add("--output", type=Path, default=Path("emoji"), metavar="DIR", help=text)
    add("--seed", type=int, default=0, help="of the splits (default 0)")
    parser.set_defaults(run=("emoji.writing", "prepare"))
