"""Versions of the policy: snapshots on disk, their responses to the fixed prompts, the best one, and roll-back.

The snapshots of the start policy, of the newest versions and of the best one are kept; of the others only the figures
in the store remain.
"""

import json
import logging
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deep_rlhf.algorithms.online.trainer import OnlineTrainer
from deep_rlhf.errors import CheckpointError
from deep_rlhf.feedback.monitoring.win_rate import won_by_newer
from deep_rlhf.feedback.records import Label
from deep_rlhf.runtime.checkpoint import latest_checkpoint, save_checkpoint
from deep_rlhf.runtime.history import refuse_pipes
from deep_rlhf.runtime.run_directory import write_summary
from deep_rlhf.types import Scorer

logger = logging.getLogger(__name__)

Figures = Mapping[str, float | None]

KEPT = 3  # newest versions
LEAST_WINS = 10  # labels of blind pairs from which on the win rate counts, and not the reward
RESPONSES = "responses.json"
SAMPLING_SEED = 7  # the same for all versions, so that only the policy differs


@dataclass(frozen=True, slots=True, kw_only=True)
class Merit:
    """How good a version is: its results in blind pairs against the start policy, and its mean reward."""

    number: int
    wins: tuple[float, ...]  # 1, ½ or 0 for each label
    score: float


class PolicyVersions:
    """Saves versions of a trainer's policy, and restores the best one."""

    def __init__(
        self,
        trainer: OnlineTrainer,
        folder: Path,
        *,
        shown: Sequence[str],
        judged: Sequence[str],
        is_restorable: Callable[[Figures], bool] = lambda figures: True,
    ) -> None:
        """`shown`: prompts whose responses the page shows; `judged`: prompts whose responses compare versions.

        `is_restorable` decides by its figures whether a version may be restored; the start policy always may.
        """
        self.trainer, self.folder = trainer, folder
        self.shown, self.judged, self._is_restorable = list(shown), list(judged), is_restorable
        self._skipped: set[str] = set()  # damaged versions that a warning has named
        folder.mkdir(parents=True, exist_ok=True)

    def add(
        self, number: int, scorer: Scorer | None, labels: Sequence[Label], figures: Figures
    ) -> list[tuple[str, str]]:
        """Saves the current policy as a version, and removes snapshots that are neither among the newest nor the best.

        `figures`: the current ones of the alarms. Returns the shown prompts with their responses.
        """
        folder = self.folder / str(number)
        responses = self.trainer.generate([*self.shown, *self.judged], seed=SAMPLING_SEED)
        save_checkpoint(folder, number, self.trainer.snapshot(), keep=1)
        write_summary(folder / RESPONSES, {"responses": responses[len(self.shown) :], "figures": figures})
        if scorer is not None:
            numbers = sorted(self._readable())
            keep = {0, self.best(scorer, labels), *numbers[-KEPT:]}
            for other in set(numbers) - keep:
                shutil.rmtree(self.folder / str(other), ignore_errors=True)
        return list(zip(self.shown, responses, strict=False))

    def remove_after(self, number: int) -> None:
        """Removes snapshots with larger numbers: those of updates that a kill has undone."""
        for path in self.folder.iterdir():
            if path.name.isdigit() and int(path.name) > number:
                shutil.rmtree(path, ignore_errors=True)

    def best(self, scorer: Scorer, labels: Sequence[Label], without: Collection[int] = ()) -> int:
        """The number of the best version that has a snapshot and may be restored; those in `without` do not count.

        Raises CheckpointError if there is none.
        """
        wins: dict[int, list[float]] = {}
        for label in labels:
            won = won_by_newer(label)
            if won is not None:
                wins.setdefault(max(label.comparison.writers), []).append(won)
        merits = [
            Merit(
                number=number, wins=tuple(wins.get(number, ())), score=self._score(found["responses"], scorer, number)
            )
            for number, found in self._readable().items()
            if number not in without and (number == 0 or self._is_restorable(found["figures"]))
        ]
        if not merits:
            raise CheckpointError(f"No version of the policy in '{self.folder}' can be restored: start a new run.")
        return best_of(merits).number

    def figures(self, number: int) -> dict[str, float]:
        """The alarms' figures when the version was made."""
        found: dict[str, float] = self._readable()[number]["figures"]
        return found

    def restore(self, number: int) -> None:
        """Restores the policy to a version that has a snapshot. Raises CheckpointError if that cannot be read."""
        found = latest_checkpoint(self.folder / str(number))
        if found is None:
            raise CheckpointError(f"The snapshot of version {number} in '{self.folder}' cannot be read.")
        self.trainer.restore(found.state)

    def roll_back(self, scorer: Scorer, labels: Sequence[Label]) -> int:
        """Restores the policy to the best version whose snapshot can be read, and returns its number.

        Raises CheckpointError if there is none.
        """
        damaged: list[int] = []
        while True:
            number = self.best(scorer, labels, without=damaged)
            try:
                self.restore(number)
            except CheckpointError as error:
                logger.warning("%s The next best version is restored.", error)
                damaged.append(number)
            else:
                return number

    def _score(self, responses: list[str], scorer: Scorer, number: int) -> float:
        return float(scorer.score(self.judged, responses).mean()) if self.judged else float(number)

    def _readable(self) -> dict[int, dict[str, Any]]:
        """The responses and figures of the versions that have a snapshot, by number; a warning names damaged files."""
        found = {}
        for path in self.folder.iterdir():
            if not path.name.isdigit() or not (path / RESPONSES).exists():
                continue
            try:
                refuse_pipes(path / RESPONSES)
                content = json.loads((path / RESPONSES).read_text(encoding="utf-8"))
                if len(content["responses"]) != len(self.judged) or not isinstance(content["figures"], dict):
                    raise ValueError("it does not hold the responses and figures of a version")
            except (OSError, ValueError, TypeError, LookupError) as error:
                if path.name not in self._skipped:
                    logger.warning("Version %s is skipped: '%s' is damaged (%s).", path.name, path / RESPONSES, error)
                self._skipped.add(path.name)
                continue
            found[int(path.name)] = content
        return dict(sorted(found.items()))


def best_of(merits: Sequence[Merit]) -> Merit:
    """The version with the highest win rate if any has enough labels, otherwise the highest reward.

    The start policy counts with a win rate of ½. Among equals the newest is best.
    """
    known = [merit for merit in merits if len(merit.wins) >= LEAST_WINS or merit.number == 0]
    if any(merit.number for merit in known):
        return max(known, key=lambda merit: (_win_rate(merit), merit.number))
    return max(merits, key=lambda merit: (merit.score, merit.number))


def _win_rate(merit: Merit) -> float:
    return 0.5 if merit.number == 0 else sum(merit.wins) / len(merit.wins)
