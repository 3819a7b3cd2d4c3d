"""``uniadapter compare``: run methods side by side, make a table and a plot."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.tools import arguments, recipes
from lavis_uniadapter.tools.compare.plan import check_runs, read_plan
from uniadapter_cli.runs import add_options, import_launch, names_and_options


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit status 1 if a run failed, 2 if nothing could be run."""
    parser = _parser()
    args = parser.parse_intermixed_args(argv)
    names, options = names_and_options(args)
    if len(names) > 1:
        parser.error(f"give one plan, and values as section.key=value; got {', '.join(names)}")
    plan = None
    if names:
        path = recipes.find(names[0], recipes.comparisons())
        plan = read_plan(path, options, args.output_dir, args.metrics, args.runs)
        check_runs(plan)
    elif args.runs:
        raise ConfigError("Give a PLAN, and --runs after it.")
    elif not (args.add and args.metrics and args.output_dir):
        raise ConfigError("Give a PLAN, or --add, --metrics and --output-dir.")
    for item in args.add:
        if not os.path.isdir(item.partition("=")[2]):
            raise ConfigError(f"--add {item!r} is not NAME=FOLDER, with the folder of a run.")

    launch = import_launch()
    from lavis_uniadapter.tools.compare.report import added_lines, write_report
    from lavis_uniadapter.tools.compare.running import Comparison

    launch.log_to_console()
    # as Ctrl-C, whose own signal a background process ignores
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        added = added_lines(args.add)
        lines = Comparison(plan, args.jobs, args.nproc_per_node).run() if plan else []
    except (ConfigError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues from here", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    lines += added
    folder = Path(plan.output_dir if plan else args.output_dir)
    metrics = plan.metrics if plan else args.metrics
    table = write_report(lines, metrics, folder, plan.reference if plan else None)
    print(f"\n{table}\n\nwritten: {folder / 'comparison.{md,csv,json,png}'}")
    return 1 if any(line.failures for line in lines) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uniadapter compare",
        usage="%(prog)s PLAN [section.key=value ...] [--runs NAME ...] [--jobs N] "
        "[--add NAME=FOLDER ...]",
        description="Run each method of a plan with several seeds, each run in its own process, "
        "with a\nlearning rate chosen on validation if the plan lists several. Called again, it "
        "continues\nwhere it stopped. --add puts finished runs from elsewhere into the table, "
        "LAVIS's own included.",
        epilog="PLAN is a name from 'uniadapter ls' or a YAML file; 'uniadapter cp "
        "compare/shapes_methods FILE'\ncopies one to start from.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    add_options(parser)
    parser.add_argument("--add", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--output-dir", metavar="DIR", help="instead of the plan's")
    parser.add_argument("--metrics", nargs="+", help="instead of the plan's")
    parser.add_argument("--runs", nargs="+", metavar="NAME", help="only these runs of the plan")
    parser.add_argument(
        "--jobs", type=arguments.positive, default=1, metavar="N", help="runs at a time"
    )
    parser.add_argument(
        "--nproc-per-node",
        type=arguments.positive,
        default=1,
        metavar="N",
        help="processes of each run",
    )
    return parser
