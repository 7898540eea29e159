"""Many people at once on a real server, while it is killed; and how long an answer takes. Loopback only.

Numbers of people, answers and requests are fixed, and everything ends by a deadline.
"""

import math
import multiprocessing
import random
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import page_process
import pytest
from page_client import Client
from postgres import free_port, postgres  # noqa: F401
from sqlalchemy import text

from deep_rlhf.feedback.records import Comparison
from deep_rlhf.feedback.store import Store

SECONDS = 60.0  # after which something hangs
MOST_REQUESTS = 60  # of one person


class Page:
    """A server process that can be killed, always on the same port."""

    def __init__(self, address: str) -> None:
        self.address, self.port = address, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.is_up = threading.Event()
        self.start()

    def start(self) -> None:
        """Starts a process and waits until it answers."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["deep_rlhf.web.app", "deep_rlhf.web.server"])
        self._process = context.Process(target=page_process.serve_page, args=(self.address, self.port), daemon=True)
        self._process.start()
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                assert httpx.get(f"{self.url}/health", timeout=5).text == "ok"
                break
            except httpx.TransportError:
                assert self._process.is_alive(), "the page did not start"
                assert time.monotonic() < deadline, "the page does not answer"
                threading.Event().wait(0.01)
        self.is_up.set()

    def kill(self) -> None:
        """SIGKILL."""
        self.is_up.clear()
        self._process.kill()
        self._process.join(SECONDS)


class Annotator(threading.Thread):
    """Answers whatever it is asked, as the page's script does: sends again, with the same token, what got no reply."""

    def __init__(
        self, page: Page, name: str, told: threading.Condition, *, most: int = 10**9, think: Any = None
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.page, self.told, self.most, self.think = page, told, most, think
        self.acknowledged: dict[int, int] = {}  # question -> event
        self.refused: list[str] = []
        self.seconds: list[float] = []
        self.requests = 0
        self.error: BaseException | None = None
        self.client = httpx.Client(base_url=page.url, timeout=10, headers={"accept": "application/json"})

    def run(self) -> None:
        """Until nothing is asked any more."""
        try:
            with self.client:
                csrf = Client.csrf_in(self.send("GET", "/login", headers={"accept": "text/html"}).text)
                self.send("POST", "/name", data={"csrf": csrf, "name": self.name})
                self.client.headers["x-csrf-token"] = csrf
                ahead = self.send("GET", "/questions").json()["questions"]
                while ahead and len(self.acknowledged) < self.most:
                    question = ahead.pop(0)
                    ahead += self.answer(question["id"], [other["id"] for other in ahead])
                    ahead = ahead or self.send("GET", "/questions").json()["questions"]
        except BaseException as error:
            self.error = error
        finally:
            with self.told:
                self.told.notify_all()

    def answer(self, number: int, have: list[int]) -> list[Any]:
        """Answers a question and returns what comes after those that it has."""
        if self.think is not None:
            threading.Event().wait(self.think())
        choice = "a" if number % 3 else "tie"
        fields = {"question": number, "token": f"{self.name}/{number}", "choice": choice, "seconds": "1"}
        began = time.perf_counter()
        reply = self.send("POST", "/answer", data={**fields, "have": ",".join(map(str, have))})
        self.seconds.append(time.perf_counter() - began)
        if reply.status_code == 409:
            self.refused.append(reply.json()["error"])
            return []
        assert reply.status_code == 200, reply.text
        with self.told:
            self.acknowledged[number] = reply.json()["event"]
            self.told.notify_all()
        return list(reply.json()["questions"])

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Sends until there is a reply."""
        while True:
            assert self.page.is_up.wait(SECONDS)
            self.requests += 1
            assert self.requests <= MOST_REQUESTS
            try:
                reply = self.client.request(method, path, **options)
            except httpx.TransportError:
                continue
            if reply.status_code < 500:
                return reply


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return str(tmp_path / "labels.db")
    return str(request.getfixturevalue("postgres").store())


@pytest.fixture
def page(address: str) -> Iterator[Page]:
    Store(address).close()
    running = Page(address)
    yield running
    running.kill()


@pytest.mark.alone
def test_nothing_is_lost_or_doubled_while_the_server_is_killed(page: Page) -> None:
    """Fifty people, three hundred questions, five times kill -9."""
    rng = random.Random(11)
    told = threading.Condition()
    with Store(page.address) as store:
        ids = store.add([Comparison(prompt=f"Question {i}", answers=("x", "y")) for i in range(300)])
    people = [Annotator(page, f"p{i}", told) for i in range(50)]
    for person in people:
        person.start()
    for kill in range(5):
        with told:
            wanted = 55 * kill + rng.randrange(5, 55)
            assert told.wait_for(lambda wanted=wanted: sum(len(p.acknowledged) for p in people) >= wanted, SECONDS)
        page.kill()
        page.start()
    for person in people:
        person.join(SECONDS)
        assert person.error is None
        assert person.refused == []
    with Store(page.address) as store:
        labels = store.labels()
        with store._database.engine.connect() as connection:
            answers = connection.execute(text("SELECT count(*) FROM events WHERE kind = 'answer'")).scalar()
    assert answers == len(labels) == len(ids)
    assert sorted(label.comparison_id for label in labels) == ids
    said = {(label.annotator, label.comparison_id): label.event_id for label in labels}
    acknowledged = {(p.name, number): event for p in people for number, event in p.acknowledged.items()}
    assert acknowledged == said


@pytest.mark.alone
def test_an_answer_takes_less_than_a_tenth_of_a_second_with_twenty_people(page: Page) -> None:
    """The 95th percentile, where people are: with the next question in the reply."""
    each, people = 8, 20
    with Store(page.address) as store:
        store.add([Comparison(prompt=f"Question {i}", answers=("*x*", "y\n\n- z")) for i in range(people * (each + 2))])
    told = threading.Condition()
    annotators = []
    for i in range(people):
        rng = random.Random(i)
        annotators.append(Annotator(page, f"p{i}", told, most=each, think=lambda rng=rng: rng.uniform(0.4, 1.6)))
    for one in annotators:
        one.start()
    for one in annotators:
        one.join(SECONDS)
        assert one.error is None
        assert len(one.acknowledged) == each
    seconds = sorted(second for one in annotators for second in one.seconds[1:])  # the first ones warm the server
    p95 = seconds[math.ceil(0.95 * len(seconds)) - 1]
    print(f"p50 {statistics.median(seconds) * 1000:.0f} ms, p95 {p95 * 1000:.0f} ms of {len(seconds)} answers")  # noqa: T201
    assert p95 < 0.1
