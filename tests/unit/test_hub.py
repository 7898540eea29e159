"""Pushing a folder to a Hub on the loopback: what arrives there, and that its trouble is a line in the log."""

import base64
import json
import logging
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from facts import assert_names
from huggingface_hub.utils import get_session

from deep_rlhf.errors import UserError
from deep_rlhf.runtime import hub
from deep_rlhf.runtime.hub import check_push_options, push_folder

OID = "0" * 40


class Hub(ThreadingHTTPServer):
    """Takes what `upload_folder` sends; `status` is its answer to the creation of a repository."""

    daemon_threads = True

    def __init__(self, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.status = status
        self.asked: list[tuple[str, str, list[Any]]] = []  # path, authorization, JSON lines of the body
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"

    def bodies(self, path: str) -> list[list[Any]]:
        return [body for asked, _, body in self.asked if asked == path]


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        lines = self.rfile.read(int(self.headers["Content-Length"])).splitlines()
        body = [json.loads(line) for line in lines]
        self.server.asked.append((self.path, self.headers.get("Authorization", ""), body))
        if self.path == "/api/repos/create":
            self.answer(self.server.status, {"url": f"{self.server.endpoint}/me/tuned", "error": "no\nentry"})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in body[0]["files"]
            ]
            self.answer(200, {"files": files})
        elif "/commit/" in self.path:
            self.answer(200, {"commitUrl": f"{self.server.endpoint}/me/tuned/commit/{OID}", "commitOid": OID})
        else:
            self.answer(200 if "/branch/" in self.path else 404, {})

    def do_GET(self) -> None:
        self.answer(404, {"error": "no such repository"})

    def answer(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *parts: Any) -> None:
        pass


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Hub]:
    server = Hub(getattr(request, "param", 200))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    use(monkeypatch, server.endpoint)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/weights.safetensors").write_bytes(bytes(range(256)))
    return tmp_path


def test_a_folder_arrives_with_its_options(served: Hub, folder: Path) -> None:
    push_folder(folder, repo_id="tuned", private=True, token="hf_x", revision="best", commit_message="Score 2.5")
    assert [path for path, _, _ in served.asked] == [
        "/api/repos/create",
        "/api/models/me/tuned/branch/best",
        "/api/models/me/tuned/preupload/best",
        "/api/models/me/tuned/commit/best",
    ]
    assert {authorization for _, authorization, _ in served.asked} == {"Bearer hf_x"}
    ((created,),) = served.bodies("/api/repos/create")
    assert (created["name"], created["organization"]) == ("tuned", None)
    assert created.get("visibility") == "private" or created.get("private") is True  # before huggingface-hub 2
    ((header, *files),) = served.bodies("/api/models/me/tuned/commit/best")
    assert header["value"]["summary"] == "Score 2.5"
    contents = {file["value"]["path"]: base64.b64decode(file["value"]["content"]) for file in files}
    assert contents == {"config.json": b"{}", "deep/weights.safetensors": bytes(range(256))}


@pytest.mark.parametrize("served", [409], indirect=True)
def test_a_repository_that_exists_gets_a_commit(served: Hub, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        push_folder(str(folder), repo_id="me/tuned")
    assert len(served.bodies("/api/models/me/tuned/commit/main")) == 1
    assert caplog.messages == []


@pytest.mark.parametrize("served", [403], indirect=True)
def test_a_hub_that_refuses_is_a_line(served: Hub, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        push_folder(folder, repo_id="me/tuned", token="hf_secret")
    (message,) = caplog.messages
    assert_names(message, folder, "not pushed", "'me/tuned'", "403", "training continues")
    assert "\n" not in message
    assert "hf_secret" not in message
    assert [path for path, _, _ in served.asked] == ["/api/repos/create"]


def test_a_hub_that_is_not_there_is_a_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    use(monkeypatch, f"http://127.0.0.1:{port}")
    with caplog.at_level(logging.WARNING):
        push_folder(folder, repo_id="me/tuned")
    (message,) = caplog.messages
    assert_names(message, folder, "not pushed", "'me/tuned'", "ConnectError")


def test_a_hub_that_never_answers_is_a_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = get_session().timeout
    monkeypatch.setattr(hub, "STALLED", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, caplog.at_level(logging.WARNING):
        use(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        push_folder(folder, repo_id="me/tuned")
    (message,) = caplog.messages
    assert_names(message, folder, "not pushed", "'me/tuned'", "ReadTimeout")
    assert get_session().timeout == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "needs a repo_id like 'name/model'"),
        ({"repo_id": "a/b/c"}, "needs a repo_id like 'name/model': Repo id must be in the form"),
        ({"repo_id": 3}, "needs a repo_id like 'name/model': Repo id must be a string"),
        (
            {"repo_id": "me/tuned", "use_temp_dir": True},
            "takes no use_temp_dir: leave it out, or give repo_id, private",
        ),
        ({"repo_id": "me/tuned", "create_pr": True, "revision": "best"}, "leave revision out"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], said: str, folder: Path) -> None:
    for told in (lambda: check_push_options(options), lambda: push_folder(folder, **options)):
        with pytest.raises(UserError) as caught:
            told()
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_right_options_pass() -> None:
    check_push_options({"repo_id": "me/tuned", "private": True, "create_pr": True, "commit_description": "x"})
