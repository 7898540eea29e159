"""The store: a façade whose methods each run one transaction of `trainer_api`, `question_queue` or `accounts`."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, Self

from sqlalchemy import Connection

from deep_rlhf.feedback.records import Alarm, Choice, Comparison, Label, Question, Reason, Row, Version
from deep_rlhf.feedback.store import accounts, question_queue, replication, trainer_api
from deep_rlhf.feedback.store.accounts import Role, User
from deep_rlhf.feedback.store.engine import Database
from deep_rlhf.feedback.store.question_queue import LabelInput, LeaseTerms
from deep_rlhf.feedback.store.replication import PortableLabel


def utc_now() -> datetime:
    """The current time in UTC."""
    return datetime.now(UTC)


class Store:
    """Questions, labels, versions and accounts. Several threads may share one; each process opens its own.

    `url` is a file (SQLite) or postgresql+psycopg://…; a missing store is created (unless it `must_exist`), an old one
    is migrated; one that is `read_only` must exist and is not changed in any way. A database of another program is
    never changed. A lease lasts `lease_seconds`. `seed` makes the shown order of responses reproducible, `clock`
    replaces the time in tests. A method that writes returns after the commit has reached the disk. Every method raises
    StoreUnavailable if the database does not answer, and StoreDamaged for a row, table or file that cannot be read;
    opening raises StoreError if the store cannot be used.
    """

    def __init__(
        self,
        url: str | Path,
        *,
        lease_seconds: float = 300,
        seed: int | None = None,
        clock: Callable[[], datetime] = utc_now,
        must_exist: bool = False,
        read_only: bool = False,
    ) -> None:
        self.lease = timedelta(seconds=lease_seconds)
        self.url = str(url)  # may contain a password
        self._seed, self._clock = seed, clock
        self._database = Database(url, must_exist=must_exist, read_only=read_only)

    def __repr__(self) -> str:
        return self._database.name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def is_kept_in(self, path: Path) -> bool:
        """Whether this file is the store."""
        return self._database.is_sqlite and path.exists() and path.samefile(str(self._database.url.database))

    def close(self) -> None:
        """Closes all connections."""
        self._database.close()

    def _terms(self) -> LeaseTerms:
        return LeaseTerms(self._clock(), self.lease, self._seed)

    # ---- the trainer's side

    def add(self, comparisons: Sequence[Comparison], *, values: Mapping[str, Any] | None = None) -> list[int]:
        """Adds questions; returns their ids in order. `values` are written as by `put`, in the same transaction.

        Raises StoreError for a priority or overlap out of range, and for a repeat of an unknown comparison.
        """

        def work(db: Connection) -> list[int]:
            for key, value in (values or {}).items():
                trainer_api.put(db, key, value)
            return trainer_api.add(db, comparisons, self._clock())

        return self._database.write(work)

    def asked(self, reason: Reason) -> list[Comparison]:
        """All questions that were ever asked for this reason, in order."""
        return self._database.read(lambda db: trainer_api.asked(db, reason))

    def withdraw(self, *, older_than_policy: int) -> int:
        """Withdraws questions about older policies that nobody labelled or holds; returns how many."""
        return self._database.write(lambda db: trainer_api.withdraw(db, older_than_policy, self._clock()))

    def waiting(self) -> int:
        """How many questions could be given to somebody now."""
        return self._database.read(lambda db: trainer_api.waiting(db, self._clock()))

    def unseen(self) -> int:
        """How many of these could be given to anybody: not labelled or skipped by anyone, and no repeats."""
        return self._database.read(lambda db: trainer_api.unseen(db, self._clock()))

    def labels(self, *, after: int = 0, until: int | None = None) -> list[Label]:
        """Labels that were not undone, by event id: `after` < id ≤ `until`."""
        last = self.last_event() if until is None else until
        return self._database.read(lambda db: trainer_api.labels(db, after, last))

    def undone(self, *, after: int, until: int) -> set[int]:
        """The ids of the events that were undone by an event: `after` < id of the latter ≤ `until`."""
        return self._database.read(lambda db: trainer_api.undone(db, after, until))

    def label_count(self) -> int:
        """How many labels a reward model can learn from: not "can't tell", gold, repeated or blind pairs."""
        return self._database.read(trainer_api.label_count)

    def last_event(self) -> int:
        """The id of the newest event of any kind, 0 before the first. All events with smaller ids are visible."""
        return self._database.read(trainer_api.last_event)

    def add_version(self, version: Version) -> None:
        """Adds a version, or replaces the one of the same kind and number."""
        self._database.write(lambda db: trainer_api.add_version(db, version, self._clock()))

    def versions(self, kind: Literal["policy", "reward"]) -> list[Version]:
        """All versions of one kind, by number."""
        return self._database.read(lambda db: trainer_api.versions(db, kind))

    def add_metrics(self, rows: Sequence[Row]) -> int:
        """Adds rows of metrics, which are JSON objects; returns the newest id. A number not finite becomes null."""
        return self._database.write(lambda db: trainer_api.add_metrics(db, rows))

    def metrics(self, *, after: int = 0) -> list[Row]:
        """Rows with id > `after`, each with its "id"."""
        return self._database.read(lambda db: trainer_api.metrics(db, after))

    def add_samples(self, policy_version: int, rows: Sequence[tuple[str, str]]) -> None:
        """Replaces the responses of a policy version to the fixed prompts: (prompt, response) pairs."""
        self._database.write(lambda db: trainer_api.add_samples(db, policy_version, rows))

    def samples(self) -> dict[int, list[tuple[str, str]]]:
        """The (prompt, response) pairs of every policy version."""
        return self._database.read(trainer_api.samples)

    def add_alarm(self, alarm: Alarm) -> int:
        """Adds an alarm and returns its id."""
        return self._database.write(lambda db: trainer_api.add_alarm(db, alarm, self._clock()))

    def alarms(self) -> list[Alarm]:
        """All alarms, the oldest first."""
        return self._database.read(trainer_api.alarms)

    def newest_ids(self) -> tuple[int, int]:
        """The ids of the newest row of metrics and of the newest alarm; 0 before the first."""
        return self._database.read(trainer_api.newest_ids)

    def remove_after(self, *, metrics_id: int, alarm_id: int) -> None:
        """Removes the rows of metrics and the alarms with larger ids: those of updates that a kill has undone."""
        self._database.write(lambda db: trainer_api.remove_after(db, metrics_id, alarm_id))

    def put(self, key: str, value: Any) -> None:
        """Writes a JSON value under a key. `feedback.state` has a typed writer for each key."""
        self._database.write(lambda db: trainer_api.put(db, key, value))

    def get(self, key: str, default: Any = None) -> Any:
        """The JSON value under a key, `default` if there is none. `feedback.state` has a typed reader for each key."""
        return self._database.read(lambda db: trainer_api.get(db, key, default))

    # ---- the annotators' side

    def ask(self, annotator: str, *, count: int = 1) -> list[Question]:
        """Leases up to `count` questions to a person: those that they hold already, then new ones by priority.

        Nobody is asked a question again that they labelled or skipped. A repeat goes only to somebody who labelled the
        original. Raises StoreError for a name that is not printable.
        """
        found = self._database.write(lambda db: question_queue.ask(db, annotator, count, self._terms()))
        if found or self._database.is_sqlite:
            return found
        # All free questions may have been locked by other transactions: wait for those.
        terms = self._terms()
        return self._database.write(lambda db: question_queue.ask(db, annotator, count, terms, wait_for_locks=True))

    def add_label(
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
        """Records a label and returns its event id; the same token again returns the same id and changes nothing.

        `choice` refers to the responses in the comparison's order (a is the first), whatever order they were shown in.
        `ranks` has one number per response, 1 the best. Raises LabelRefused if somebody else has the question now, or
        this person labelled it before or never got it, and StoreError if the label does not fit the question.
        """
        given = LabelInput(choice, None if ranks is None else tuple(ranks), strength, seconds)
        return self._database.write(
            lambda db: question_queue.add_label(db, comparison_id, annotator, token, given, self._terms())
        )

    def skip(self, comparison_id: int, annotator: str, *, token: str) -> int:
        """Releases a question that this person does not want to be asked again; returns the event id.

        Raises as `add_label`.
        """
        return self._database.write(lambda db: question_queue.skip(db, comparison_id, annotator, token, self._terms()))

    def undo(self, annotator: str, *, token: str) -> int | None:
        """Undoes this person's last label or skip, and leases its question to them again.

        Returns the comparison's id, None if there is nothing to undo. Raises LabelRefused if somebody else has the
        skipped question now.
        """
        return self._database.write(lambda db: question_queue.undo(db, annotator, token, self._terms()))

    def release(self, annotator: str) -> None:
        """Releases every question that this person holds."""
        self._database.write(lambda db: question_queue.release(db, annotator))

    def labelled(self, annotator: str) -> int:
        """How many labels of this person were not undone."""
        return self._database.read(lambda db: question_queue.labelled(db, annotator))

    def pace(self, annotator: str) -> float | None:
        """Median seconds per label of this person's last hundred labels, None before the first."""
        return self._database.read(lambda db: question_queue.pace(db, annotator))

    # ---- to and from files

    def portable_labels(self) -> list[PortableLabel]:
        """All labels that were not undone, with the keys that identify them in every store."""
        until = self.last_event()
        return self._database.read(lambda db: replication.portable_labels(db, until))

    def check_import(self, labels: Sequence[PortableLabel]) -> None:
        """Raises StoreError for a label whose question the store has with other texts."""
        self._database.read(lambda db: replication.check_import(db, labels))

    def import_labels(self, labels: Sequence[PortableLabel]) -> int:
        """Adds labels of another store or a file, with their questions; returns how many are new to this store."""
        return self._database.write(lambda db: replication.import_labels(db, labels, self._clock()))

    # ---- accounts

    def add_user(self, name: str, role: Role, password_hash: str) -> None:
        """Adds an account; raises StoreError if the name is taken."""
        self._database.write(lambda db: accounts.add_user(db, name, role, password_hash, self._clock()))

    def set_password(self, name: str, password_hash: str) -> None:
        """Replaces a user's password and logs all browsers out; raises StoreError if there is no such user."""
        self._database.write(lambda db: accounts.set_password(db, name, password_hash))

    def remove_user(self, name: str) -> None:
        """Removes an account and its logins, and releases its questions; raises StoreError if there is no such user."""
        self._database.write(lambda db: accounts.remove_user(db, name))

    def user(self, name: str) -> User | None:
        """The account of this name."""
        return self._database.read(lambda db: accounts.user(db, name))

    def users(self) -> list[User]:
        """All accounts by name."""
        return self._database.read(accounts.users)

    def add_login(self, token_hash: str, name: str, expires: datetime) -> None:
        """Adds a login: a browser of this user has the token. Raises StoreError if there is no such user."""
        self._database.write(lambda db: accounts.add_login(db, token_hash, name, expires, self._clock()))

    def login(self, token_hash: str) -> User | None:
        """The user whose login has this token hash, None if there is none or it expired."""
        return self._database.read(lambda db: accounts.login(db, token_hash, self._clock()))

    def remove_login(self, token_hash: str) -> None:
        """Deletes the login with this token hash."""
        self._database.write(lambda db: accounts.remove_login(db, token_hash))
