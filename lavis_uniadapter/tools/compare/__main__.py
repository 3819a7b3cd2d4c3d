"""``python -m lavis_uniadapter.compare FILE``: run methods side by side, make a table and a plot.

The file lists configurations; each is run with several seeds, in a process of its own, with a
learning rate chosen on the validation split if the file gives a choice. Called again, it goes on
where it stopped. Folders of runs that finished elsewhere, LAVIS's own baselines included, join the
table by ``--add NAME=FOLDER``.

A file has these keys, of which ``cfg_path``, ``output_dir``, ``metrics`` and ``runs`` are needed:

    cfg_path: ../train/shapes_retrieval.yaml   # of every run; relative to this file
    output_dir: output/compare                 # relative to where the command is run
    metrics: [t2v_r1, v2t_r1]                  # of the test split; the first is plotted
    seeds: [1, 2, 3]
    options: [run.max_epoch=4]                 # for every run
    learning_rates: [3e-4, 1e-3, 3e-3]         # each run's is the best of these on validation
    tuning_seed: 0
    tuning_options: []                         # for the runs that choose a learning rate
    reference: uniadapter                      # differences are taken from this run's metrics
    base: {cfg_path: ../train/shapes_pretrain.yaml}   # trained first; model.pretrained of all
    runs:
      uniadapter: {options: [model.tuning=uniadapter]}
      no PFA: {options: [model.adapter.frame_aware=False], learning_rate_of: uniadapter}
      zero-shot: {options: [model.tuning=full], evaluate: True}
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.runners import launch, run_folders
from lavis_uniadapter.tools.compare.plan import read_plan
from lavis_uniadapter.tools.compare.report import write_report
from lavis_uniadapter.tools.compare.running import Comparison, Line

logger = logging.getLogger("lavis_uniadapter")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit status 1 if a run failed, 2 if nothing could be run."""
    parser = argparse.ArgumentParser(
        prog="python -m lavis_uniadapter.compare",
        description=__doc__.split("\n\n")[1],
        epilog="FILE: " + __doc__.split("\n\n", 2)[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="comparison file")
    parser.add_argument(
        "--options", nargs="+", default=[], metavar="section.key=value", help="for every run"
    )
    parser.add_argument("--add", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--output-dir", help="instead of the file's")
    parser.add_argument("--metrics", nargs="+", help="instead of the file's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--nproc-per-node", type=int, default=1, help="processes of a run")
    args = parser.parse_args(argv)
    launch.log_to_console()
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        added = _added_lines(args.add)
        if args.file is None and not (added and args.metrics and args.output_dir):
            raise ConfigError("Give a comparison FILE, or --add, --metrics and --output-dir.")
        plan = read_plan(args.file, args.options, args.output_dir) if args.file else None
        metrics = args.metrics or plan.metrics
        folder = plan.output_dir if plan else Path(args.output_dir)
        lines = Comparison(plan, args.jobs, args.nproc_per_node).run() if plan else []
    except (ConfigError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    lines += added
    logger.info("\n%s", write_report(lines, metrics, folder, plan and plan.reference))
    logger.info("\nwritten: %s", folder / "comparison.{md,csv,json,png}")
    return 1 if any(line.failures for line in lines) else 0


def _interrupt(*_) -> None:
    """Stop as at Ctrl-C, whose own signal a background process ignores."""
    raise KeyboardInterrupt


def _added_lines(added: Sequence[str]) -> list[Line]:
    """Lines of finished runs' folders, given as NAME=FOLDER; of one name, seeds of one line."""
    lines: dict[str, Line] = {}
    for item in added:
        name, equals, folder = item.partition("=")
        if not equals:
            raise ConfigError(f"--add {item!r} is not NAME=FOLDER.")
        try:
            summary = run_folders.read(Path(folder))
        except FileNotFoundError as error:
            raise ConfigError(str(error)) from error
        lines.setdefault(name, Line(name)).runs.append(summary)
    return list(lines.values())


if __name__ == "__main__":
    sys.exit(main())
