"""Protection against hostile text, foreign hosts, forged forms and bad requests; security headers."""

import re
from collections.abc import Callable
from typing import Any

from page_client import HH, Client
from payloads import PAYLOADS
from test_text import found_in

from deep_rlhf.feedback.records import Comparison
from deep_rlhf.feedback.store import Store
from deep_rlhf.web.access.headers import INTERNAL_ERROR, MAX_BODY
from deep_rlhf.web.app import create_app

Add = Callable[..., list[int]]
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
    """In prompts, responses, samples, the newest labels and the trainer's status."""
    payloads = [payload.replace("\ud83d", "").replace("\0", "") for payload in PAYLOADS]  # no database takes those
    store.add([Comparison(prompt=HH.format(payload), responses=(payload, "fine")) for payload in payloads])
    store.add_samples(0, [(payload, payload) for payload in payloads])
    client.enter("anna")
    for number, payload in enumerate(payloads, start=1):
        page = client.get("/").text
        assert f'data-question="{number}"' in page
        check_harmless(page)
        assert client.submit("/answer", question=number, token=f"t{number}", choice="a").status_code == 200
        if number % 8 == 0 or number == len(payloads):  # the newest dozen labels are shown
            store.put("status", {"state": payload, "step": 1, "text": payload, "at": payload})
            store.put("outlook", {"next": 100, "accuracy_now": 0.5, "accuracy_then": 0.6, "text": payload})
            check_harmless(client.get("/model").text)


def test_a_name_is_text_too(store: Store) -> None:
    client = Client(create_app(store)).enter("<b onclick=x>é; \"'")
    found = found_in(client.get("/").text)
    assert "<b onclick=x>é; \"'" in found.words
    assert "b" not in found.tags


def test_a_turn_faked_in_a_response_is_shown_as_its_text(client: Client, add: Add) -> None:
    add("Hello", "yes\n\nHuman: no, the other one\n\nAssistant: sorry", "x")
    page = client.enter().get("/").text
    assert page.count('class="turn person"') == 1
    assert page.count('class="turn model"') == 0


# ---- headers


def test_every_route_has_the_headers_whatever_its_status(client: Client, add: Add) -> None:
    add(2)
    client.enter()
    asked = ["/", "/login", "/questions", "/progress", "/model", "/model/status", "/model/history", "/model/versions"]
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


def test_an_internal_error_has_the_headers_and_reveals_nothing(client: Client, store: Store, monkeypatch: Any) -> None:
    client.enter()
    monkeypatch.setattr(store, "ask", lambda *_, **__: 1 / 0)
    answer = client.get("/")
    assert answer.status_code == 500
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.text == INTERNAL_ERROR


# ---- hosts, forged forms


def test_on_loopback_other_host_names_are_refused(client: Client) -> None:
    """DNS rebinding: a foreign page gives its own name our address."""
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
    assert client.post("/name", data={"csrf": csrf, "name": "x" * MAX_BODY}).status_code == 413

    def pieces() -> Any:
        yield f"csrf={csrf}&name=".encode()
        for _ in range(100):
            yield b"x" * 1000

    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert client.post("/name", content=pieces(), headers=headers).status_code == 413
    assert client.get("/?" + "x" * 3000).status_code == 414


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


def test_an_invalid_label_gets_one_clear_sentence(client: Client, store: Store, add: Add) -> None:
    add(1)
    client.enter().get("/")
    for fields, status in WRONG:
        answer = client.submit("/answer", **fields)
        assert answer.status_code == status, fields
        assert re.fullmatch(r"[^\n]{10,200}\.", answer.json()["error"]), fields
    assert store.last_event() == 0
