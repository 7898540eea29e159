"""The versions of the policy: what each answers to the fixed prompts, and which one was the best so far.

A version is a snapshot on the disk. Kept are the start, the newest few and the best; the others live on as figures in
the store.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deep_rlhf.algorithms.online.trainer import OnlineTrainer
from deep_rlhf.errors import UserError
from deep_rlhf.feedback.monitoring.win_rate import won_by_newer
from deep_rlhf.feedback.records import Label, Version
from deep_rlhf.feedback.store import Store
from deep_rlhf.runtime.checkpoint import latest_checkpoint, save_checkpoint
from deep_rlhf.runtime.run_directory import write_summary
from deep_rlhf.types import Scorer

logger = logging.getLogger(__name__)

Figures = Mapping[str, float | None]

KEPT = 3  # of the newest versions
ENOUGH = 10  # blind answers about a version from which on people's word counts more than the reward's
ANSWERS = "answers.json"
SHOWN_SEED = 7  # the same random numbers for every version: what changes between two is the policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Merit:
    """What speaks for a version: how often people liked it better than the start, and the reward of its answers."""

    number: int
    wins: tuple[float, ...]  # 1, ½ or 0 of each blind answer
    score: float


class PolicyVersions:
    """Makes versions of a trainer's policy and finds the best one again."""

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
        """`shown`: prompts whose answers people see; `judged`: more, by whose answers versions are compared.

        `is_restorable` says whether a version of such figures is one to go back to; the start always is.
        """
        self.trainer, self.store, self.folder = trainer, store, folder
        self.shown, self.judged, self._is_restorable = list(shown), list(judged), is_restorable
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, version: Version, scorer: Scorer | None, labels: Sequence[Label], figures: Figures) -> None:
        """Keeps the policy as it is as `version`, and forgets snapshots that are neither new nor the best.

        `figures`: those that alarms watch, as they are now.
        """
        folder = self.folder / str(version.number)
        answers = self.trainer.generate([*self.shown, *self.judged], seed=SHOWN_SEED)
        save_checkpoint(folder, version.number, self.trainer.snapshot(), keep=1)
        write_summary(folder / ANSWERS, {"answers": answers[len(self.shown) :], "figures": figures})
        self.store.add_samples(version.number, list(zip(self.shown, answers, strict=False)))
        self.store.add_version(version)
        if scorer is None:
            return
        keep = {0, self.best(scorer, labels), *sorted(self._numbers())[-KEPT:]}
        for number in set(self._numbers()) - keep:
            shutil.rmtree(self.folder / str(number), ignore_errors=True)

    def best(self, scorer: Scorer, labels: Sequence[Label]) -> int:
        """The number of the best version whose snapshot is kept, and in which no figure was near a limit."""
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
        """Those that alarms watch, as they were when the version was made."""
        found: dict[str, float] = _read(self.folder / str(number) / ANSWERS)["figures"]
        return found

    def restore(self, number: int) -> None:
        """Puts the policy back to a version that is kept. Raises UserError if its snapshot cannot be read."""
        found = latest_checkpoint(self.folder / str(number))
        if found is None:
            raise UserError(f"The snapshot of version {number} in '{self.folder}' cannot be read.")
        self.trainer.restore(found.state)

    def _score(self, number: int, scorer: Scorer) -> float:
        answers = _read(self.folder / str(number) / ANSWERS)["answers"]
        return float(scorer.score(self.judged, answers).mean()) if self.judged else float(number)

    def _numbers(self) -> list[int]:
        """The versions that are kept whole."""
        folders = [path for path in self.folder.iterdir() if path.name.isdigit() and (path / ANSWERS).exists()]
        return sorted(int(path.name) for path in folders)


def best_of(merits: Sequence[Merit]) -> Merit:
    """The version that won most against the start, if people have said enough of any; else the highest reward.

    The start itself wins half of the time. Of equals the newest.
    """
    known = [merit for merit in merits if len(merit.wins) >= ENOUGH or merit.number == 0]
    if any(merit.number for merit in known):
        return max(known, key=lambda merit: (_rate(merit), merit.number))
    return max(merits, key=lambda merit: (merit.score, merit.number))


def _rate(merit: Merit) -> float:
    return 0.5 if merit.number == 0 else sum(merit.wins) / len(merit.wins)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
