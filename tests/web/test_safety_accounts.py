"""Access control: accounts, logins, the access token, and what logs and replies reveal about them."""

import itertools
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from page_client import Client

from deep_rlhf.cli import label
from deep_rlhf.errors import ConfigError, StoreUnavailable, UserError
from deep_rlhf.feedback.store import Store
from deep_rlhf.web.access import auth, passwords
from deep_rlhf.web.access.auth import add_account
from deep_rlhf.web.access.cookies import hash_token
from deep_rlhf.web.access.passwords import NO_PASSWORD
from deep_rlhf.web.app import STATIC, WebSettings, create_app
from deep_rlhf.web.progress import events
from deep_rlhf.web.server import Server

Add = Callable[..., list[int]]
PASSWORD, NEW_PASSWORD = "correct horse battery", "another horse battery"
TOKEN = "0123456789abcdef-token"


def public_page(store: Store, **settings: Any) -> Client:
    """A page that other machines reach, with an administrator and an annotator."""
    add_account(store, "root", "admin", PASSWORD)
    add_account(store, "anna", "annotator", PASSWORD)
    return Client(create_app(store, WebSettings(host="0.0.0.0", **settings)), base_url="http://labels.example.org")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: Any, capsys: Any) -> Callable[..., str]:
    """Runs `deep-rlhf label` on the store; returns its output."""
    monkeypatch.setenv("DEEP_RLHF_PASSWORD", NEW_PASSWORD)

    def run(*flags: str) -> str:
        label.main([f"--store={tmp_path / 'labels.db'}", *flags])
        return str(capsys.readouterr().out)

    return run


@pytest.fixture
def public(store: Store) -> Client:
    return public_page(store)


@pytest.mark.parametrize(
    "settings", [{"host": "0.0.0.0"}, {"host": "192.168.0.7"}, {"host": "::"}, {"public_url": "https://a.example"}]
)
def test_a_public_page_does_not_start_without_a_login(store: Store, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"--add_user .*DEEP_RLHF_TOKEN"):
        create_app(store, WebSettings(**settings))
    create_app(store, WebSettings(**settings, token=TOKEN))
    add_account(store, "root", "admin", PASSWORD)
    create_app(store, WebSettings(**settings))


def test_bad_settings_are_refused(store: Store) -> None:
    for bad in ({"token": "short"}, {"port": 70_000}, {"public_url": "labels.example"}, {"public_url": "http://a/b"}):
        with pytest.raises(ConfigError):
            WebSettings(**bad)
    for name, password in (("anna", "short"), ("an\nna", PASSWORD), (" anna", PASSWORD), ("", PASSWORD)):
        with pytest.raises(UserError):
            add_account(store, name, "admin", password)
    assert TOKEN not in repr(WebSettings(token=TOKEN))


def test_no_page_is_served_without_a_login(public: Client, add: Add) -> None:
    add(1)
    for path in ("/questions", "/progress", "/model/status", "/model/history", "/model/versions", "/events"):
        answer = public.get(path, headers={"accept": "application/json"})
        assert answer.status_code == 401, path
    for path in ("/", "/model", "/progress"):
        assert public.get(path).url.path == "/login"
    csrf = public.csrf()
    for path in ("/answer", "/skip", "/undo", "/stop"):
        fields = {"csrf": csrf, "question": 1, "token": "t", "choice": "a", "sure": "true"}
        assert public.post(path, data=fields).status_code == 401, path


def test_a_name_cookie_is_no_login(public: Client, add: Add) -> None:
    public.cookies.set("deep_rlhf_name", "root")
    assert public.get("/").url.path == "/login"
    csrf = public.csrf()
    public.post("/name", data={"csrf": csrf, "name": "root"})
    assert public.get("/").url.path == "/login"


@pytest.mark.parametrize("name", ["", "   "])
def test_an_invalid_name_is_refused_not_corrected(client: Client, name: str) -> None:
    csrf = client.csrf()
    refused = client.post("/name", data={"csrf": csrf, "name": name}, headers={"accept": "application/json"})
    assert refused.status_code == 422
    assert "'name'" in refused.json()["error"]
    assert str(client.get("/").url).endswith("/login")


def test_login_and_logout(public: Client, store: Store, add: Add) -> None:
    add(2)
    assert public.log_in("anna", "wrong password").status_code == 403
    assert public.log_in("nobody", PASSWORD).status_code == 403
    before = public.cookies["deep_rlhf_session"]
    page = public.log_in("anna", PASSWORD)
    assert page.url.path == "/"
    assert 'class="question pair"' in page.text
    after = public.cookies["deep_rlhf_session"]
    assert after != before  # a planted session is worthless
    assert store.waiting() == 0  # both are lent to anna now
    public.submit("/logout", as_json=False)
    assert store.waiting() == 2
    assert public.get("/").url.path == "/login"
    public.cookies.set("deep_rlhf_session", after)
    assert public.get("/").url.path == "/login"


def test_a_stream_of_events_ends_with_the_login(store: Store, monkeypatch: Any) -> None:
    """Even with new events all the time; it continues while the login lasts and while the database is away."""

    def away(_: str) -> None:
        raise StoreUnavailable("away")

    monkeypatch.setattr(events, "POLL_INTERVAL", 0.01)
    monkeypatch.setattr(events, "PING_INTERVAL", 0.05)
    numbers = itertools.count()
    monkeypatch.setattr(store, "waiting", lambda: next(numbers))
    add_account(store, "anna", "annotator", PASSWORD)
    with Server(create_app(store)) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        form = {"csrf": Client.csrf_in(client.get("/login").text), "name": "anna", "password": PASSWORD}
        client.post("/login", data=form)
        with client.stream("GET", "/events") as stream:
            lines = (line for line in stream.iter_lines() if line.startswith(":"))
            next(lines)
            with monkeypatch.context() as broken:
                broken.setattr(store, "login", away)
                next(lines)
                next(lines)
            store.remove_login(hash_token(client.cookies["deep_rlhf_session"]))
            assert len(list(itertools.islice(lines, 5))) < 5  # it ends


def test_cookies_are_kept_from_scripts_and_the_forms_of_other_sites(store: Store) -> None:
    add_account(store, "anna", "annotator", PASSWORD)
    settings = WebSettings(public_url="https://labels.example.org")
    client = Client(create_app(store, settings), base_url="https://labels.example.org", follow_redirects=False)
    answers = [client.get("/login"), client.log_in("anna", PASSWORD)]
    for answer in answers:
        cookie = answer.headers["set-cookie"]
        assert cookie.startswith("__Host-deep_rlhf_session=")
        assert {"HttpOnly", "Secure", "SameSite=lax", "Path=/"} <= set(cookie.split("; "))
        assert "Domain" not in cookie
        assert "max-age" in answer.headers["strict-transport-security"]
    assert answers[1].status_code == 303
    assert client.get("/model").status_code == 200  # the cookie is known again
    client.submit("/logout")
    assert "__Host-deep_rlhf_session" not in client.cookies


def test_a_form_of_another_site_does_not_log_anybody_out(public: Client) -> None:
    """It carries no cookie, and the reply must not set a new one, which would replace the valid one."""
    public.log_in("anna", PASSWORD)
    other = Client(public.app, base_url="http://labels.example.org")
    for path in ("/name", "/login", "/logout", "/answer", "/nothing"):
        refused = other.post(path, data={"name": "x"}, headers={"sec-fetch-site": "cross-site", "origin": "null"})
        assert refused.status_code in (401, 403, 404)
        assert "set-cookie" not in refused.headers, path


@pytest.mark.browser
def test_a_link_on_another_site_leads_to_the_page_and_logs_nobody_out(store: Store, browser: Any) -> None:
    """With a real browser: `localhost` and `127.0.0.1` are two sites, whatever the port."""
    add_account(store, "anna", "annotator", PASSWORD)
    with Server(create_app(store)) as ours, browser.new_context() as context:
        tab = context.new_page()
        tab.goto(ours.url)
        tab.fill("[name=name]", "anna")
        tab.fill("[name=password]", PASSWORD)
        tab.click("button.primary")
        tab.wait_for_url(f"{ours.url}/")
        other = ours.url.replace("127.0.0.1", "localhost")
        html = f"<a href='{ours.url}/'>labels</a><form method=post action='{ours.url}/logout'><button>x</button></form>"
        tab.route(f"{other}/theirs", lambda route: route.fulfill(body=html, content_type="text/html"))
        for what in ("a", "button"):
            tab.goto(f"{other}/theirs")
            with tab.expect_navigation():
                tab.click(what)
            tab.goto(f"{ours.url}/model")
            assert tab.url == f"{ours.url}/model", what  # not /login
        tab.goto(f"{other}/theirs")
        with tab.expect_navigation(url=f"{ours.url}/"):
            tab.click("a")


def test_an_annotator_cannot_stop_the_trainer(public: Client, store: Store) -> None:
    public.log_in("anna", PASSWORD)
    assert 'id="stop"' not in public.get("/model").text
    answer = public.submit("/stop", sure="true")
    assert answer.status_code == 403
    assert list(answer.json()) == ["error"]
    assert store.get("stop") is None
    public.submit("/logout")
    public.log_in("root", PASSWORD)
    assert 'id="stop"' in public.get("/model").text
    assert public.submit("/stop").status_code == 200  # but without confirming
    assert store.get("stop") is None
    public.submit("/stop", sure="true")
    assert store.get("stop")["by"] == "root"
    assert "Stopped by root" in public.get("/model").text


def test_passwords_and_sessions_are_kept_as_hashes(public: Client, store: Store, tmp_path: Any) -> None:
    public.log_in("anna", PASSWORD)
    assert passwords.PasswordHasher().hash(PASSWORD).startswith("$argon2id$v=19$m=65536,t=3,p=4$")
    assert store.user("anna").password_hash.startswith("$argon2id$")  # type: ignore[union-attr]
    session = public.cookies["deep_rlhf_session"]
    written = b"".join(path.read_bytes() for path in tmp_path.glob("labels.db*"))
    assert PASSWORD.encode() not in written
    assert session.encode() not in written


def test_the_access_token_lets_people_choose_a_name_but_not_one_with_a_password(store: Store) -> None:
    add_account(store, "root", "admin", PASSWORD)
    app = create_app(store, WebSettings(host="0.0.0.0", token=TOKEN))
    anna, bert, eve = (Client(app, client=(f"10.0.0.{i}", 1)) for i in range(3))
    assert anna.log_in("anna", TOKEN).url.path == "/"
    assert store.user("anna").role == "annotator"  # type: ignore[union-attr]
    assert bert.log_in("bert", TOKEN + "x").status_code == 403
    assert eve.log_in("root", TOKEN).status_code == 403
    assert eve.log_in("anna", "!").status_code == 403
    assert eve.log_in("root", PASSWORD).url.path == "/"


def test_an_unknown_name_or_one_without_a_password_takes_as_long(
    public: Client, store: Store, monkeypatch: Any
) -> None:
    """Otherwise the time would reveal the names of users who came with the access token."""
    store.add_user("bert", "annotator", NO_PASSWORD)
    public.log_in("nobody", "guess")  # computes the dummy hash
    checked = []
    real = auth.is_password
    monkeypatch.setattr(auth, "is_password", lambda *given: (checked.append(given[1]), real(*given))[1])
    for name in ("anna", "bert", "nobody"):
        assert public.log_in(name, "guess").status_code == 403
    assert [known[:10] for known in checked] == ["$argon2id$"] * 3
    assert checked[0] != checked[1] == checked[2]


def test_a_first_account_closes_a_page_that_was_open(client: Client, store: Store) -> None:
    client.enter()
    assert client.get("/").url.path == "/"
    add_account(store, "root", "admin", PASSWORD)
    assert client.get("/").url.path == "/login"


def test_an_open_page_is_not_served_through_a_proxy_or_to_another_machine(store: Store) -> None:
    app = create_app(store)
    assert Client(app).get("/login", headers={"x-forwarded-for": "203.0.113.7"}).status_code == 403
    assert Client(app, client=("10.0.0.9", 5)).get("/login").status_code == 403


def test_no_secret_gets_into_a_log(store: Store, caplog: Any, capfd: Any, monkeypatch: Any) -> None:
    caplog.set_level(logging.DEBUG)
    public = public_page(store, token=TOKEN)
    assert public.log_in("root", TOKEN).status_code == 403
    assert public.log_in("bert", TOKEN).url.path == "/"
    public.submit("/logout", as_json=False)
    public.log_in("anna", "a wrong password")
    public.log_in("anna", PASSWORD)
    session, csrf = public.cookies["deep_rlhf_session"], public.csrf("/model")
    monkeypatch.setattr(store, "undo", lambda *_, **__: 1 / 0)
    assert public.submit("/undo", token="a-token-of-mine").status_code == 500
    written = caplog.text + "".join(capfd.readouterr())
    assert "ZeroDivisionError" in written  # what happened is there
    for secret in (PASSWORD, TOKEN, "a wrong password", session, csrf, "$argon2", "a-token-of-mine"):
        assert secret not in written


# ---- the command line


def test_a_new_password_ends_the_logins_of_the_old_one(
    public: Client, store: Store, command: Callable[..., str]
) -> None:
    public.log_in("anna", PASSWORD)
    root = Client(public.app, base_url="http://labels.example.org")
    root.log_in("root", PASSWORD)
    assert command("--set_password=anna").startswith("anna ")
    assert public.get("/").url.path == "/login"
    assert root.get("/").url.path == "/"
    assert public.log_in("anna", PASSWORD).status_code == 403
    assert public.log_in("anna", NEW_PASSWORD).url.path == "/"


def test_a_removed_account_is_logged_out_and_frees_its_questions_but_keeps_its_labels(
    public: Client, store: Store, add: Add, command: Callable[..., str]
) -> None:
    add(3)
    public.log_in("anna", PASSWORD)
    assert public.submit("/answer", question=1, token="t", choice="a").status_code == 200
    assert store.waiting() == 0
    assert command("--remove_user=anna").startswith("anna ")
    assert public.get("/").url.path == "/login"
    assert public.log_in("anna", PASSWORD).status_code == 403
    assert store.waiting() == 2
    assert [label.annotator for label in store.labels()] == ["anna"]
    assert store.user("root") is not None


def test_account_errors_name_the_account_or_the_flags(store: Store, command: Callable[..., str], tmp_path: Any) -> None:
    add_account(store, "anna", "annotator", PASSWORD)
    for flags, match in (
        (["--remove_user=bert"], "'bert'"),
        (["--set_password=bert"], "'bert'"),
        (["--set_password=anna", "--remove_user=anna"], "--add_user, --set_password and --remove_user"),
        (["--remove_user=anna", f"--store={tmp_path / 'other.db'}"], "other.db"),
    ):
        with pytest.raises(UserError, match=match):
            command(*flags)
    assert store.user("anna") is not None


def test_a_lease_cannot_end_while_the_page_is_open() -> None:
    scripts = "".join(path.read_text() for path in STATIC.glob("*.js"))
    renewed = int(re.findall(r"RENEW_EVERY = (\d+)", scripts)[0]) / 1000
    assert 2 * renewed + 30 <= label.SHORTEST_LEASE  # renewed in its second half, and a request may be slow
    assert label.LabelConfig(lease_seconds=label.SHORTEST_LEASE)
