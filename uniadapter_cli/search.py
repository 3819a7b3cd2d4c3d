"""``uniadapter search``: index a folder, query it, serve its page."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from uniadapter_cli.runs import add_options, import_launch

INDEX = "search_index"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``index``, ``query`` or ``serve``; returns the exit status."""
    args = _parser().parse_args(argv)
    launch = import_launch()
    return launch.exit_status(lambda: args.run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uniadapter search",
        description="Search your own images and clips by text, with an adapted model.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_index(commands)
    _add_query(commands)
    _add_serve(commands)
    return parser


def _command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.add_argument("--index", default=INDEX, metavar="FOLDER", help=f"default: {INDEX}")
    parser.set_defaults(run=run)
    return parser


def _add_index(commands) -> None:
    parser = _command(
        commands, "index", _index, "index the images and videos below a folder, or update the index"
    )
    parser.add_argument("folder", metavar="DIR", help="searched with its subfolders")
    parser.add_argument(
        "--cfg", metavar="RECIPE", help="retrieval recipe, by name or file; not needed to update"
    )
    parser.add_argument("--adapter", metavar="FOLDER", help="what save_adapter or a run wrote")
    parser.add_argument(
        "--store",
        default="numpy",
        metavar="STORE",
        help="numpy (default), milvus (a file in the index), or milvus:http://HOST:19530",
    )
    parser.add_argument(
        "--window", type=float, default=10, metavar="SECONDS", help="of a segment (default 10)"
    )
    parser.add_argument(
        "--workers", type=int, default=2, metavar="N", help="processes that read files"
    )
    parser.add_argument(
        "--timeout", type=float, default=120, metavar="SECONDS", help="that a file may take"
    )
    add_options(parser)


def _add_query(commands) -> None:
    parser = _command(commands, "query", _query, "print what matches a text or an image")
    parser.add_argument("text", nargs="?", metavar="TEXT")
    parser.add_argument("--image", metavar="FILE", help="search by an image instead")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="results (default 10)")
    parser.add_argument(
        "--rerank",
        type=int,
        default=32,
        metavar="N",
        help="candidates that the matching head judges (default 32)",
    )
    parser.add_argument(
        "--min-probability", type=float, default=0.0, metavar="P", help="leave out what is below"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_serve(commands) -> None:
    parser = _command(commands, "serve", _serve, "open the page of an index in a browser")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8642)
    parser.add_argument(
        "--allow-host",
        nargs="+",
        default=[],
        metavar="NAME",
        help="further names under which browsers may address the server",
    )
    parser.add_argument(
        "--token-cache",
        type=float,
        default=1.0,
        metavar="GB",
        help="memory for the visual tokens of recent results (default 1)",
    )
    parser.add_argument("--qa-cfg", metavar="RECIPE", help="answers questions about a clip")
    parser.add_argument("--qa-adapter", metavar="FOLDER")
    parser.add_argument("--qa-options", nargs="+", default=[], metavar="section.key=value")


def _index(args: argparse.Namespace) -> None:
    from lavis.common.dist_utils import is_main_process

    from lavis_uniadapter.search import Index

    summary = Index.build(
        args.index,
        args.folder,
        args.cfg,
        args.options,
        adapter=args.adapter,
        store=args.store,
        window=args.window,
        workers=args.workers,
        timeout=args.timeout,
    )
    if is_main_process():
        print(summary)


def _query(args: argparse.Namespace) -> None:
    from lavis_uniadapter.common.errors import ConfigError
    from lavis_uniadapter.processors.images import ImageError, read_image
    from lavis_uniadapter.search import Index

    image = None
    if args.image:
        if args.min_probability:
            raise ConfigError("--min-probability is for texts: an image has no probability.")
        try:
            image = read_image(args.image)
        except ImageError as error:
            raise ConfigError(f"'{args.image}': {error}.") from None
    hits = Index.open(args.index).query(
        args.text,
        image=image,
        top=args.top,
        rerank=args.rerank,
        min_probability=args.min_probability,
    )
    if args.json:
        print(json.dumps([hit.as_dict() for hit in hits], indent=2))
        return
    if not hits:
        print("nothing matches", file=sys.stderr)
    for hit in hits:
        sure = f"{hit.similarity:6.3f}" if hit.probability is None else f"{hit.probability:6.1%}"
        when = f"{hit.start:8.1f} to {hit.end:.1f} s" if hit.end else ""
        print(f"{hit.rank:4}  {sure}  {hit.path}  {when}".rstrip())


def _serve(args: argparse.Namespace) -> None:
    import uvicorn

    from lavis_uniadapter.search import Index
    from lavis_uniadapter.search.answering import Answerer
    from lavis_uniadapter.search.server import LOCAL_HOSTS, make_app
    from lavis_uniadapter.tools import recipes

    answerer = None
    if args.qa_cfg:
        recipe = recipes.find(args.qa_cfg, recipes.runs())
        answerer = Answerer(recipe, args.qa_options, args.qa_adapter)
    index = Index.open(args.index, token_cache=args.token_cache)
    app = make_app(index, answerer, [*LOCAL_HOSTS, args.host, *args.allow_host])
    print(f"serving {len(index)} segments at http://{args.host}:{args.port} (Ctrl-C ends)")
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
