"""Checkpoints of a session, and the lock that keeps two loops from sharing a run folder or a store."""

import fcntl
import hashlib
import logging
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from deep_rlhf.algorithms.online.state import trainable_tensors
from deep_rlhf.algorithms.online.trainer import OnlineTrainer
from deep_rlhf.errors import CheckpointError, StoreError
from deep_rlhf.feedback.state import ACTIVE_LOOP, HEARTBEAT, START_POLICY
from deep_rlhf.feedback.store import Store
from deep_rlhf.runtime.checkpoint import changed_flags, has_checkpoints, latest_checkpoint, save_checkpoint
from deep_rlhf.runtime.run_files import set_aside_damaged_checkpoints

logger = logging.getLogger(__name__)

LOCK = ".lock"
SILENCE = timedelta(seconds=15)  # without a heartbeat for this long, a loop counts as dead


@dataclass(slots=True)
class SessionProgress:
    """The counters of a session, saved in its checkpoints."""

    step: int = 0  # policy updates that are done
    policy_version: int = -1
    version_step: int = 0  # at which the newest version of the policy was made
    reward_version: int = 0
    reward_labels: int = 0  # that it has learned from
    reward_last_event: int = 0
    reward_step: int = -1  # at which it was adopted
    rolled_back: int = 0  # number of roll-backs
    restored: int | None = None  # by a roll-back after which no version of the policy was made yet


class SessionCheckpoints:
    """The checkpoints in `<folder>/checkpoints`. Each folder and each store belongs to one start policy."""

    def __init__(self, folder: Path, store: Store, policy: str) -> None:
        """`policy`: fingerprint of the start policy. Raises CheckpointError if folder or store belong to another."""
        self._folder, self._store, self._policy = folder / "checkpoints", store, policy
        self._folder.mkdir(parents=True, exist_ok=True)
        known = START_POLICY.read(store)
        if known not in (None, policy):
            raise CheckpointError(
                f"{store!r} holds labels about another policy: give another --store, or the --model that it began with."
            )
        found = latest_checkpoint(self._folder)
        if found is None and has_checkpoints(self._folder):
            logger.warning("No checkpoint in '%s' is whole: the loop starts from the beginning.", self._folder)
            set_aside_damaged_checkpoints(self._folder)
        if found is not None and found.state.get("policy") != policy:
            raise CheckpointError(f"'{folder}' holds the run of another policy: give another --output_dir.")
        if found is not None and known is None:
            raise CheckpointError(
                f"{store!r} knows nothing of the run in '{folder}', which has its labels in another store: give that"
                " --store, or another --output_dir."
            )
        START_POLICY.write(store, policy)
        self._found = found.state if found is not None else None

    def newest(self) -> dict[str, Any] | None:
        """The state that was saved last when the session began; None in a new folder."""
        return self._found

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raises CheckpointError if the run began with another value of one of these settings, which cannot change."""
        begun = self._found.get("settings", {}) if self._found else {}
        both = begun.keys() & settings.keys()
        changed = changed_flags({name: begun[name] for name in both}, {name: settings[name] for name in both}, free=())
        if changed:
            raise CheckpointError(
                f"The run in '{self._folder.parent}' cannot go on with another {changed}: leave that as it was, or give"
                " another --output_dir and --store."
            )

    def next_version(self) -> int:
        """The number of the first version of the policy in a new folder, after those that the store knows.

        The store's newest version is replaced if it was made before the first update.
        """
        versions = self._store.versions("policy")
        return versions[-1].number + (versions[-1].step > 0) if versions else 0

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes a checkpoint. Raises CheckpointError if it cannot be written."""
        save_checkpoint(self._folder, step, {**state, "policy": self._policy})


def policy_fingerprint(trainer: OnlineTrainer) -> str:
    """A digest of the weights that the trainer has now."""
    digest = hashlib.sha256()
    for name, tensor in trainable_tensors(trainer.sampler.policy).items():
        digest.update(name.encode())
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def digest_of(texts: Sequence[str]) -> str:
    """The number of texts and a digest of them, for messages that compare two lists."""
    digest = hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{len(texts)} with digest {digest}"


@contextmanager
def exclusive_run(folder: Path, store: Store) -> Iterator[None]:
    """Holds an exclusive lock on the run folder and the store. Raises CheckpointError if another loop holds either."""
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(
                f"Another loop is running in '{folder}': stop it first, or give another --output_dir."
            ) from error
        name = f"{folder.resolve()} on {socket.gethostname()}"
        other, beat = ACTIVE_LOOP.read(store), HEARTBEAT.read(store)
        if other not in (None, name) and beat is not None and datetime.now(UTC) - beat < SILENCE:
            raise CheckpointError(
                f"{store!r} is used by another loop, in {other}: stop it first, or give another --store."
            )
        ACTIVE_LOOP.write(store, name)
        try:
            yield
        finally:
            with suppress(StoreError):  # if the database is unavailable, others wait until the heartbeat is old
                ACTIVE_LOOP.write(store, None)
