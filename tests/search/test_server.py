"""What the server answers, and what it refuses."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
from urllib.parse import unquote

import anyio
import httpx
import pytest
from PIL import Image
from search_media import write_image
from starlette.testclient import TestClient

from lavis_uniadapter.search import Index
from lavis_uniadapter.search.server import MAX_UPLOAD, make_app


@pytest.fixture
def client(index):
    return TestClient(make_app(index), base_url="http://127.0.0.1", raise_server_exceptions=False)


@pytest.fixture
def own(build, own_media, tmp_path):
    """A client of an index of a folder that the test may change, and that folder."""
    build(own_media)
    index = Index.open(tmp_path / "index")
    yield (
        TestClient(make_app(index), base_url="http://127.0.0.1", raise_server_exceptions=False),
        own_media,
    )
    index.close()


def stages(answer) -> list[dict]:
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def hit_of(client, file: str) -> dict:
    hits = stages(client.get("/api/search", params={"text": "a red circle"}))[-1]["hits"]
    return next(hit for hit in hits if hit["file"] == file)


def test_a_query_streams_shortlist_progress_and_result(client, index):
    answer = client.get("/api/search", params={"text": "a red circle", "rerank": 6, "top": 3})
    lines = stages(answer)
    assert [line["stage"] for line in lines] == ["shortlist", "matching", "matching", "done"]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    expected = index.query("a red circle", rerank=6, top=3)
    assert [hit["file"] for hit in lines[-1]["hits"]] == [hit.file for hit in expected]
    assert [hit["probability"] for hit in lines[-1]["hits"]] == pytest.approx(
        [hit.probability for hit in expected], abs=2e-3
    )
    # the browser learns nothing of the server's disk
    assert all("path" not in hit for line in lines for hit in line["hits"])


def test_a_query_by_image_and_by_segment(client, media):
    lines = stages(client.post("/api/search", content=(media / "a.png").read_bytes()))
    assert [line["stage"] for line in lines] == ["done"]
    first = lines[0]["hits"][0]
    assert first["file"] == "a.png"
    alike = stages(client.get("/api/search", params={"like": first["segment"]}))
    assert alike[0]["hits"][0]["file"] == "a.png"


def test_media_come_whole_and_in_ranges(client, media):
    segment = hit_of(client, "long.mp4")["segment"]
    content = (media / "long.mp4").read_bytes()
    whole = client.get(f"/media/{segment}")
    assert whole.content == content and whole.headers["content-type"] == "video/mp4"
    part = client.get(f"/media/{segment}", headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, content[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(content)}"
    beyond = client.get(f"/media/{segment}", headers={"Range": f"bytes={len(content)}-"})
    assert beyond.status_code == 416
    assert client.get(f"/media/{segment}", headers={"Range": "bytes=9-3"}).status_code in (400, 416)


def test_frames_are_small_pictures(client):
    hit = hit_of(client, "long.mp4")
    for _, _, segment, number in hit["frames"]:
        answer = client.get(f"/frame/{segment}/{number}.jpg")
        assert Image.open(io.BytesIO(answer.content)).format == "JPEG"
    assert client.get(f"/frame/{hit['segment']}/99.jpg").status_code == 404
    picture = client.get(f"/frame/{hit_of(client, 'a.png')['segment']}/0.jpg")
    assert Image.open(io.BytesIO(picture.content)).size == (80, 60)


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"text": "x" * 10_000}, "10000 characters"),
        ({"text": " "}, "empty"),
        ({}, "empty"),
        ({"like": "987654321"}, "no segment 987654321"),
        ({"like": "-1"}, "like must be"),
        ({"like": "9" * 40}, "like must be"),
        ({"text": "a", "top": "0"}, "top must be"),
        ({"text": "a", "top": "²"}, "top must be"),
        ({"text": "a", "rerank": "1e3"}, "rerank must be"),
    ],
)
def test_a_bad_query_has_a_message(client, parameters, named):
    answer = client.get("/api/search", params=parameters)
    assert answer.status_code == 400 and named in answer.json()["error"]


def test_an_upload_that_is_no_image_or_a_bomb_is_refused(client):
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    assert len(bomb.getvalue()) < 100_000
    cases = {
        b"": "cannot be used",
        b"no image": "cannot be used",
        bomb.getvalue(): "pixels",
    }
    for content, named in cases.items():
        answer = client.post("/api/search", content=content)
        assert answer.status_code == 400 and named in answer.json()["error"]
    assert client.post("/api/search", content=b"x" * (MAX_UPLOAD + 1)).status_code == 413


def test_an_upload_that_stalls_keeps_nobody_waiting(index, media):
    app = make_app(index)

    async def upload_beside_a_stalled_one():
        async def never():
            await asyncio.Event().wait()

        scope = {
            **{"type": "http", "method": "POST", "path": "/api/search", "query_string": b""},
            "headers": [(b"host", b"127.0.0.1")],
        }
        stalled = asyncio.create_task(app(scope, never, never))
        await asyncio.sleep(0)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            content = (media / "a.png").read_bytes()
            answer = await asyncio.wait_for(client.post("/api/search", content=content), 60)
        stalled.cancel()
        return answer

    assert asyncio.run(upload_beside_a_stalled_one()).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/media/../../etc/passwd",
        "/media/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/media//etc/passwd",
        "/media/-1",
        "/media/1%00",
        "/media/99999999999999999999999999",
        "/static/../server.py",
        "/static/%2e%2e/server.py",
        "/static//etc/passwd",
        "/frame/1/..%2f..%2fa.jpg",
    ],
)
def test_nothing_is_served_by_path(index, path):
    """The path as it is, which a client would tidy up first."""
    scope = {"type": "http", "method": "GET", "path": unquote(path), "raw_path": path.encode()}
    scope |= {"query_string": b"", "headers": [(b"host", b"127.0.0.1")], "root_path": ""}
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    anyio.run(make_app(index), scope, receive, send)
    content = b"".join(message.get("body", b"") for message in sent)
    assert 400 <= sent[0]["status"] < 500, path
    assert b"root:" not in content and b"import" not in content


def test_a_link_that_came_later_and_leaves_the_folder_is_not_followed(own, tmp_path):
    client, media = own
    segment = hit_of(client, "a.png")["segment"]
    secret = tmp_path / "secret.png"
    write_image(secret, seed=77)
    (media / "a.png").unlink()
    os.symlink(secret, media / "a.png")
    for path in (f"/media/{segment}", f"/frame/{segment}/0.jpg"):
        answer = client.get(path)
        assert answer.status_code == 404 and "no longer there" in answer.json()["error"]


def test_a_file_that_vanished_or_broke_is_a_message(own):
    client, media = own
    vanished, broken = hit_of(client, "short.mp4"), hit_of(client, "sub/b.jpg")
    (media / "short.mp4").unlink()
    (media / "sub/b.jpg").write_bytes(b"no image")
    answer = client.get(f"/media/{vanished['segment']}")
    assert answer.status_code == 404 and "short.mp4" in answer.json()["error"]
    answer = client.get(f"/frame/{broken['segment']}/0.jpg")
    assert answer.status_code == 422 and "sub/b.jpg" in answer.json()["error"]
    # the rest still works
    assert len(stages(client.get("/api/search", params={"text": "a"}))[-1]["hits"]) == 5


def test_a_foreign_host_or_site_is_refused(client):
    assert client.get("/", headers={"Host": "127.0.0.1:8642"}).status_code == 200
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200)):
        assert client.get("/api/about", headers={"Sec-Fetch-Site": site}).status_code == status


def test_a_link_on_another_site_may_lead_to_the_page_alone(client):
    follows = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    follows["Sec-Fetch-Dest"] = "document"
    assert client.get("/", headers=follows).status_code == 200
    assert client.get("/api/about", headers=follows).status_code == 403
    assert client.get("/", headers={**follows, "Sec-Fetch-Dest": "iframe"}).status_code == 403


def test_every_failure_is_a_message(client, index, monkeypatch):
    def fails(*arguments):
        raise KeyError("of a bug")

    monkeypatch.setattr(index, "_match", fails)
    lines = stages(client.get("/api/search", params={"text": "a"}))
    assert lines[0]["stage"] == "shortlist" and "of a bug" in lines[-1]["error"]
    monkeypatch.setattr(index, "_encode", fails)
    answer = client.get("/api/search", params={"text": "a"})
    assert answer.status_code == 500 and "of a bug" in answer.json()["error"]


def test_a_file_that_has_changed_gives_no_frame_of_another_moment(own):
    client, media = own
    hit = hit_of(client, "long.mp4")
    shutil.copy(media / "short.mp4", media / "long.mp4")
    answer = client.get(f"/frame/{hit['segment']}/0.jpg")
    assert answer.status_code == 422 and "has changed; update the index" in answer.json()["error"]


def test_only_known_formats_are_uploaded(client):
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "ICNS")
    assert client.post("/api/search", content=content.getvalue()).status_code == 400


def test_questions_need_a_model_and_sound_requests(client, index):
    body = {"segment": 1, "question": "what is it?"}
    answer = client.post("/api/answer", json=body)
    assert answer.status_code == 404 and "--qa-cfg" in answer.json()["error"]

    class Echo:
        def answer(self, path, segment, question):
            return {"answer": f"{question} {path.name}", "loading": 0, "seconds": 0}

    client = TestClient(
        make_app(index, Echo()), base_url="http://127.0.0.1", raise_server_exceptions=False
    )
    file = index.segment(1).file
    assert client.post("/api/answer", json=body).json()["answer"].endswith(file.split("/")[-1])
    for content in (
        b"",
        b"[]",
        b'{"segment": "x", "question": "?"}',
        b'{"segment": 1}',
        b'{"segment": Infinity, "question": "?"}',
    ):
        assert client.post("/api/answer", content=content).status_code == 400
    wrong = {"segment": 10**6, "question": "?"}
    assert client.post("/api/answer", json=wrong).status_code == 404


def test_the_page_and_its_parts_are_there(client):
    page = client.get("/")
    assert "text/html" in page.headers["content-type"]
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for name in ("app.js", "style.css"):
        assert client.get(f"/static/{name}").status_code == 200
    about = client.get("/api/about").json()
    assert (about["files"], about["segments"], about["answers"]) == (5, 7, False)


def test_an_empty_index_answers(build, own_media, tmp_path):
    for path in list(own_media.rglob("*.*")):
        path.unlink()
    shutil.copy(__file__, own_media / "broken.mp4")
    build(own_media)
    index = Index.open(tmp_path / "index")
    client = TestClient(make_app(index), base_url="http://127.0.0.1", raise_server_exceptions=False)
    assert stages(client.get("/api/search", params={"text": "a"}))[-1]["hits"] == []
    assert client.get("/api/about").json()["segments"] == 0
    index.close()
