"""``uniadapter prepare <command>``; a command is a module with `add_parser`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lavis_uniadapter.runners.launch import USER_ERRORS
from lavis_uniadapter.tools.prepare import check, didemo, frames, msrvtt


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and print its report; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="uniadapter prepare",
        description="Convert the published files of a benchmark to LAVIS's annotations, and videos "
        "to frames that train faster; check files.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    shared = _benchmark_options()
    for benchmark in (msrvtt, didemo):
        benchmark.add_parser(commands, parents=[shared])
    frames.add_parser(commands)
    check.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        report = args.run(args)
    except (*USER_ERRORS, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report)
    # a check that succeeds may have found something
    return getattr(report, "status", 0)


def _benchmark_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    folder = {"type": Path, "required": True, "metavar": "DIR"}
    options.add_argument("--videos", **folder, help="folder of the video files")
    options.add_argument("--output", **folder, help="folder to write the annotation files into")
    options.add_argument(
        "--skip-missing",
        action="store_true",
        help="leave videos that are missing or cannot be decoded out of training; those of "
        "validation and test remain an error",
    )
    options.add_argument(
        "--allow-other-counts",
        action="store_true",
        help="accept numbers of videos and captions other than the published ones",
    )
    options.add_argument(
        "--overwrite", action="store_true", help="replace annotation files that differ"
    )
    return options


if __name__ == "__main__":
    sys.exit(main())
