"""What a session leaves on the disk, and how it finds it again."""

import fcntl
import hashlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from deep_rlhf.algorithms.online.state import trainable_tensors
from deep_rlhf.algorithms.online.trainer import OnlineTrainer
from deep_rlhf.errors import StoreError, UserError
from deep_rlhf.feedback.state import ACTIVE_LOOP, HEARTBEAT, START_POLICY
from deep_rlhf.feedback.store import Store
from deep_rlhf.runtime.checkpoint import latest_checkpoint, save_checkpoint

LOCK = ".lock"
SILENCE = timedelta(seconds=15)  # after which a loop that does not answer for itself is taken to be gone


@dataclass(slots=True)
class Progress:
    """What a checkpoint says of the session beside what the trainer learned."""

    step: int = 0
    policy_version: int = -1
    version_step: int = 0  # at which the newest version was made
    reward_version: int = 0
    rolled_back: int = 0  # times


class Saved:
    """The checkpoints of a session in `<folder>/checkpoints`; the store says which policy it belongs to."""

    def __init__(self, folder: Path, store: Store, policy: str) -> None:
        """`policy`: fingerprint of the start. Raises UserError if store or folder belong to another policy."""
        self._folder, self._store, self._policy = folder / "checkpoints", store, policy
        self._folder.mkdir(parents=True, exist_ok=True)
        known = START_POLICY.read(store)
        if known not in (None, policy):
            raise UserError(
                f"{store!r} holds answers about another policy than this one: give another --store, or the model that"
                " it began with."
            )
        found = latest_checkpoint(self._folder)
        if found is not None and found.state["policy"] != policy:
            raise UserError(f"'{folder}' holds the run of another policy: give another --output_dir.")
        START_POLICY.write(store, policy)
        self._found = found.state if found is not None else None

    def newest(self) -> dict[str, Any] | None:
        """What was saved last, None in a new folder."""
        return self._found

    def next_version(self) -> int:
        """The number of the next version of the policy, where only the store remembers earlier ones.

        One that has not learned anything is made again under its number.
        """
        versions = self._store.versions("policy")
        return versions[-1].number + (versions[-1].step > 0) if versions else 0

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes a checkpoint; raises UserError when the disk refuses it."""
        save_checkpoint(self._folder, step, {**state, "policy": self._policy})


def fingerprint(trainer: OnlineTrainer) -> str:
    """Of the weights that a trainer starts with."""
    digest = hashlib.sha256()
    for name, tensor in trainable_tensors(trainer.sampler.policy).items():
        digest.update(name.encode())
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def only_here(folder: Path, store: Store) -> Iterator[None]:
    """While it lasts nobody else can enter for the same folder or store. Raises UserError if somebody has."""
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"Another loop is running in '{folder}': stop it first, or give another --output_dir."
            ) from error
        here = f"{folder.resolve()} on {socket.gethostname()}"
        other, beat = ACTIVE_LOOP.read(store), HEARTBEAT.read(store)
        if other not in (None, here) and beat is not None and datetime.now(UTC) - beat < SILENCE:
            raise UserError(
                f"{store!r} is worked on by another loop, in {other}: stop it first, or give another --store."
            )
        ACTIVE_LOOP.write(store, here)
        try:
            yield
        finally:
            with suppress(StoreError):  # the database may be away; then others wait until the heartbeat is old
                ACTIVE_LOOP.write(store, None)
