"""The command ``uniadapter``: find the subcommand, import its module, run it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from lavis_uniadapter.common import signals
from lavis_uniadapter.common.errors import ConfigError, disk_problem
from lavis_uniadapter.version import __version__

# Subcommand: function that takes its arguments and returns the exit status, and its help.
COMMANDS = {
    "train": ("uniadapter_cli.runs:train", "train a recipe, then test it"),
    "evaluate": ("uniadapter_cli.runs:evaluate", "test a recipe with a trained adapter"),
    "compare": ("uniadapter_cli.compare:main", "compare tuning methods"),
    "prepare": ("lavis_uniadapter.tools.prepare.command:main", "prepare and check data"),
    "search": ("uniadapter_cli.search:main", "search your own images and clips"),
    "predict": ("uniadapter_cli.predict:main", "caption, answer or match your own files"),
    "doctor": ("uniadapter_cli.doctor:main", "check this environment"),
    "demo": ("uniadapter_cli.runs:demo", "adapt a small BLIP to video in minutes"),
    "ls": ("uniadapter_cli.listing:ls", "list recipes, model types and datasets"),
    "cp": ("uniadapter_cli.listing:cp", "copy a recipe to edit it"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit status: 2 for bad input, 128 + n after signal n."""
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="uniadapter",
        usage="%(prog)s COMMAND ...",
        description="UniAdapter for BLIP: adapt a frozen backbone to images and video.",
        epilog="commands:\n"
        + "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
        + "\n\n'uniadapter COMMAND --help' explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        return 2
    args = parser.parse_args(argv)
    module, function = COMMANDS[args.command][0].split(":")
    try:
        with signals.handled_by(signals.interrupt):
            return getattr(import_module(module), function)(args.arguments)
    except ConfigError as error:
        status, message = 2, f"error: {error}"
    except OSError as error:
        if not (problem := disk_problem(error)):
            raise
        status, message = 2, f"error: {problem}"
    except KeyboardInterrupt as interrupt:
        status, message = signals.describe(interrupt)
    if int(os.environ.get("RANK", "0")) == 0:
        print(message, file=sys.stderr)
    return status
