"""``uniadapter predict``: captions, answers and matches for folders of images and clips."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lavis_uniadapter.common.config import validate
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.common.resumable import check_output
from lavis_uniadapter.tools import arguments, recipes
from uniadapter_cli.runs import add_options, import_launch

# Command: the model that it needs.
MODELS = {
    "retrieval": "blip_uniadapter_retrieval",
    "qa": "blip_uniadapter_vqa",
    "caption": "blip_uniadapter_caption",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Predict; returns 0, or 1 if some files cannot be read."""
    args = _parser().parse_args(argv)
    _check(args)
    launch = import_launch()
    unreadable: list[str] = []

    def work() -> None:
        from lavis_uniadapter.tools.predict import predict

        summary = predict(
            _predictor(args),
            args.source,
            args.output,
            workers=args.workers,
            timeout=args.timeout,
            overwrite=args.overwrite,
        )
        if summary is not None:
            print(summary)
            unreadable.extend(summary.unreadable)

    return launch.exit_status(work) or int(bool(unreadable))


def _check(args: argparse.Namespace) -> None:
    """Check what can be checked without PyTorch."""
    check_output(Path(args.output), args.overwrite)
    if not Path(args.source).exists():
        raise ConfigError(f"There is no folder or file '{args.source}'.")
    for name in ("question", "text"):
        given = getattr(args, name, None)
        if given == [] and getattr(args, f"{name}s") is None:
            raise ConfigError(f"Give --{name} TEXT or --{name}s FILE.")
    recipe = recipes.find(args.cfg, recipes.runs())
    arch = validate(recipe, [*args.options, "run.evaluate=True"])["model"]["arch"]
    if arch != MODELS[args.command]:
        fits = next((name for name, model in MODELS.items() if model == arch), None)
        hint = f" Use 'uniadapter predict {fits}', or another --cfg." if fits else ""
        raise ConfigError(
            f"model.arch of '{args.cfg}' is '{arch}', and 'predict {args.command}' needs "
            f"'{MODELS[args.command]}'.{hint}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uniadapter predict",
        description="Caption images and clips, answer questions about them, or find those that "
        "match texts; each with a score.",
        epilog="On several GPUs: torchrun --nproc_per_node=8 -m uniadapter_cli predict ...",
    )
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)

    caption = _command(commands, "caption", "caption each file")
    text = "captions of each file (default 1)"
    caption.add_argument("--captions", type=arguments.positive, default=1, metavar="N", help=text)

    qa = _command(commands, "qa", "answer questions about each file")
    text = "asked about every file; may be repeated"
    qa.add_argument(
        "--question", type=arguments.text, action="append", default=[], metavar="TEXT", help=text
    )
    text = "a question on each line (.txt), or columns question and file (.csv, .tsv, .jsonl)"
    qa.add_argument("--questions", type=arguments.file, metavar="FILE", help=text)
    text = "candidates to rank, one on each line (.txt); default: the recipe's, if its file is "
    text += "there, else answers are generated"
    qa.add_argument("--answers", type=arguments.file, metavar="FILE", help=text)
    text = "ranked answers to each question (default 1)"
    qa.add_argument("--top", type=arguments.positive, default=1, metavar="N", help=text)

    retrieval = _command(commands, "retrieval", "find the files that match texts")
    text = "what to look for; may be repeated"
    retrieval.add_argument(
        "--text", type=arguments.text, action="append", default=[], metavar="TEXT", help=text
    )
    text = "a text on each line (.txt), or a column text (.csv, .tsv, .jsonl)"
    retrieval.add_argument("--texts", type=arguments.file, metavar="FILE", help=text)
    text = "files for each text (default 10)"
    retrieval.add_argument("--top", type=arguments.positive, default=10, metavar="N", help=text)
    text = "files that the matching head judges for each text (default: run.k_test)"
    retrieval.add_argument("--rerank", type=arguments.count, metavar="N", help=text)
    return parser


def _command(commands, name: str, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    add = parser.add_argument
    text = "images and videos; a folder with its subfolders"
    add("source", type=arguments.path, metavar="DIR_OR_FILE", help=text)
    add("--cfg", required=True, metavar="RECIPE", help="recipe, by name or file")
    add("--adapter", type=arguments.path, metavar="FOLDER", help="what save_adapter or a run wrote")
    text = "a new file, .jsonl or .csv"
    add("--output", type=arguments.path, required=True, metavar="FILE", help=text)
    add("--overwrite", action="store_true", help="replace the output, or what another call began")
    text = "processes that read files (default 2)"
    add("--workers", type=arguments.count, default=2, metavar="N", help=text)
    text = "without a new file, after which those being read count as unreadable (default 120)"
    add("--timeout", type=arguments.seconds, default=120, metavar="SECONDS", help=text)
    add_options(parser)
    return parser


def _predictor(args: argparse.Namespace):
    from lavis_uniadapter.tools.predict import Captioner, Matcher, QuestionAnswerer, lists

    recipe = args.cfg, args.options, args.adapter
    if args.command == "caption":
        return Captioner(*recipe, captions=args.captions)
    if args.command == "retrieval":
        texts = [*args.text, *(lists.read_texts(args.texts) if args.texts else [])]
        return Matcher(*recipe, texts=texts, top=args.top, rerank=args.rerank)
    questions = lists.read_questions(args.questions) if args.questions else {}
    questions[None] = [*args.question, *questions.get(None, [])]
    answers = lists.read_answers(args.answers) if args.answers else None
    return QuestionAnswerer(*recipe, questions=questions, answers=answers, top=args.top)
