"""The store: where the trainer, the page and people meet, and nowhere else.

A thin front: each method is one transaction of a function in `trainer_side`, `asking` or `accounts`.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, Self

from deep_rlhf.feedback.records import (
    Alarm,
    Choice,
    Comparison,
    Label,
    Question,
    Row,
    Version,
)
from deep_rlhf.feedback.store import accounts, question_queue, replication, trainer_api
from deep_rlhf.feedback.store.accounts import Role, User
from deep_rlhf.feedback.store.engine import Database
from deep_rlhf.feedback.store.question_queue import Given, Terms
from deep_rlhf.feedback.store.replication import GivenAnswer


def utc_now() -> datetime:
    """The time now."""
    return datetime.now(UTC)


class Store:
    """Questions, answers, versions, accounts. Several threads may use one; each process opens its own.

    `url` is a file (SQLite) or postgresql+psycopg://…; what is missing is made (unless it `must_exist`), what is old is
    migrated. `seed` makes
    the sides of answers repeatable, and `clock` is the time, for tests. A method that writes returns after the commit
    has reached the disk, and raises Unavailable if the database does not answer.
    """

    def __init__(
        self,
        url: str | Path,
        *,
        lease_seconds: float = 300,
        seed: int | None = None,
        clock: Callable[[], datetime] = utc_now,
        must_exist: bool = False,
    ) -> None:
        self.lease = timedelta(seconds=lease_seconds)
        self._seed, self._clock = seed, clock
        self._database = Database(url, must_exist=must_exist)

    def __repr__(self) -> str:
        return self._database.name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes its connections."""
        self._database.close()

    def _terms(self) -> Terms:
        return Terms(self._clock(), self.lease, self._seed)

    # ---- the trainer's side

    def add(self, comparisons: Sequence[Comparison]) -> list[int]:
        """Adds questions; returns their ids in order."""
        return self._database.write(lambda db: trainer_api.add(db, comparisons, self._clock()))

    def withdraw(self, *, older_than_policy: int) -> int:
        """Stops asking about older policies what nobody answered or holds; returns how many questions."""
        return self._database.write(lambda db: trainer_api.withdraw(db, older_than_policy, self._clock()))

    def waiting(self) -> int:
        """Questions that somebody could be asked now."""
        return self._database.read(lambda db: trainer_api.waiting(db, self._clock()))

    def unseen(self) -> int:
        """Of these, the ones for anybody: nobody answered or skipped them, and they repeat no other."""
        return self._database.read(lambda db: trainer_api.unseen(db, self._clock()))

    def labels(self, *, after: int = 0, until: int | None = None) -> list[Label]:
        """Answers that count with event id > `after` (and ≤ `until`), in order. What was undone since is left out."""
        last = self.last_event() if until is None else until
        return self._database.read(lambda db: trainer_api.labels(db, after, last))

    def label_count(self) -> int:
        """Answers that carry a label for training: not can't tell, nor gold, repeated and win-rate questions."""
        return self._database.read(trainer_api.label_count)

    def last_event(self) -> int:
        """Id of the newest event of any kind, 0 if there is none. Nothing below it can still appear."""
        return self._database.read(trainer_api.last_event)

    def add_version(self, version: Version) -> None:
        """Adds a version; the same kind and number again replaces it."""
        self._database.write(lambda db: trainer_api.add_version(db, version, self._clock()))

    def versions(self, kind: Literal["policy", "reward"]) -> list[Version]:
        """All versions of this kind by number."""
        return self._database.read(lambda db: trainer_api.versions(db, kind))

    def add_metrics(self, rows: Sequence[Row]) -> None:
        """Adds rows of metrics: JSON objects. A number that is not finite becomes null."""
        self._database.write(lambda db: trainer_api.add_metrics(db, rows))

    def metrics(self, *, after: int = 0) -> list[Row]:
        """Rows with id > `after`, each with its "id"."""
        return self._database.read(lambda db: trainer_api.metrics(db, after))

    def add_samples(self, policy_version: int, rows: Sequence[tuple[str, str]]) -> None:
        """Sets what a version of the policy answers to the fixed prompts: (prompt, answer) pairs."""
        self._database.write(lambda db: trainer_api.add_samples(db, policy_version, rows))

    def samples(self) -> dict[int, list[tuple[str, str]]]:
        """The fixed prompts as each version answers them."""
        return self._database.read(trainer_api.samples)

    def add_alarm(self, alarm: Alarm) -> None:
        """Adds an alarm."""
        self._database.write(lambda db: trainer_api.add_alarm(db, alarm, self._clock()))

    def alarms(self) -> list[Alarm]:
        """All alarms, the oldest first."""
        return self._database.read(trainer_api.alarms)

    def put(self, name: str, value: Any) -> None:
        """Writes a small JSON value under a key of feedback.state."""
        self._database.write(lambda db: trainer_api.put(db, name, value))

    def get(self, name: str, default: Any = None) -> Any:
        """The JSON value under a key, `default` if there is none. feedback.state has a typed reader for each key."""
        return self._database.read(lambda db: trainer_api.get(db, name, default))

    # ---- the people's side

    def ask(self, annotator: str, *, count: int = 1) -> list[Question]:
        """Leases up to `count` questions to this person: those he has already, then new ones by priority.

        Never one that he answered or skipped; a repeat only if he answered the original.
        """
        found = self._database.write(lambda db: question_queue.ask(db, annotator, count, self._terms()))
        if found or self._database.is_sqlite:
            return found
        # Nothing was free that another transaction had not just locked: wait for what it leaves.
        return self._database.write(lambda db: question_queue.ask(db, annotator, count, self._terms(), patient=True))

    def answer(
        self,
        comparison_id: int,
        annotator: str,
        *,
        token: str,
        choice: Choice | None = None,
        ranks: Sequence[int] | None = None,
        strength: int | None = None,
        seconds: float = 0.0,
    ) -> int:
        """Takes an answer and returns its event id; the same token again returns the same id and changes nothing.

        `choice` is about the answers as the comparison numbers them (a is the first), whatever side they were shown
        on; `ranks` has one number per answer, 1 the best. Raises Refused if somebody else has the question now, this
        person answered it before, or never got it.
        """
        given = Given(choice, None if ranks is None else tuple(ranks), strength, seconds)
        return self._database.write(
            lambda db: question_queue.answer(db, comparison_id, annotator, token, given, self._terms())
        )

    def skip(self, comparison_id: int, annotator: str, *, token: str) -> int:
        """Gives the question back, never to be put to this person again; returns the event id. Raises as `answer`."""
        return self._database.write(lambda db: question_queue.skip(db, comparison_id, annotator, token, self._terms()))

    def undo(self, annotator: str, *, token: str) -> int | None:
        """Takes back this person's newest answer that counts, and leases its question to him again.

        Returns the comparison's id, None if there is nothing to take back.
        """
        return self._database.write(lambda db: question_queue.undo(db, annotator, token, self._terms()))

    def release(self, annotator: str) -> None:
        """Gives back every question that this person holds."""
        self._database.write(lambda db: question_queue.release(db, annotator))

    def answered(self, annotator: str) -> int:
        """Answers of this person that count."""
        return self._database.read(lambda db: question_queue.answered(db, annotator))

    def pace(self, annotator: str) -> float | None:
        """Median seconds of this person's last hundred answers, None before the first."""
        return self._database.read(lambda db: question_queue.pace(db, annotator))

    # ---- to and from files

    def given_answers(self) -> list[GivenAnswer]:
        """Every answer that counts, with what identifies it in another store."""
        until = self.last_event()
        return self._database.read(lambda db: replication.given_answers(db, until))

    def take_in(self, answers: Sequence[GivenAnswer]) -> int:
        """Adds answers of another store or a file, with their questions; returns how many were not there yet."""
        return self._database.write(lambda db: replication.take_in(db, answers, self._clock()))

    # ---- accounts

    def add_user(self, name: str, role: Role, password_hash: str) -> None:
        """Adds an account; raises StoreError if the name is taken."""
        self._database.write(lambda db: accounts.add_user(db, name, role, password_hash, self._clock()))

    def set_password(self, name: str, password_hash: str) -> None:
        """Replaces a user's password and ends his logins; raises StoreError if there is no such user."""
        self._database.write(lambda db: accounts.set_password(db, name, password_hash))

    def remove_user(self, name: str) -> None:
        """Removes an account with its logins, and gives back what it holds; raises StoreError if there is none."""
        self._database.write(lambda db: accounts.remove_user(db, name))

    def user(self, name: str) -> User | None:
        """The account of this name."""
        return self._database.read(lambda db: accounts.user(db, name))

    def users(self) -> list[User]:
        """All accounts by name."""
        return self._database.read(accounts.users)

    def add_login(self, token_hash: str, name: str, expires: datetime) -> None:
        """A browser of this user holds the token with this hash until then."""
        self._database.write(lambda db: accounts.add_login(db, token_hash, name, expires, self._clock()))

    def login(self, token_hash: str) -> User | None:
        """Whose token has this hash; None if nobody's, or no longer."""
        return self._database.read(lambda db: accounts.login(db, token_hash, self._clock()))

    def remove_login(self, token_hash: str) -> None:
        """Forgets the token with this hash."""
        self._database.write(lambda db: accounts.remove_login(db, token_hash))
