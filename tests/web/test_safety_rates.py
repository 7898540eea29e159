"""Rate limits of requests and logins."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from page_client import Client
from test_safety_accounts import PASSWORD, TOKEN, public_page

from deep_rlhf.feedback.store import Store
from deep_rlhf.web.access import auth, gate, rate_limit
from deep_rlhf.web.access.rate_limit import RateLimit
from deep_rlhf.web.app import WebSettings, create_app


@pytest.fixture(autouse=True)
def rate_limits() -> None:
    """Keeps the product's own limits; the tests below use a clock of their own."""


@pytest.fixture
def now(monkeypatch: Any) -> list[float]:
    """The clock of the rate limits: it stands still until a test moves it."""
    moment = [0.0]
    monkeypatch.setattr(rate_limit, "monotonic", lambda: moment[0])
    return moment


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
    monkeypatch.setattr(RateLimit, "MAX_CLIENTS", 10)
    limit = RateLimit(per_second=1, burst=1)
    for i in range(50):
        limit.wait(str(i))
        now[0] += 0.01
    assert len(limit._buckets) <= 10
    assert limit.wait("49") > 0


@pytest.fixture
def few(monkeypatch: Any) -> None:
    """Limits strangers to five requests at once, then one per second."""
    monkeypatch.setattr(gate, "STRANGERS", (1, 5))


def test_too_many_requests_get_429_and_the_time_to_wait(few: None, store: Store, now: list[float]) -> None:
    client = Client(create_app(store))
    answers = [client.get("/login", headers={"accept": "application/json"}) for _ in range(7)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused == answers[5:]
    assert list(refused[0].json()) == ["error"]
    assert refused[0].headers["retry-after"] == "1"
    now[0] = 1.0
    assert client.get("/login").status_code == 200


def test_password_attempts_are_limited(store: Store, now: list[float]) -> None:
    public = public_page(store)
    codes = [public.log_in("anna", f"guess {i}").status_code for i in range(10)]
    assert codes == [403] * 8 + [429] * 2
    now[0] = 6.5
    assert public.log_in("anna", PASSWORD).url.path == "/"


def test_password_attempts_on_one_account_are_limited_across_addresses(store: Store, now: list[float]) -> None:
    public = public_page(store)
    clients = [Client(public.app, base_url="http://labels.example.org", client=(f"10.0.0.{i}", 1)) for i in range(4)]
    codes = [client.log_in("anna", "guess").status_code for client in clients for _ in range(6)]
    assert codes == [403] * 20 + [429] * 4


def test_strangers_who_know_a_name_do_not_keep_its_owner_out(store: Store, now: list[float]) -> None:
    public = public_page(store)
    url = "http://labels.example.org"
    assert public.log_in("anna", PASSWORD).url.path == "/"  # from the browser that she uses
    public.submit("/logout", as_json=False)
    strangers = [Client(public.app, base_url=url, client=(f"10.0.0.{i}", 1)) for i in range(4)]
    for _ in range(8):
        for stranger in [*strangers, Client(public.app, base_url=url)]:  # the last from her own address
            stranger.log_in("anna", "guess")
    assert strangers[0].log_in("anna", PASSWORD).status_code == 429
    assert public.log_in("anna", PASSWORD).url.path == "/"
    elsewhere = Client(public.app, base_url=url, client=("10.0.1.1", 1))
    assert elsewhere.log_in("anna", PASSWORD).url.path == "/"


def test_the_mark_of_a_browser_is_bound_to_account_and_password(store: Store, now: list[float]) -> None:
    public = public_page(store)
    public.log_in("anna", PASSWORD)
    public.submit("/logout", as_json=False)
    for _ in range(20):
        public.log_in("root", "guess")
    assert public.log_in("root", PASSWORD).status_code == 429
    codes = [public.log_in("anna", "guess").status_code for _ in range(10)]
    assert codes == [403] * 8 + [429] * 2  # a stolen browser may not guess without limit
    now[0] = 1e6
    auth.change_password(store, "anna", f"{PASSWORD}!")
    for _ in range(8):
        public.log_in("anna", "guess")
    assert public.log_in("anna", f"{PASSWORD}!").status_code == 429


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


def test_behind_a_proxy_that_adds_a_line_of_its_own_a_forged_line_does_not_help(
    few: None, store: Store, now: list[float]
) -> None:
    client = Client(create_app(store, WebSettings(public_url="https://a.example", token=TOKEN)))
    codes = [
        client.get("/login", headers=[("x-forwarded-for", f"10.0.0.{i}"), ("x-forwarded-for", "203.0.113.7")])
        for i in range(6)
    ]
    assert [answer.status_code for answer in codes] == [200] * 5 + [429]


def test_all_addresses_of_an_ipv6_network_share_a_rate(few: None, store: Store, now: list[float]) -> None:
    app = create_app(store, WebSettings(public_url="https://a.example", token=TOKEN))
    client = Client(app, base_url="https://a.example")
    codes = {
        prefix: [client.get("/login", headers={"x-forwarded-for": f"{prefix}{i}"}).status_code for i in range(1, 7)]
        for prefix in ("2001:db8::", "2001:db8:0:1::", "::ffff:10.0.0.")
    }
    assert codes["2001:db8::"] == codes["2001:db8:0:1::"] == [200] * 5 + [429]
    assert codes["::ffff:10.0.0."] == [200] * 6


def test_logins_that_wait_for_each_other_leave_threads_for_labelling(
    store: Store, now: list[float], monkeypatch: Any
) -> None:
    tries = threading.Semaphore(1)
    monkeypatch.setattr(auth, "_LOGIN_SLOTS", tries)
    public = public_page(store)
    late = Client(public.app, base_url="http://labels.example.org")
    began, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(auth, "is_password", lambda *_: (began.set(), go_on.wait(60))[1])
    with ThreadPoolExecutor() as pool:
        first = pool.submit(public.log_in, "anna", PASSWORD)
        assert began.wait(60)
        refused = late.log_in("root", PASSWORD)
        go_on.set()
        assert first.result(60).url.path == "/"
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
    assert late.log_in("root", PASSWORD).url.path == "/"
