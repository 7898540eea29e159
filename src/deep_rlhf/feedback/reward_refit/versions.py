"""The reward model fitted again and again to the answers in a store: each version is a folder, whole or not there.

`<folder>/version-<N>/`: a RewardModel that can be fitted again, `watcher/`, another ensemble fitted to the same answers
in other bags, against which no policy is trained, and `version.json`. Whoever opens the folder goes on from its newest
version, so the process that refits may die at any moment.
"""

import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deep_rlhf.errors import UserError
from deep_rlhf.feedback.annotators import reliability
from deep_rlhf.feedback.monitoring import forecast
from deep_rlhf.feedback.records import Label
from deep_rlhf.feedback.reward_refit.ensemble import Fitted, RefitSettings, RewardFit, classifier_of
from deep_rlhf.feedback.reward_refit.preferences import training_preferences
from deep_rlhf.feedback.state import AGREEMENT, ANNOTATORS, FORECAST, SELECTION
from deep_rlhf.feedback.store import Store
from deep_rlhf.models.load import load_language_model, load_tokenizer
from deep_rlhf.runtime.run_directory import replace_folder, write_summary

logger = logging.getLogger(__name__)

JOB, VERSION, WATCHER, START_ANSWERS = "job.json", "version.json", "watcher", "start_answers.json"
KEPT = 3  # versions on the disk
MAY_CHANGE = ("learning_rate", "batch_size", "label_noise")  # settings of a reward model that is there already
_NAME = re.compile(r"version-(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitJob:
    """What a process that refits is told, as JSON. Where the store is stands apart: there may be a password in it."""

    policy: str  # folder or name of the model that the policy began as
    first: int  # labels that the first reward model waits for
    after: int  # new labels that make a refit due, or …
    growth: float  # … this share of all, whichever is more
    settings: dict[str, Any]
    watchers: int  # members of the second ensemble, 0 for none


@dataclass(frozen=True, slots=True, kw_only=True)
class Refitted:
    """A version of the reward model."""

    number: int
    labels: int  # that were there
    last_event: int  # the newest event that it knows of
    figures: dict[str, float] = field(default_factory=dict)
    path: Path = Path()


class Refits:
    """Fits the versions of a folder to the answers in a store; `job` says when and how."""

    def __init__(
        self,
        job: RefitJob,
        folder: Path,
        store: Store,
        *,
        policy: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]] | None = None,
    ) -> None:
        """`policy` gives the language model whose trunk the first reward model starts from; default: `job.policy`."""
        self.job, self.folder, self.store = job, folder, store
        self._policy = policy or (lambda: (load_language_model(job.policy), load_tokenizer(job.policy)))
        self.newest = newest_version(folder)
        self._fit: RewardFit | None = None
        self._watcher: RewardFit | None = None

    def due(self) -> bool:
        """Whether enough answers have come."""
        count = self.store.label_count()
        if self.newest is None:
            return count >= self.job.first
        return count - self.newest.labels >= max(self.job.after, math.ceil(self.job.growth * self.newest.labels))

    def run(self) -> Refitted:
        """Fits the next version and puts what it says of people and of answers into the store."""
        event, count = self.store.last_event(), self.store.label_count()
        labels = [label for label in self.store.labels() if label.event_id <= event]
        self._open()
        assert self._fit is not None
        preferences, asked = training_preferences(labels)
        people = {one.name: one.error_rate for one in ANNOTATORS.read(self.store) or []}
        told: dict[str, Any] = {
            "noise": people,
            "together": {name: label.comparison.answers for name, label in asked.items()},
            "recent": start_answers(self.folder),
        }
        fitted = self._fit.fit(preferences, **told)
        watched = self._watcher.fit(preferences, **told) if self._watcher else None
        figures = _figures(fitted, watched)
        self.newest = self._write(Refitted(number=self._next_number(), labels=count, last_event=event, figures=figures))
        predicted = {asked[name].comparison_id: p for name, p in fitted.predictions.items()}
        self._tell(labels, predicted, count, pairs=len(preferences))
        return self.newest

    def _open(self) -> None:
        """The ensembles as they were left, or fresh heads on the policy's trunk."""
        if self._fit is not None:
            return
        settings = RefitSettings(**self.job.settings)
        if self.newest is not None:
            self._fit = RewardFit.load(self.newest.path)
            if (self.newest.path / WATCHER).is_dir():
                self._watcher = RewardFit.load(self.newest.path / WATCHER)
            for fit in (self._fit, self._watcher):
                if fit is not None:
                    fit.settings = replace(fit.settings, **{name: self.job.settings[name] for name in MAY_CHANGE})
            return
        model, tokenizer = self._policy()
        self._fit = RewardFit(classifier_of(model, settings.members), tokenizer, settings)
        if self.job.watchers:
            other = replace(settings, members=self.job.watchers, seed=settings.seed + 1)
            self._watcher = RewardFit(classifier_of(model, other.members), tokenizer, other)

    def _next_number(self) -> int:
        """Above all that were there: in the folder, whole or not, and in the store, which another folder may have."""
        known = [number for number, _ in _versions(self.folder)]
        return 1 + max(known + [version.number for version in self.store.versions("reward")], default=0)

    def _write(self, version: Refitted) -> Refitted:
        fit, whole = self._fit, self.folder / f"version-{version.number}"
        assert fit is not None

        def write(folder: Path) -> None:
            fit.save(folder)
            if self._watcher is not None:
                self._watcher.save(folder / WATCHER)
            written = {name: value for name, value in asdict(version).items() if name != "path"}
            write_summary(folder / VERSION, written)

        try:
            replace_folder(whole, write)
        except OSError as error:
            raise UserError(f"The reward model could not be written to '{whole}': {error.strerror}.") from error
        for number, path in _versions(self.folder)[KEPT:]:
            logger.debug("Version %d of the reward model is removed.", number)
            shutil.rmtree(path, ignore_errors=True)
        return replace(version, path=whole)

    def _tell(self, labels: list[Label], predicted: Mapping[int, float], count: int, *, pairs: int) -> None:
        """Puts the figures of people, of choosing and of what more labels will bring into the store."""
        assert self._fit is not None
        ANNOTATORS.write(self.store, reliability.figures(labels, predicted))
        AGREEMENT.write(self.store, reliability.alpha(labels))
        SELECTION.write(self.store, forecast.choosing(labels, predicted))
        each = count / pairs  # a ranking is one answer and several pairs
        history = [(known * each, share, told) for known, share, told in self._fit.progress.history]
        FORECAST.write(self.store, forecast.outlook(history, count))


def newest_version(folder: Path) -> Refitted | None:
    """The newest version in a folder, None without one."""
    for _, path in _versions(folder):
        try:
            return Refitted(**json.loads((path / VERSION).read_text(encoding="utf-8")), path=path)
        except (OSError, ValueError, TypeError) as error:
            logger.warning("The reward model in '%s' is skipped: it cannot be read (%s).", path, error)
    return None


def check_settings(folder: Path, job: RefitJob) -> None:
    """Raises UserError if the reward model of a folder was begun in a way that a job cannot go on with."""
    newest = newest_version(folder)
    if newest is None:
        return
    begun = RewardFit.load(newest.path).settings
    for name in ("members", "template"):
        if (was := getattr(begun, name)) != (now := job.settings[name]):
            raise UserError(
                f"The reward model in '{folder}' was begun with {name}={was}, not {now}: leave --{name} as it was, or"
                " give another --output_dir and --store."
            )


def start_answers(folder: Path) -> list[tuple[str, str]] | None:
    """Prompts and answers of the start policy, on which every version has mean 0 and standard deviation 1.

    The same for all versions, so that a reward means the same from one to the next, and the KL penalty keeps its weight
    however alike the answers become (as in Ziegler et al. 2019; Christiano et al. 2017 take the newest answers).
    """
    path = folder / START_ANSWERS
    if not path.exists():
        return None
    return [(prompt, answer) for prompt, answer in json.loads(path.read_text(encoding="utf-8"))["answers"]]


def write_start_answers(folder: Path, answers: list[tuple[str, str]]) -> None:
    """Writes what `start_answers` reads."""
    write_summary(folder / START_ANSWERS, {"answers": [list(pair) for pair in answers]})


def _figures(fitted: Fitted, watched: Fitted | None) -> dict[str, float]:
    figures = {
        "train_loss": fitted.train_loss,
        "oob_loss": fitted.oob_loss,
        "ratio": fitted.ratio,
        "weight_decay": fitted.weight_decay,
        "oob_accuracy": sum(fitted.oob_accuracy) / len(fitted.oob_accuracy),
        "accuracy": fitted.accuracy,
        "seconds": fitted.seconds + (watched.seconds if watched else 0.0),
    }
    return {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}


def _versions(folder: Path) -> list[tuple[int, Path]]:
    """Numbers and folders, the newest first."""
    found = [(int(match[1]), path) for path in folder.glob("version-*") if (match := _NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)
