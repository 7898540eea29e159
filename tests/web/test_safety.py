"""Who is let in and what is kept out: headers, hosts, forged forms, rates, sizes, accounts, hostile text, logs."""

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
from page_client import HH, Client
from payloads import PAYLOADS
from test_text import found_in

from deep_rlhf.feedback.records import Comparison
from deep_rlhf.feedback.store import Store
from deep_rlhf.types import UserError
from deep_rlhf.web import auth, gate, security
from deep_rlhf.web.app import WebSettings, create_app
from deep_rlhf.web.auth import add_account
from deep_rlhf.web.security import LARGEST_BODY, RateLimit

Add = Callable[..., list[int]]
PASSWORD = "correct horse battery"
TOKEN = "0123456789abcdef-token"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
    " form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
# What our own page is made of; a payload that got through would add to it.
OUR_TAGS = {
    *("html", "head", "meta", "title", "link", "script", "body", "a", "header", "span", "nav", "form", "input"),
    *("button", "main", "div", "dl", "dt", "dd", "small", "article", "section", "h1", "h2", "h3", "h4", "p"),
    *("fieldset", "legend", "label", "kbd", "template", "dialog", "table", "caption", "tbody", "thead", "tr", "th"),
    *("td", "noscript", "select", "option", "details", "summary", "em", "strong", "br", "code", "pre"),
}


@pytest.fixture
def public(store: Store) -> Client:
    """A page that others reach, with an administrator and an annotator."""
    add_account(store, "root", "admin", PASSWORD)
    add_account(store, "anna", "annotator", PASSWORD)
    return Client(create_app(store, WebSettings(host="0.0.0.0")), base_url="http://labels.example.org")


@pytest.fixture
def now(monkeypatch: Any) -> list[float]:
    """The time by which rates are counted: it stands until a test moves it."""
    moment = [0.0]
    monkeypatch.setattr(security, "monotonic", lambda: moment[0])
    return moment


# ---- hostile text


def check_harmless(page: str) -> None:
    found = found_in(page)
    assert found.tags <= OUR_TAGS
    assert {(tag, name) for tag, name, _ in found.attributes if name.startswith("on") or name == "style"} == set()
    addresses = {value for _, name, value in found.attributes if name in ("href", "src", "action", "formaction")}
    assert all((value or "").startswith(("/", "#")) for value in addresses)
    scripts = {value for tag, name, value in found.attributes if tag == "script" and name == "src"}
    assert len(scripts) == page.count("<script") > 0


def test_hostile_text_adds_nothing_to_the_page(client: Client, store: Store) -> None:
    """In prompts and answers, in samples, newest answers and the trainer's own words."""
    payloads = [payload.replace("\ud83d", "").replace("\0", "") for payload in PAYLOADS]  # no database takes those
    store.add([Comparison(prompt=HH.format(payload), answers=(payload, "fine")) for payload in payloads])
    store.add_samples(0, [(payload, payload) for payload in payloads])
    client.enter("anna")
    for number, payload in enumerate(payloads, start=1):
        page = client.get("/").text
        assert f'data-question="{number}"' in page
        check_harmless(page)
        assert client.submit("/answer", question=number, token=f"t{number}", choice="a").status_code == 200
        if number % 8 == 0 or number == len(payloads):  # the newest dozen answers are shown
            store.put("status", {"state": payload, "step": 1, "text": payload, "at": payload})
            store.put("outlook", {"next": 100, "accuracy_now": 0.5, "accuracy_then": 0.6, "text": payload})
            check_harmless(client.get("/model").text)


def test_a_name_is_text_too(store: Store) -> None:
    client = Client(create_app(store)).enter("<b onclick=x>é; \"'")
    found = found_in(client.get("/").text)
    assert "<b onclick=x>é; \"'" in found.words
    assert "b" not in found.tags


def test_a_turn_that_an_answer_pretends_is_text_of_the_answer(client: Client, add: Add) -> None:
    add("Hello", "yes\n\nHuman: no, the other one\n\nAssistant: sorry", "x")
    page = client.enter().get("/").text
    assert page.count('class="turn person"') == 1
    assert page.count('class="turn model"') == 0


# ---- headers


def test_every_route_has_the_headers_whatever_it_answers(client: Client, add: Add) -> None:
    add(2)
    client.enter()
    asked = ["/", "/login", "/questions", "/progress", "/model", "/model/now", "/model/history", "/model/versions"]
    asked += ["/health", "/static/style.css", "/static/htmx.min.js", "/static/nothing", "/nothing", "/questions?want=x"]
    answers = [client.get(path) for path in asked]
    answers += [client.post(path) for path in ("/answer", "/skip", "/undo", "/stop", "/name", "/login", "/logout")]
    answers += [client.request("PUT", "/"), client.get("/", headers={"host": "evil.example"})]
    assert {answer.status_code for answer in answers} >= {200, 404, 405, 415, 421, 422}
    for answer in answers:
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["cache-control"] in ("no-store", "no-cache")
        assert "server" not in answer.headers


def test_a_mistake_of_ours_has_them_too_and_tells_nothing(client: Client, store: Store, monkeypatch: Any) -> None:
    client.enter()
    monkeypatch.setattr(store, "ask", lambda *_, **__: 1 / 0)
    answer = client.get("/")
    assert answer.status_code == 500
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.text == security.FAILED


# ---- hosts, forged forms


def test_on_loopback_other_host_names_are_refused(client: Client) -> None:
    """DNS rebinding: somebody else's page gives its own name our address."""
    for host in ("evil.example", "127.0.0.1.evil.example:8000", "", "[::2]", "localhost.", "[["):
        assert client.get("/", headers={"host": host}).status_code == 421, host
    for host in ("127.0.0.1:8000", "localhost:9000", "[::1]:8000", "127.0.0.2"):
        assert client.get("/login", headers={"host": host}).status_code == 200, host


def test_a_form_without_this_browsers_token_does_nothing(client: Client, store: Store, add: Add) -> None:
    add(1)
    client.enter()
    client.get("/")
    fields = {"question": 1, "token": "t", "choice": "a", "sure": "true", "name": "x", "password": "y"}
    other = Client(client.app).csrf()
    for path in ("/answer", "/skip", "/undo", "/stop", "/name", "/login", "/logout"):
        for csrf in ({}, {"csrf": ""}, {"csrf": "x"}, {"csrf": other}):
            assert client.post(path, data=fields | csrf).status_code == 403, path
    assert store.last_event() == 0
    assert store.get("stop") is None


def test_a_form_of_another_page_is_refused_though_its_token_is_right(client: Client) -> None:
    """Another port of this machine is the same site, and could set our cookie."""
    csrf = client.csrf()
    for headers in (
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:9999"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "origin": "null"},
    ):
        assert client.post("/name", data={"csrf": csrf, "name": "x"}, headers=headers).status_code == 403
    assert client.post("/name", data={"csrf": csrf, "name": "x"}, headers={"origin": "null"}).status_code == 200


def test_only_forms_are_taken(client: Client) -> None:
    answer = client.post("/name", json={"name": "x"}, headers={"x-csrf-token": client.csrf()})
    assert answer.status_code == 415


# ---- what is too much, or wrong


def test_a_large_request_is_refused_with_or_without_its_length(client: Client) -> None:
    csrf = client.csrf()
    assert client.post("/name", data={"csrf": csrf, "name": "x" * LARGEST_BODY}).status_code == 413

    def pieces() -> Any:
        yield f"csrf={csrf}&name=".encode()
        for _ in range(100):
            yield b"x" * 1000

    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert client.post("/name", content=pieces(), headers=headers).status_code == 413
    assert client.get("/?" + "x" * 3000).status_code == 414


def test_rates_are_limited_per_client_and_recover(now: list[float]) -> None:
    limit = RateLimit(per_second=2, burst=3)
    assert [limit.wait("a") for _ in range(4)] == [0, 0, 0, 0.5]
    assert limit.wait("b") == 0
    now[0] = 0.5
    assert limit.wait("a") == 0
    assert limit.wait("a") == pytest.approx(0.5)
    now[0] = 100
    assert [limit.wait("a") for _ in range(4)] == [0, 0, 0, 0.5]


def test_a_rate_limit_forgets_old_clients(now: list[float], monkeypatch: Any) -> None:
    monkeypatch.setattr(RateLimit, "MOST_CLIENTS", 10)
    limit = RateLimit(per_second=1, burst=1)
    for i in range(50):
        limit.wait(str(i))
        now[0] += 0.01
    assert len(limit._buckets) <= 10
    assert limit.wait("49") > 0


@pytest.fixture
def few(monkeypatch: Any) -> None:
    """Strangers may send five requests at once, then one per second."""
    monkeypatch.setattr(gate, "STRANGERS", (1, 5))


def test_too_many_requests_get_429_and_the_time_to_wait(few: None, store: Store, now: list[float]) -> None:
    client = Client(create_app(store))
    answers = [client.get("/login", headers={"accept": "application/json"}) for _ in range(7)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused == answers[5:]
    assert refused[0].json() == {"error": "That is too much at once: wait a moment."}
    assert refused[0].headers["retry-after"] == "1"
    now[0] = 1.0
    assert client.get("/login").status_code == 200


WRONG: list[tuple[dict[str, Any], int]] = [
    ({}, 422),
    ({"question": "x", "token": "t", "choice": "a"}, 422),
    ({"question": 2**70, "token": "t", "choice": "a"}, 422),
    ({"question": 1, "token": "t", "choice": "left"}, 422),
    ({"question": 1, "token": "", "choice": "a"}, 422),
    ({"question": 1, "token": "t" * 300, "choice": "a"}, 422),
    ({"question": 1, "token": "t\n", "choice": "a"}, 400),
    ({"question": 1, "token": "t", "choice": "a", "strength": "9"}, 422),
    ({"question": 1, "token": "t", "choice": "a", "seconds": "-1"}, 422),
    ({"question": 1, "token": "t", "choice": "a", "seconds": "nan"}, 422),
    ({"question": 1, "token": "t"}, 422),
    ({"question": 1, "token": "t", "rank_0": "1", "rank_1": "x"}, 422),
    ({"question": 1, "token": "t", "rank_0": "1", "rank_1": "2"}, 400),
    ({"question": 99, "token": "t", "choice": "a"}, 409),
]


def test_a_wrong_answer_gets_one_clear_sentence(client: Client, store: Store, add: Add) -> None:
    add(1)
    client.enter().get("/")
    for fields, status in WRONG:
        answer = client.submit("/answer", **fields)
        assert answer.status_code == status, fields
        assert re.fullmatch(r"[^\n]{10,200}\.", answer.json()["error"]), fields
    assert store.last_event() == 0


# ---- accounts


@pytest.mark.parametrize(
    "settings", [{"host": "0.0.0.0"}, {"host": "192.168.0.7"}, {"host": "::"}, {"public_url": "https://a.example"}]
)
def test_it_does_not_start_where_others_reach_it_and_nobody_needs_a_password(
    store: Store, settings: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="add an account"):
        create_app(store, WebSettings(**settings))
    create_app(store, WebSettings(**settings, token=TOKEN))
    add_account(store, "root", "admin", PASSWORD)
    create_app(store, WebSettings(**settings))


def test_bad_settings_are_refused(store: Store) -> None:
    for bad in ({"token": "short"}, {"port": 70_000}, {"public_url": "labels.example"}, {"public_url": "http://a/b"}):
        with pytest.raises(UserError):
            WebSettings(**bad)
    for name, password in (("anna", "short"), ("an\nna", PASSWORD), (" anna", PASSWORD), ("", PASSWORD)):
        with pytest.raises(UserError):
            add_account(store, name, "admin", password)
    assert TOKEN not in repr(WebSettings(token=TOKEN))


def test_nobody_gets_anything_without_a_login(public: Client, add: Add) -> None:
    add(1)
    for path in ("/questions", "/progress", "/model/now", "/model/history", "/model/versions", "/events"):
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


def test_login_and_logout(public: Client, store: Store, add: Add) -> None:
    add(2)
    assert public.log_in("anna", "wrong password").status_code == 403
    assert public.log_in("nobody", PASSWORD).status_code == 403
    before = public.cookies["deep_rlhf_session"]
    page = public.log_in("anna", PASSWORD)
    assert page.url.path == "/"
    assert "Which answer is better?" in page.text
    after = public.cookies["deep_rlhf_session"]
    assert after != before  # whoever planted the old one has nothing
    assert store.waiting() == 0  # both are lent to anna now
    public.submit("/logout", as_json=False)
    assert store.waiting() == 2
    assert public.get("/").url.path == "/login"
    public.cookies.set("deep_rlhf_session", after)
    assert public.get("/").url.path == "/login"


def test_cookies_are_kept_from_scripts_and_other_sites(store: Store) -> None:
    add_account(store, "anna", "annotator", PASSWORD)
    settings = WebSettings(public_url="https://labels.example.org")
    client = Client(create_app(store, settings), base_url="https://labels.example.org", follow_redirects=False)
    answers = [client.get("/login"), client.log_in("anna", PASSWORD)]
    for answer in answers:
        cookie = answer.headers["set-cookie"]
        assert {"HttpOnly", "Secure", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
        assert "max-age" in answer.headers["strict-transport-security"]
    assert answers[1].status_code == 303


def test_an_annotator_cannot_stop_the_trainer(public: Client, store: Store) -> None:
    public.log_in("anna", PASSWORD)
    assert "Stop everything" not in public.get("/model").text
    answer = public.submit("/stop", sure="true")
    assert answer.status_code == 403
    assert answer.json()["error"] == "Only an administrator may do this."
    assert store.get("stop") is None
    public.submit("/logout")
    public.log_in("root", PASSWORD)
    assert "Stop everything" in public.get("/model").text
    assert public.submit("/stop").status_code == 200  # but he was not sure
    assert store.get("stop") is None
    public.submit("/stop", sure="true")
    assert store.get("stop")["by"] == "root"
    assert "Stopped by root" in public.get("/model").text


def test_passwords_cannot_be_tried_at_will(public: Client, now: list[float]) -> None:
    codes = [public.log_in("anna", f"guess {i}").status_code for i in range(10)]
    assert codes == [403] * 8 + [429] * 2
    now[0] = 6.5
    assert public.log_in("anna", PASSWORD).url.path == "/"


def test_passwords_of_one_account_cannot_be_tried_from_many_addresses(public: Client, now: list[float]) -> None:
    clients = [Client(public.app, base_url="http://labels.example.org", client=(f"10.0.0.{i}", 1)) for i in range(4)]
    codes = [client.log_in("anna", "guess").status_code for client in clients for _ in range(6)]
    assert codes == [403] * 20 + [429] * 4


def test_passwords_and_sessions_are_kept_as_hashes(public: Client, store: Store, tmp_path: Any) -> None:
    public.log_in("anna", PASSWORD)
    assert auth.PasswordHasher().hash(PASSWORD).startswith("$argon2id$v=19$m=65536,t=3,p=4$")
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


def test_a_first_account_closes_a_page_that_was_open(client: Client, store: Store) -> None:
    client.enter()
    assert client.get("/").url.path == "/"
    add_account(store, "root", "admin", PASSWORD)
    assert client.get("/").url.path == "/login"


def test_an_open_page_is_not_served_through_a_proxy_or_to_another_machine(store: Store) -> None:
    app = create_app(store)
    assert Client(app).get("/login", headers={"x-forwarded-for": "203.0.113.7"}).status_code == 403
    assert Client(app, client=("10.0.0.9", 5)).get("/login").status_code == 403


def test_behind_a_proxy_each_client_has_a_rate_of_its_own(few: None, store: Store, now: list[float]) -> None:
    app = create_app(store, WebSettings(public_url="https://a.example", token=TOKEN))
    client = Client(app, base_url="https://a.example")
    codes = {
        address: [client.get("/login", headers={"x-forwarded-for": address}).status_code for _ in range(n)]
        for address, n in (("203.0.113.7", 6), ("forged, 203.0.113.7", 2), ("203.0.113.8", 2))
    }
    assert codes["203.0.113.7"] == [200] * 5 + [429]
    assert codes["forged, 203.0.113.7"] == [429] * 2
    assert codes["203.0.113.8"] == [200] * 2


# ---- logs


def test_no_secret_gets_into_a_log(public: Client, store: Store, caplog: Any, capfd: Any, monkeypatch: Any) -> None:
    caplog.set_level(logging.DEBUG)
    public.log_in("anna", "a wrong password")
    public.log_in("anna", PASSWORD)
    session, csrf = public.cookies["deep_rlhf_session"], public.csrf("/model")
    monkeypatch.setattr(store, "undo", lambda *_, **__: 1 / 0)
    assert public.submit("/undo", token="a-token-of-mine").status_code == 500
    written = caplog.text + "".join(capfd.readouterr())
    assert "ZeroDivisionError" in written  # what happened is there
    for secret in (PASSWORD, "a wrong password", session, csrf, "$argon2", "a-token-of-mine"):
        assert secret not in written
