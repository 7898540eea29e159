"""The server, its event stream, and `deep-rlhf label`."""

import json
import logging
import queue
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from page_client import Client

from deep_rlhf.cli import label
from deep_rlhf.errors import ConfigError, ResourceError, StoreUnavailable, UserError
from deep_rlhf.feedback.store import Store
from deep_rlhf.web.access.passwords import is_password
from deep_rlhf.web.app import create_app
from deep_rlhf.web.progress import events
from deep_rlhf.web.server import Server

Add = Callable[..., list[int]]
PASSWORD = "correct horse battery"
SECONDS = 60


@pytest.fixture
def server(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(events, "POLL_INTERVAL", 0.02)
    with Server(create_app(store)) as running:
        yield running


@contextmanager
def browser(server: Server, name: str = "anna") -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=SECONDS, follow_redirects=True) as client:
        csrf = Client.csrf_in(client.get("/login").text)
        client.post("/name", data={"csrf": csrf, "name": name})
        yield client


def events_in(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """The events of a stream."""
    for line in lines:
        if line.startswith("event: "):
            yield line.removeprefix("event: "), json.loads(next(lines).removeprefix("data: "))


def test_events_carry_the_state_and_then_the_changes(server: Server, store: Store, add: Add) -> None:
    add(4)
    with browser(server) as client, client.stream("GET", "/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = stream.iter_lines()
        assert next(lines) == "retry: 2000"
        stream_events = events_in(lines)
        first = dict(next(stream_events) for _ in range(4))
        assert first["questions"] == {"waiting": 2}  # the other two are lent to anna
        assert first["people"] == {"event": 0}
        assert first["model"]["rows"] == 0
        add(3)
        assert next(stream_events) == ("questions", {"waiting": 5})
        store.add_metrics([{"step": 1, "reward": 0.5}])
        kind, model = next(stream_events)
        assert (kind, model["rows"]) == ("model", 1)
        store.put("stop", {"by": "anna"})
        kind, model = next(stream_events)
        assert (kind, model["stop"]) == ("model", {"by": "anna"})


def test_events_go_on_after_the_database_was_away(
    server: Server, store: Store, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = threading.Event()

    def away(*_: Any, **__: Any) -> Any:
        looked.set()
        raise StoreUnavailable("away")

    with browser(server) as client, client.stream("GET", "/events") as stream:
        stream_events = events_in(stream.iter_lines())
        for _ in range(4):
            next(stream_events)
        with monkeypatch.context() as broken:
            broken.setattr(store, "waiting", away)
            assert looked.wait(SECONDS)
        add(1)
        assert next(stream_events) == ("questions", {"waiting": 1})


def test_only_so_many_pages_of_a_person_may_listen(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_PER_PERSON", 1)
    with browser(server) as client, client.stream("GET", "/events") as stream:
        lines = stream.iter_lines()  # the stream ends when this is forgotten
        next(lines)
        refused = client.get("/events", headers={"accept": "application/json"})
        assert refused.status_code == 429
        assert list(refused.json()) == ["error"]
        next(lines)


def test_a_server_stops_at_once_with_open_event_streams(store: Store) -> None:
    server = Server(create_app(store)).start()
    with browser(server) as client, client.stream("GET", "/events") as stream:
        lines = stream.iter_lines()
        next(lines)
        server.stop()
        assert not server._thread.is_alive()
        for _ in lines:
            pass
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/health")


def test_an_unavailable_database_gives_503_and_reveals_nothing(
    server: Server, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any, **__: Any) -> Any:
        raise StoreUnavailable("the store on postgresql://secret does not answer")

    with browser(server) as client:
        monkeypatch.setattr(store, "ask", away)
        for accept, path in (("application/json", "/questions"), ("text/html", "/")):
            reply = client.get(path, headers={"accept": accept})
            assert reply.status_code == 503
            assert "secret" not in reply.text


@pytest.mark.parametrize("path", ["/answer", "/skip", "/undo"])
def test_a_form_of_another_store_is_refused(client: Client, store: Store, add: Add, path: str) -> None:
    add(1)
    client.enter().get("/")
    for as_json in (True, False):
        refused = client.submit(path, as_json=as_json, question=1, token="t", choice="tie", store_id="other")
        assert refused.status_code == 409
        assert "another store" in refused.text
    assert store.last_event() == 0
    refused = client.get("/questions?store_id=other", headers={"accept": "application/json"})
    assert refused.status_code == 409
    assert "another store" in refused.json()["error"]
    missing = client.post(path, data={"csrf": client.csrf("/model"), "question": 1, "token": "t", "choice": "tie"})
    assert missing.status_code == 422


def test_every_server_of_a_store_calls_it_by_the_same_name(client: Client, store: Store, tmp_path: Path) -> None:
    name = client.app.state.store_id  # type: ignore[attr-defined]
    assert create_app(store).state.store_id == name
    with Store(tmp_path / "other.db") as other:
        assert create_app(other).state.store_id != name


def test_a_page_that_was_opened_before_somebody_else_logged_in_gets_no_questions(client: Client, add: Add) -> None:
    add(2)
    before = client.enter("anna").csrf("/")
    client.submit("/logout", as_json=False)
    client.enter("bert")
    headers = {"accept": "application/json", "x-csrf-token": before}
    refused = client.get("/questions", headers=headers)
    assert refused.status_code == 409
    assert list(refused.json()) == ["error"]
    assert refused.headers["x-page"] == "outdated"
    assert client.get("/questions", headers=headers | {"x-csrf-token": client.csrf("/")}).status_code == 200


def test_a_port_in_use_is_a_resource_error(store: Store) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ResourceError, match=rf"port {port}: Address already in use.*--port"):
            Server(create_app(store), port=port)


@pytest.mark.parametrize("host", ["300.1.1.1", "203.0.113.1"])  # no address, and none of this machine
def test_a_host_that_is_not_this_machine_is_a_config_error(host: str, store: Store) -> None:
    with pytest.raises(ConfigError, match=rf"{host}, port 0: .*--host"):
        Server(create_app(store), host=host)


def test_an_account_is_added_from_the_command_line(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    path = tmp_path / "labels.db"
    monkeypatch.setenv("DEEP_RLHF_PASSWORD", PASSWORD)
    label.main([f"--store={path}", "--add_user=root", "--role=admin"])
    written = capsys.readouterr().out
    assert "root" in written
    assert "admin" in written
    with Store(path) as store:
        user = store.user("root")
    assert user is not None
    assert user.role == "admin"
    assert is_password(PASSWORD, user.password_hash)
    assert not is_password(PASSWORD + " ", user.password_hash)
    with pytest.raises(UserError, match="'root'"):
        label.main([f"--store={path}", "--add_user=root"])


def test_the_password_is_asked_for_twice(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("DEEP_RLHF_PASSWORD", raising=False)
    command = [f"--store={tmp_path / 'labels.db'}", "--add_user=anna"]
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    with pytest.raises(UserError, match="DEEP_RLHF_PASSWORD"):
        label.main(command)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    typed = iter([PASSWORD, "another one", PASSWORD, PASSWORD])
    monkeypatch.setattr(label.getpass, "getpass", lambda prompt: next(typed))
    with pytest.raises(UserError, match="differ"):
        label.main(command)
    label.main(command)


def test_bad_flags_are_named(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("DEEP_RLHF_TOKEN", raising=False)
    store = f"--store={tmp_path / 'labels.db'}"
    for flags, match in (
        (["--host=0.0.0.0"], r"0\.0\.0\.0: .*--add_user"),
        (["--public_url=https://a.example"], r"https://a\.example: .*--add_user"),
        (["--role=boss"], "--role: .*boss.*admin.*annotator"),
        (["--port=70000"], "port .*70000"),
        (["--lease_seconds=179"], "lease_seconds .*180.*179"),
        (["--hots=x"], "--host"),
    ):
        with pytest.raises(UserError, match=match):
            label.main([store, *flags])


def test_the_command_serves_the_page_and_reveals_no_secret(
    tmp_path: Path, monkeypatch: Any, capfd: Any, caplog: Any
) -> None:
    token = "a-secret-access-token"
    monkeypatch.setenv("DEEP_RLHF_TOKEN", token)
    caplog.set_level(logging.DEBUG)
    servers: queue.Queue[Server] = queue.Queue()
    run = Server.run

    def run_and_tell(server: Server) -> None:
        servers.put(server)
        run(server)

    monkeypatch.setattr(Server, "run", run_and_tell)
    command = threading.Thread(target=label.main, args=([f"--store={tmp_path / 'labels.db'}", "--port=0"],))
    command.start()
    server = servers.get(timeout=SECONDS)
    with httpx.Client(base_url=server.url, timeout=SECONDS, follow_redirects=True) as client:
        csrf = Client.csrf_in(client.get("/").text)
        page = client.post("/login", data={"csrf": csrf, "name": "anna", "password": token})
        session = client.cookies["deep_rlhf_session"]
    assert 'class="card narrow waiting"' in page.text
    server.stop()
    command.join(SECONDS)
    assert not command.is_alive()
    logged = [record.getMessage() for record in caplog.records if not record.name.startswith("http")]  # of the client
    written = "".join([*capfd.readouterr(), *logged])
    assert server.url in written
    assert "0 questions" in written
    for secret in (token, session):
        assert secret not in written
