"""Many annotators on a real server that is killed again and again, and the latency of a label. Loopback only.

The numbers of annotators, labels and requests are fixed, and everything ends by a deadline.
"""

import math
import random
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import page_process
import processes
import pytest
from page_client import Client
from postgres import free_port, postgres  # noqa: F401
from sqlalchemy import text

from deep_rlhf.feedback.records import Comparison
from deep_rlhf.feedback.store import Store

pytestmark = pytest.mark.timing
SECONDS = 60.0  # after which the test fails
MOST_REQUESTS = 150  # of one person


class Page:
    """A server process that can be killed and restarted on the same port."""

    def __init__(self, address: str) -> None:
        self.address, self.port = address, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.is_up = threading.Event()
        self.start()

    def start(self) -> None:
        """Starts a process and waits until it responds."""
        self._process = processes.fork_server().Process(
            target=page_process.serve_page, args=(self.address, self.port), daemon=True
        )
        self._process.start()
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                assert httpx.get(f"{self.url}/health", timeout=5).text == "ok"
                break
            except httpx.TransportError:
                assert self._process.is_alive(), "the page did not start"
                assert time.monotonic() < deadline, "the page does not respond"
                threading.Event().wait(0.01)
        self.is_up.set()

    def kill(self) -> None:
        """SIGKILL."""
        self.is_up.clear()
        self._process.kill()
        self._process.join(SECONDS)


class Annotator(threading.Thread):
    """Does what the page's script does: repeats, with the same token, each request that got no reply.

    `wavers` is the probability of skipping a question and of undoing a label.
    """

    def __init__(
        self,
        page: Page,
        name: str,
        changed: threading.Condition,
        until: Callable[["Annotator"], bool],
        *,
        wavers: float = 0.0,
        think: Callable[[], float] | None = None,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.page, self.changed, self.until, self.wavers, self.think = page, changed, until, wavers, think
        self.rng = random.Random(name)
        self.history: list[tuple[str, int, int | None]] = []  # kind, question, event (None for an undo)
        self.acknowledged: dict[int, int] = {}  # question -> event, of labels that are not undone
        self.hidden: dict[str, str] = {}  # fields of each form
        self.refused: list[str] = []
        self.seconds: list[float] = []
        self.requests = self.progress_reads = 0
        self.error: BaseException | None = None
        self.client = httpx.Client(base_url=page.url, timeout=10, headers={"accept": "application/json"})
        self.listener = httpx.Client(base_url=page.url, timeout=SECONDS)  # slow to make

    def run(self) -> None:
        """Labels until `until` says that it is enough."""
        try:
            with self.client:
                csrf = Client.csrf_in(self.send("GET", "/login", headers={"accept": "text/html"}).text)
                self.send("POST", "/name", data={"csrf": csrf, "name": self.name})
                shown = self.send("GET", "/", headers={"accept": "text/html"}).text
                self.hidden = dict(re.findall(r'name="(csrf|store_id)" value="([\w-]+)"', shown))
                if self.think is not None:  # a person, whose page listens once it is open
                    threading.Thread(target=self.listen, daemon=True).start()
                ahead: list[Any] = []
                while not self.until(self):
                    ahead = ahead or self.send("GET", "/questions").json()["questions"]
                    if ahead:
                        ahead = self.decide(ahead)
                    else:
                        threading.Event().wait(0.2)  # another annotator may release one
        except BaseException as error:
            self.error = error
        finally:
            with self.changed:
                self.changed.notify_all()

    def decide(self, ahead: list[Any]) -> list[Any]:
        """Answers or skips the first question, and perhaps takes the label back; returns what comes then."""
        number, ahead = ahead[0]["id"], ahead[1:]
        # Never what it answered once: everybody else may have gone by then.
        if self.rng.random() < self.wavers and all(number != other for _, other, _ in self.history):
            return ahead + self.send_event("skip", ahead, question=number)
        if self.think is not None:
            threading.Event().wait(self.think())
        choice = "a" if number % 3 else "tie"
        began = time.perf_counter()
        ahead = ahead + self.send_event("answer", ahead, question=number, choice=choice, seconds=1)
        self.seconds.append(time.perf_counter() - began)
        if self.rng.random() < self.wavers and number in self.acknowledged:
            ahead = self.send_event("undo", ahead, want=len(ahead) + 1) + ahead
        return ahead

    def send_event(self, kind: str, ahead: list[Any], **fields: Any) -> list[Any]:
        """Posts a label, a skip or an undo, records the reply, and returns the new questions."""
        token = f"{self.name}/{len(self.history)}"
        have = ",".join(str(question["id"]) for question in ahead)
        reply = self.send("POST", f"/{kind}", data={**self.hidden, "token": token, "have": have, **fields})
        if reply.status_code == 409:
            self.refused.append(reply.json()["error"])
            return []
        assert reply.status_code == 200, reply.text
        result = reply.json()
        with self.changed:
            number = result["undone"] if kind == "undo" else fields["question"]
            self.history.append((kind, number, result.get("event")))
            if kind == "answer":
                self.acknowledged[number] = result["event"]
            elif kind == "undo":
                del self.acknowledged[number]
            self.changed.notify_all()
        return list(result["questions"])

    def listen(self) -> None:
        """Listens until the server ends, and reads the progress after each label of anybody."""
        self.listener.cookies = self.client.cookies
        try:
            with self.listener, self.listener.stream("GET", "/events") as stream:
                for line in stream.iter_lines():
                    if line == "event: people":
                        threading.Event().wait(self.rng.uniform(0.5, 2))
                        self.progress_reads += self.listener.get("/progress").status_code == 200
        except httpx.TransportError:
            pass

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Repeats a request until there is a reply."""
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


def test_nothing_is_lost_or_doubled_while_the_server_is_killed(page: Page) -> None:
    """Fifty annotators, who also skip and undo, three hundred questions, five kills by SIGKILL."""
    rng = random.Random(11)
    changed = threading.Condition()
    with Store(page.address) as store:
        ids = store.add([Comparison(prompt=f"Question {i}", responses=("x", "y")) for i in range(300)])
    people: list[Annotator] = []

    def is_over(_: Annotator) -> bool:
        return sum(len(person.acknowledged) for person in people) == len(ids)

    people += [Annotator(page, f"p{i}", changed, is_over, wavers=0.12) for i in range(50)]
    for person in people:
        person.start()
    for kill in range(5):
        with changed:
            wanted = 55 * kill + rng.randrange(5, 55)
            assert changed.wait_for(lambda wanted=wanted: sum(len(p.acknowledged) for p in people) >= wanted, SECONDS)
        page.kill()
        page.start()
    for person in people:
        person.join(SECONDS)
        assert person.error is None
        assert person.refused == []
    with Store(page.address) as store:
        labels = store.labels()
        with store._database.engine.connect() as connection:
            columns = "id, annotator, kind, comparison_id, undoes"
            events = connection.execute(text(f"SELECT {columns} FROM events ORDER BY id")).all()
    assert sorted(label.comparison_id for label in labels) == ids
    assert {event.kind for event in events} == {"answer", "skip", "undo"}
    for person in people:
        own = [event for event in events if event.annotator == person.name]
        kept = [(event.kind, event.comparison_id, None if event.kind == "undo" else event.id) for event in own]
        assert kept == person.history
        counting: list[int] = []
        for event in own:
            if event.kind == "answer":
                counting.append(event.id)
            elif event.kind == "undo":
                assert counting.pop() == event.undoes
        assert counting == [label.event_id for label in labels if label.annotator == person.name]
        assert sorted(counting) == sorted(person.acknowledged.values())


def test_a_label_takes_less_than_a_tenth_of_a_second_with_twenty_people(page: Page) -> None:
    """The 95th percentile of a reply with the next question, while all pages listen and read the progress."""
    each, people = 12, 20
    with Store(page.address) as store:
        store.add(
            [Comparison(prompt=f"Question {i}", responses=("*x*", "y\n\n- z")) for i in range(people * (each + 2))]
        )
    changed = threading.Condition()
    annotators = []
    for i in range(people):
        rng = random.Random(i)
        think = lambda rng=rng: rng.uniform(0.4, 1.6)  # noqa: E731
        annotators.append(Annotator(page, f"p{i}", changed, lambda one: len(one.acknowledged) >= each, think=think))
    for one in annotators:
        one.start()
    for one in annotators:
        one.join(SECONDS)
        assert one.error is None
        assert len(one.acknowledged) == each
        assert one.progress_reads > 1
    seconds = sorted(second for one in annotators for second in one.seconds[1:])  # the first ones warm the server
    p95 = seconds[math.ceil(0.95 * len(seconds)) - 1]
    print(f"p50 {statistics.median(seconds) * 1000:.0f} ms, p95 {p95 * 1000:.0f} ms of {len(seconds)} labels")  # noqa: T201
    assert p95 < 0.1
