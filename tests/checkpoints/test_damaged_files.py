"""What is downloaded, copied or unpickled is a whole checkpoint, or is refused in one line."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ssl import SSLCertVerificationError
from urllib.error import URLError

import pytest
import torch
from huggingface_hub import constants
from transformers import BertTokenizer

from lavis_uniadapter.checkpoints import blip_files, download, tokenizer
from lavis_uniadapter.checkpoints.blip_files import read_state_dict
from lavis_uniadapter.common.errors import CheckpointError, ConfigError
from lavis_uniadapter.common.paths import PACKAGE_ROOT
from lavis_uniadapter.runners import run_checkpoints


def saved(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


WEIGHTS = saved({"model": {"w": torch.arange(1000.0)}})
SHA = hashlib.sha256(WEIGHTS).hexdigest()
# By path: the status, what is sent, and the length that is announced.
ANSWERS = {
    "/blip.pth": (200, WEIGHTS, len(WEIGHTS)),
    f"/blip-{SHA[:8]}.pth": (200, WEIGHTS, len(WEIGHTS)),
    "/blip-20231126.pth": (200, WEIGHTS, len(WEIGHTS)),
    "/blip-0123abcd.pth": (200, WEIGHTS, len(WEIGHTS)),
    "/cut.pth": (200, WEIGHTS[:-700], len(WEIGHTS)),
    "/cut_silently.pth": (200, WEIGHTS[:-700], None),
    "/page.pth": (200, b"<!DOCTYPE html><p>Please log in", 31),
    "/none.pth": (404, b"", 0),
    "/empty.pth": (200, b"", 0),
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        status, content, length = ANSWERS[self.path]
        self.server.asked.append(self.path)
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def address(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def silent(monkeypatch):
    """The address of a server that accepts connections and never answers."""
    monkeypatch.setattr(download, "ANSWER_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def refused(source) -> str:
    with pytest.raises(CheckpointError) as raised:
        read_state_dict(source)
    message = str(raised.value)
    assert str(source) in message and "\n" not in message and "weights_only" not in message
    return message


@pytest.mark.parametrize("path", ["/blip.pth", f"/blip-{SHA[:8]}.pth", "/blip-20231126.pth"])
def test_weights_are_downloaded_once(server, address, tmp_path, path):
    server.asked.clear()
    for _ in range(2):
        assert torch.equal(read_state_dict(address + path)["w"], torch.arange(1000.0))
    assert server.asked == [path]
    assert (tmp_path / "hub/checkpoints" / path[1:]).read_bytes() == WEIGHTS


def test_a_machine_without_the_main_process_downloads_for_itself(address, tmp_path, monkeypatch):
    monkeypatch.setattr(blip_files, "on_main_process", lambda *_, **__: "/cache/of/another/machine")
    assert read_state_dict(f"{address}/blip.pth")["w"].shape == (1000,)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/none.pth", "404"),
        ("/cut.pth", f"ended after {len(WEIGHTS) - 700:,} of {len(WEIGHTS):,} bytes"),
        ("/cut_silently.pth", "instead of a checkpoint"),
        ("/page.pth", "a web page instead of a checkpoint"),
        ("/empty.pth", "instead of a checkpoint"),
        ("/blip-0123abcd.pth", "SHA-256"),
    ],
)
def test_what_is_no_whole_checkpoint_leaves_nothing(address, tmp_path, path, expected):
    assert expected in refused(address + path)
    assert not list((tmp_path / "hub/checkpoints").iterdir())


def test_a_server_that_does_not_answer_is_not_waited_for(address, silent):
    assert "no answer in 0.1 seconds" in refused(f"{silent}/blip.pth")


def test_a_damaged_file_of_the_cache_may_be_deleted(server, address, tmp_path):
    cached = tmp_path / "hub/checkpoints/blip.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(WEIGHTS[:-700])
    with pytest.raises(CheckpointError, match=f"'{cached}' is not a PyTorch .* Delete it, so that"):
        read_state_dict(f"{address}/blip.pth")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty (0 bytes)"),
        (b"<html>", "not a PyTorch checkpoint"),
        (WEIGHTS[:-700], "damaged. Copy or download it again."),
        (WEIGHTS.replace(b"\x00\x00\x80\x3f", b"\x00\x00\x81\x3f", 1), "damaged"),
        (saved({"w": Malicious()}), "mkdir', which could run any code"),
        (saved(torch.zeros(2)), "holds no state dict"),
        (saved({"model": [1]}), "holds no state dict"),
        (saved({"state_dict": torch.zeros(2)}), "holds no state dict"),
    ],
    ids="empty page cut flipped malicious tensor list wrapped".split(),
)
def test_a_file_that_is_no_checkpoint(tmp_path, monkeypatch, content, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blip.pth").write_bytes(content)
    assert expected in refused(tmp_path / "blip.pth")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty (0 bytes)"),
        (WEIGHTS[:-700], "damaged"),
        (WEIGHTS, "not a whole checkpoint of a runner"),
        (saved({"model": Malicious()}), "mkdir', which could run any code"),
    ],
    ids="empty cut weights malicious".split(),
)
def test_a_file_that_no_run_can_continue_from(tmp_path, monkeypatch, content, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latest.pth").write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        run_checkpoints.read("latest.pth")
    message = str(raised.value)
    assert expected in message and "\n" not in message and "weights_only" not in message
    assert not (tmp_path / "hacked").exists()


# --- tokenizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./bert", "/no/such/folder", "a/b/c", "models/", "..", "a b"])
def test_a_tokenizer_that_looks_like_a_path_is_one(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenizer, "_from_hub", lambda name: pytest.fail(name))
    with pytest.raises(ConfigError, match="no such folder|holds no tokenizer"):
        tokenizer.build_tokenizer(name, 30524)


def test_a_hub_that_does_not_answer_is_not_waited_for(silent, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", silent)
    asked = []

    def from_pretrained(name, local_files_only=False):
        asked.append(local_files_only)
        raise OSError("not cached")

    monkeypatch.setattr(BertTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(ConfigError) as raised:
        tokenizer.build_tokenizer("someone/bert", 30524)
    assert asked == [True], "its own client was asked, which tries for minutes"
    message = str(raised.value)
    for expected in ("someone/bert", "no answer in 0.1 seconds", "HF_HUB_OFFLINE", "vocab.txt"):
        assert expected in message
    assert "\n" not in message


def test_without_network_the_hub_is_not_asked(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(tokenizer, "_reach", lambda endpoint: pytest.fail(endpoint))
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        tokenizer.build_tokenizer("someone/bert", 30524)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "lacks|holds no tokenizer"), (b"red\nblue\n", "lacks"), (b"\xff\xfe", "holds no token")],
    ids=["empty", "words", "binary"],
)
def test_a_vocabulary_without_its_special_tokens(tmp_path, content, expected):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=expected) as raised:
        tokenizer.build_tokenizer(str(tmp_path), 30524)
    assert "\n" not in str(raised.value) and "vocab.txt" in str(raised.value)


def test_the_packaged_vocabulary_fits():
    found = tokenizer.build_tokenizer(str(PACKAGE_ROOT / "configs/tokenizers/shapes"), 168)
    assert found.enc_token_id == found.vocab_size + 1


def test_a_certificate_that_python_does_not_know_is_an_answer(monkeypatch):
    """The hub's client has its own (``REQUESTS_CA_BUNDLE``), as behind a company's proxy."""

    def refuse(*_, **__):
        raise URLError(SSLCertVerificationError("self-signed certificate"))

    monkeypatch.setattr(download, "urlopen", refuse)
    tokenizer._reach("https://hub.example")


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), MemoryError()])
def test_a_state_that_cannot_be_read_now_is_not_called_torn(tmp_path, monkeypatch, error):
    path = tmp_path / run_checkpoints.LATEST
    path.write_bytes(WEIGHTS)

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(ConfigError, match="cannot be read: .*(denied|memory)"):
        run_checkpoints.newest_whole(tmp_path)
    assert path.read_bytes() == WEIGHTS
