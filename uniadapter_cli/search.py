"""``uniadapter search``: index a folder, query it, serve its page."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import sys
from collections.abc import Sequence

from lavis_uniadapter.common.config import validate
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.tools import arguments, recipes
from uniadapter_cli.runs import add_options, import_launch

INDEX = "search_index"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``index``, ``query`` or ``serve``; returns the exit status."""
    args = _parser().parse_args(argv)
    _check(args)
    launch = import_launch()
    return launch.exit_status(lambda: args.run(args))


def _check(args: argparse.Namespace) -> None:
    """Raise ConfigError for what is known to be wrong before LAVIS is imported."""
    if args.run is not _index and not os.path.isdir(args.index):
        raise ConfigError(
            f"'{args.index}' holds no index. Build one: uniadapter search index DIR --cfg RECIPE "
            f"--index {args.index}"
        )
    if args.run is _query and (args.text is None) == (args.image is None):
        raise ConfigError("Search for a TEXT or an --image, one of the two.")
    for prefix in ("", "qa_"):
        if cfg := getattr(args, f"{prefix}cfg", None):
            options = [*getattr(args, f"{prefix}options"), "run.evaluate=True"]
            validate(recipes.find(cfg, recipes.runs()), options)


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
    parser.add_argument(
        "--index", type=arguments.path, default=INDEX, metavar="FOLDER", help=f"default: {INDEX}"
    )
    parser.set_defaults(run=run)
    return parser


def _add_index(commands) -> None:
    parser = _command(
        commands, "index", _index, "index the images and videos below a folder, or update the index"
    )
    parser.add_argument(
        "folder", type=arguments.path, metavar="DIR", help="searched with its subfolders"
    )
    parser.add_argument(
        "--cfg", metavar="RECIPE", help="retrieval recipe, by name or file; not needed to update"
    )
    parser.add_argument(
        "--adapter", type=arguments.path, metavar="FOLDER", help="what save_adapter or a run wrote"
    )
    parser.add_argument(
        "--store",
        metavar="STORE",
        help="numpy (default), milvus (a file in the index), or milvus:http://HOST:19530",
    )
    parser.add_argument(
        "--window", type=arguments.seconds, metavar="SECONDS", help="segment length (default 10)"
    )
    parser.add_argument(
        "--workers",
        type=arguments.count,
        default=2,
        metavar="N",
        help="processes that read files (default 2); with 0 a file that crashes or hangs the "
        "decoder stops the command",
    )
    parser.add_argument(
        "--timeout",
        type=arguments.seconds,
        default=120,
        metavar="SECONDS",
        help="without a new segment, after which a file counts as unreadable (default 120)",
    )
    parser.add_argument(
        "--rebuild",
        action="store_true",
        help="delete the index and build it again; what is not given stays as it was built",
    )
    add_options(parser)


def _add_query(commands) -> None:
    parser = _command(commands, "query", _query, "print what matches a text or an image")
    parser.add_argument("text", nargs="?", type=arguments.text, metavar="TEXT")
    parser.add_argument(
        "--image", type=arguments.file, metavar="FILE", help="search by an image instead"
    )
    parser.add_argument(
        "--top", type=arguments.positive, default=10, metavar="N", help="results (default 10)"
    )
    parser.add_argument(
        "--rerank",
        type=arguments.count,
        default=32,
        metavar="N",
        help="candidates that the matching head judges (default 32)",
    )
    parser.add_argument(
        "--min-probability",
        type=arguments.probability,
        default=0.0,
        metavar="P",
        help="hide hits below it (0 to 1)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_options(parser)


def _add_serve(commands) -> None:
    parser = _command(commands, "serve", _serve, "open the page of an index in a browser")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument(
        "--port", type=arguments.port, default=8642, help="default 8642; 0: any free port"
    )
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
    add_options(parser)
    parser.add_argument("--qa-adapter", type=arguments.path, metavar="FOLDER")
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
        rebuild=args.rebuild,
    )
    if is_main_process():
        print(summary)


def _query(args: argparse.Namespace) -> None:
    from lavis_uniadapter.processors.images import ImageError, read_image
    from lavis_uniadapter.search import Index

    image = None
    if args.image:
        if args.min_probability:
            raise ConfigError("--min-probability is for texts: an image has no probability.")
        try:
            image = read_image(args.image)
        except (ImageError, OSError) as error:
            raise ConfigError(f"'{args.image}': {error}.") from None
    hits = Index.open(args.index, args.options).query(
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
        when = f"{hit.best:8.1f} s of {hit.start:.1f} to {hit.end:.1f} s" if hit.end else ""
        print(f"{hit.rank:4}  {sure}  {hit.path}  {when}".rstrip())


def _serve(args: argparse.Namespace) -> None:
    import uvicorn

    from lavis_uniadapter.search import Index
    from lavis_uniadapter.search.answering import Answerer
    from lavis_uniadapter.search.server import LOCAL_HOSTS, make_app

    answerer = None
    if args.qa_cfg:
        recipe = recipes.find(args.qa_cfg, recipes.runs())
        answerer = Answerer(recipe, args.qa_options, args.qa_adapter)
    listener = _listen(args.host, args.port)
    index = Index.open(args.index, args.options, token_cache=args.token_cache)
    app = make_app(index, answerer, [*LOCAL_HOSTS, args.host, *args.allow_host])
    name = f"[{args.host}]" if ":" in args.host else args.host
    address = f"http://{name}:{listener.getsockname()[1]}"
    print(f"serving {len(index)} segments at {address} (press Ctrl-C to stop)", flush=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it once it has shut down
        server.run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"Cannot listen on {host}, port {port}: {error}. Give another --host or --port "
            "(0: any free port)."
        ) from None
