"""``uniadapter train``, ``evaluate`` and ``demo``.

A module of commands parses arguments and finds files first, and imports LAVIS after that.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from types import ModuleType

from lavis_uniadapter.common.config import validate
from lavis_uniadapter.tools import arguments, recipes


def train(argv: Sequence[str] | None = None) -> int:
    """Train a recipe, then test it; returns the exit status."""
    return _start("train", "Train a recipe, then test it.", argv)


def evaluate(argv: Sequence[str] | None = None) -> int:
    """Test a recipe; returns the exit status."""
    return _start("evaluate", "Test a recipe with a trained adapter.", argv)


def _start(command: str, description: str, argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"uniadapter {command}",
        usage="%(prog)s RECIPE [--adapter FOLDER] [--dry-run] [section.key=value ...]",
        description=description,
        epilog="RECIPE is a name from 'uniadapter ls' or a YAML file. On several GPUs: torchrun "
        f"--nproc_per_node=8 -m uniadapter_cli {command} RECIPE ...",
    )
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    use = "test" if command == "evaluate" else "start training from"
    text = f"{use} this adapter, which save_adapter or a run wrote (model.adapter_ckpt)"
    parser.add_argument("--adapter", metavar="FOLDER", help=text)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the configuration and the data files, and stop before the model is built",
    )
    parser.add_argument("--cfg-path", metavar="FILE", help="the recipe, as in LAVIS's train.py")
    add_options(parser)
    args = parser.parse_intermixed_args(argv)
    names, options = names_and_options(args)
    names += [args.cfg_path] if args.cfg_path else []
    if len(names) != 1:
        given = ", ".join(names) or "none"
        parser.error(f"give one recipe, and values as section.key=value; recipes given: {given}")
    options += [f"model.adapter_ckpt={args.adapter}"] if args.adapter else []
    evaluates = command == "evaluate"
    path = recipes.find(names[0], recipes.runs())
    validate(path, [*options, "run.evaluate=True"] if evaluates else options)

    launch = import_launch()
    work = launch.check if args.dry_run else launch.run
    return launch.exit_status(lambda: work(path, options, evaluates))


def demo(argv: Sequence[str] | None = None) -> int:
    """Run the demo of a task; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="uniadapter demo",
        description="A small BLIP, trained on stills and frozen, adapts to video by UniAdapter.",
    )
    parser.add_argument("task", nargs="?", choices=recipes.STAGES, default="retrieval")
    parser.add_argument("--seed", type=int, default=42, help="of weights and order of training")
    parser.add_argument("--output-dir", type=arguments.path, metavar="DIR", default="output/demo")
    add_options(parser)
    args = parser.parse_args(argv)
    common = [f"run.seed={args.seed}", f"run.output_dir={args.output_dir}", *args.options]
    for recipe in recipes.STAGES[args.task]:
        validate(recipes.runs()[recipe], common)

    launch = import_launch()
    from lavis_uniadapter.tools.demo import run_demo

    return launch.exit_status(lambda: run_demo(args.task, args.seed, args.output_dir, args.options))


def import_launch() -> ModuleType:
    """Register everything with LAVIS; returns the module that starts runs."""
    import lavis_uniadapter.registration  # noqa: F401
    from lavis_uniadapter.runners import launch

    return launch


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--options``, as LAVIS's train.py has it."""
    text = "values that replace the recipe's"
    parser.add_argument("--options", nargs="+", default=[], metavar="section.key=value", help=text)


def names_and_options(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """What is given before and among the options: names, and ``section.key=value``."""
    names = [each for each in args.arguments if "=" not in each or os.path.isfile(each)]
    return names, [each for each in args.arguments if each not in names] + args.options
