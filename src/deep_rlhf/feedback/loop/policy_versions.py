"""Versions of the policy: snapshots on disk, their responses to the fixed prompts, the best one, and roll-back.

The snapshots of the start policy, of the newest versions and of the best one are kept; of the others only the figures
in the store remain.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deep_rlhf.algorithms.online.trainer import OnlineTrainer
from deep_rlhf.errors import CheckpointError
from deep_rlhf.feedback.monitoring.win_rate import won_by_newer
from deep_rlhf.feedback.records import Label, Version
from deep_rlhf.feedback.store import Store
from deep_rlhf.runtime.checkpoint import latest_checkpoint, save_checkpoint
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
        store: Store,
        folder: Path,
        *,
        shown: Sequence[str],
        judged: Sequence[str],
        is_restorable: Callable[[Figures], bool] = lambda figures: True,
    ) -> None:
        """`shown`: prompts whose responses the page shows; `judged`: prompts whose responses compare versions.

        `is_restorable` decides by its figures whether a version may be restored; the start policy always may.
        """
        self.trainer, self.store, self.folder = trainer, store, folder
        self.shown, self.judged, self._is_restorable = list(shown), list(judged), is_restorable
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, version: Version, scorer: Scorer | None, labels: Sequence[Label], figures: Figures) -> None:
        """Saves the current policy as `version`, and removes snapshots that are neither among the newest nor the best.

        `figures`: the current ones of the alarms.
        """
        folder = self.folder / str(version.number)
        responses = self.trainer.generate([*self.shown, *self.judged], seed=SAMPLING_SEED)
        save_checkpoint(folder, version.number, self.trainer.snapshot(), keep=1)
        write_summary(folder / RESPONSES, {"responses": responses[len(self.shown) :], "figures": figures})
        self.store.add_samples(version.number, list(zip(self.shown, responses, strict=False)))
        self.store.add_version(version)
        if scorer is None:
            return
        keep = {0, self.best(scorer, labels), *sorted(self._numbers())[-KEPT:]}
        for number in set(self._numbers()) - keep:
            shutil.rmtree(self.folder / str(number), ignore_errors=True)

    def best(self, scorer: Scorer, labels: Sequence[Label]) -> int:
        """The number of the best version that has a snapshot and may be restored."""
        wins: dict[int, list[float]] = {}
        for label in labels:
            won = won_by_newer(label)
            if won is not None:
                wins.setdefault(max(label.comparison.writers), []).append(won)
        merits = [
            Merit(number=number, wins=tuple(wins.get(number, ())), score=self._score(number, scorer))
            for number in self._numbers()
            if number == 0 or self._is_restorable(self.figures(number))
        ]
        return best_of(merits).number

    def figures(self, number: int) -> dict[str, float]:
        """The alarms' figures when the version was made."""
        found: dict[str, float] = _read(self.folder / str(number) / RESPONSES)["figures"]
        return found

    def restore(self, number: int) -> None:
        """Restores the policy to a version that has a snapshot. Raises CheckpointError if that cannot be read."""
        found = latest_checkpoint(self.folder / str(number))
        if found is None:
            raise CheckpointError(f"The snapshot of version {number} in '{self.folder}' cannot be read.")
        self.trainer.restore(found.state)

    def roll_back(self, scorer: Scorer, labels: Sequence[Label]) -> int:
        """Restores the policy to the best version, and returns its number."""
        number = self.best(scorer, labels)
        self.restore(number)
        return number

    def _score(self, number: int, scorer: Scorer) -> float:
        responses = _read(self.folder / str(number) / RESPONSES)["responses"]
        return float(scorer.score(self.judged, responses).mean()) if self.judged else float(number)

    def _numbers(self) -> list[int]:
        """The versions that have a complete snapshot."""
        folders = [path for path in self.folder.iterdir() if path.name.isdigit() and (path / RESPONSES).exists()]
        return sorted(int(path.name) for path in folders)


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


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
