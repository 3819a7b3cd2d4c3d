"""``uniadapter search``, as it is typed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request

import pytest
from search_media import RECIPE
from tiny_runs import ROOT, status_of

from lavis_uniadapter.common.distributed import destroy_process_group
from uniadapter_cli.main import main


@pytest.fixture(autouse=True)
def _leave_the_group():
    yield
    destroy_process_group()


def test_index_then_query(media, options, trained, tmp_path, capsys):
    folder = str(tmp_path / "index")
    index = ["search", "index", str(media), "--index", folder, "--workers", "0"]
    first = ["--cfg", str(RECIPE), "--adapter", str(trained[1]), "--options", *options]
    assert main([*index, *first]) == 0
    assert "5 new, 0 changed, 0 gone, 0 unchanged, 1 unreadable" in capsys.readouterr().out
    assert main(index) == 0  # the recipe and the adapter are in the index
    assert "0 new, 0 changed, 0 gone, 5 unchanged, 1 unreadable" in capsys.readouterr().out

    query = ["search", "query", "--index", folder]
    assert main([*query, "a red circle", "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].split()[0] == "1" and "%" in lines[0]
    assert str(media) in lines[0]

    assert main([*query, "a red circle", "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)
    assert [hit["rank"] for hit in hits] == list(range(1, 6))
    assert all(0 <= hit["probability"] <= 1 for hit in hits)

    assert main([*query, "--image", str(media / "a.png"), "--top", "1"]) == 0
    assert "a.png" in capsys.readouterr().out

    assert main([*query, "a red circle", "--min-probability", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "nothing matches" in captured.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["query", "a", "--index", "NOWHERE"], "'NOWHERE' holds no index"),
        (["index", "NOWHERE", "--cfg", "shapes_retrieval"], "no folder"),
        (["index", ".", "--cfg", "shapes_retreival"], "Did you mean 'shapes_retrieval'"),
        (["index", "."], "holds no index"),
        (
            ["index", ".", "--cfg", "shapes_retrieval", "--window", "0"],
            "0 is not a number of seconds",
        ),
        (["index", ".", "--cfg", "shapes_retrieval", "--window", "nan"], "nan is not a number"),
        (["query", "--index", ".", "--image", "NOWHERE.png"], "NOWHERE.png"),
        (
            ["query", "--index", ".", "--image", __file__, "--min-probability", "0.5"],
            "is for texts",
        ),
        (["query", "a", "--index", ".", "--image", __file__], "one of the two"),
        (["query", "--index", "."], "one of the two"),
        (["query", "", "--index", "."], "is not a text with words"),
        (["query", "a", "--index", ".", "--top", "0"], "0 is not a whole number of 1"),
        (["query", "a", "--index", ".", "--min-probability", "50"], "50 is not a number from"),
        (["serve", "--index", ".", "--port", "80000"], "80000 is not a port"),
    ],
)
def test_a_mistake_is_one_line(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert status_of(["search", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert "error: " in error.splitlines()[-1] and named in error.splitlines()[-1]
    assert error.startswith("error: ") == ("\n" not in error)  # or after argparse's usage
    assert not list(tmp_path.iterdir())


@pytest.mark.processes
def test_the_server_starts_says_where_and_ends_on_ctrl_c(built):
    command = [sys.executable, "-m", "uniadapter_cli", "search", "serve", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)
    with subprocess.Popen(
        [*command, "--index", str(built)],
        **{"env": environment, "stdout": subprocess.PIPE, "text": True},
    ) as process:
        line = process.stdout.readline()
        while line and "serving" not in line:
            line = process.stdout.readline()
        assert "serving 7 segments at http://127.0.0.1:" in line
        address = line.split(" at ")[1].split()[0]
        # it listens already
        with urllib.request.urlopen(f"{address}/api/about", timeout=60) as answer:
            assert json.load(answer)["segments"] == 7
        process.send_signal(2)
        assert process.wait(timeout=20) in (0, 130)


def test_a_port_that_is_taken_is_one_line(built, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = ["search", "serve", "--index", str(built), "--port", str(port)]
        assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert f"Cannot listen on 127.0.0.1, port {port}" in error and "\n" not in error
