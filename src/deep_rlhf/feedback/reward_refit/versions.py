"""Versions of the reward model, each fitted to the labels in a store and saved as a folder.

`<folder>/version-<N>/` holds a RewardFit, `version.json`, and in `held_out/` the held-out ensemble: a second ensemble,
fitted to the same labels in other bags, against which no policy is trained. A version appears in one rename, and
`Refits` continues from the newest one, so the process that refits may die at any moment.
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

from deep_rlhf.errors import CheckpointError, ConfigError, UserError
from deep_rlhf.feedback.annotators import reliability
from deep_rlhf.feedback.monitoring.forecast import compare_selection, forecast_accuracy
from deep_rlhf.feedback.records import AnnotatorFigures, Label
from deep_rlhf.feedback.reward_refit.ensemble import Fitted, RefitSettings, RewardFit, classifier_of
from deep_rlhf.feedback.reward_refit.preferences import training_labels, training_preferences
from deep_rlhf.feedback.state import AGREEMENT, ANNOTATORS, FORECAST, SELECTION
from deep_rlhf.feedback.store import Store
from deep_rlhf.models.load import load_language_model, load_tokenizer
from deep_rlhf.runtime.checkpoint import file_digest
from deep_rlhf.runtime.history import refuse_pipes
from deep_rlhf.runtime.run_directory import replace_folder, write_summary

logger = logging.getLogger(__name__)

JOB, VERSION, HELD_OUT, START_RESPONSES = "job.json", "version.json", "held_out", "start_responses.json"
FAILURE = "failure.json"  # why the newest refit ended without a version, for the process that trains the policy
KEPT = 3  # versions on the disk
DIGESTS = "sha256"  # in version.json: of every other file
RESUME_MAY_CHANGE = ("learning_rate", "batch_size", "label_noise")
_NAME = re.compile(r"version-(\d+)")
_DAMAGE = (OSError, ValueError, TypeError, LookupError)  # what reading a damaged file raises


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitJob:
    """What to fit and when, written as JSON for the process that refits.

    The store's address is not in it, since it may contain a password.
    """

    policy: str  # folder or Hub name of the start policy
    initial_labels: int  # labels before the first refit
    refit_after: int  # minimum new labels before a refit
    refit_growth: float  # minimum new labels before a refit, as a share of all labels
    settings: dict[str, Any]  # of RefitSettings
    held_out_members: int  # size of the held-out ensemble; 0 for none


@dataclass(frozen=True, slots=True, kw_only=True)
class Refitted:
    """A version of the reward model."""

    number: int
    labels: int  # in the store when the refit began
    last_event: int  # id of the newest event in the store then
    figures: dict[str, float] = field(default_factory=dict)
    findings: dict[str, Any] = field(default_factory=dict)  # what it shows, as values of the store by key
    path: Path = Path()


class Refits:
    """Fits new versions of the reward model to the labels in a store, as a RefitJob says."""

    def __init__(
        self,
        job: RefitJob,
        folder: Path,
        store: Store,
        *,
        policy: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]] | None = None,
    ) -> None:
        """`policy` returns the language model whose trunk the first version starts from; by default `job.policy`."""
        self.job, self.folder, self.store = job, folder, store
        self._policy = policy or (lambda: (load_language_model(job.policy), load_tokenizer(job.policy)))
        self.newest = newest_version(folder)
        if self.newest is not None:
            self._store_findings(self.newest)  # a kill may have come before
        self._fit: RewardFit | None = None
        self._held_out: RewardFit | None = None

    def due(self) -> bool:
        """Whether there are enough new labels for a refit."""
        count = self.store.label_count()
        if self.newest is None:
            return count >= self.job.initial_labels
        minimum = max(self.job.refit_after, math.ceil(self.job.refit_growth * self.newest.labels))
        return count - self.newest.labels >= minimum

    def version_after(self, known: int) -> Refitted:
        """The version after number `known`: the newest one, if a run that was killed has fitted it, or a new one."""
        self.newest = newest_version(self.folder)
        return self.newest if self.newest is not None and self.newest.number > known else self.run()

    def run(self) -> Refitted:
        """Fits and saves the next version, and stores what it shows about annotators, selection and more labels.

        Raises DataError if no pair is left to learn from, NotFiniteError at the first loss, gradient or weight that is
        NaN or infinite, and CheckpointError if the version cannot be written. After any of them the newest version is
        the one before, from which the next call continues.
        """
        try:
            return self._run()
        except UserError:
            self._fit = self._held_out = None  # they may have changed: the newest version is opened again
            raise

    def _run(self) -> Refitted:
        labels = self.store.labels()  # one read, so that what is counted is what is learned from
        event, count = max((label.event_id for label in labels), default=0), training_labels(labels)
        self._open()
        assert self._fit is not None
        preferences, source = training_preferences(labels)
        arguments: dict[str, Any] = {
            "error_rates": {one.name: one.error_rate for one in self._annotators()},
            "ranking_responses": {name: label.comparison.responses for name, label in source.items()},
            "normalise_on": start_responses(self.folder),
        }
        fitted = self._fit.fit(preferences, **arguments)
        held_out = self._held_out.fit(preferences, **arguments) if self._held_out else None
        predicted = {source[name].comparison_id: p for name, p in fitted.predictions.items()}
        version = Refitted(
            number=self._next_number(),
            labels=count,
            last_event=event,
            figures=_figures(fitted, held_out),
            findings=self._findings(labels, predicted, count, pairs=len(preferences)),
        )
        self.newest = self._write(version)
        self._store_findings(self.newest)
        return self.newest

    def _annotators(self) -> list[AnnotatorFigures]:
        """The annotators' figures as of the newest version, or of an earlier run of this program."""
        found = self.newest.findings.get(ANNOTATORS.key) if self.newest is not None else None
        return (ANNOTATORS.decode(found) if found else ANNOTATORS.read(self.store)) or []

    def _open(self) -> None:
        """Loads both ensembles from the newest version, or adds new reward heads to the policy's trunk."""
        if self._fit is not None:
            return
        settings = RefitSettings(**self.job.settings)
        if self.newest is not None:
            self._fit = RewardFit.load(self.newest.path)
            if (self.newest.path / HELD_OUT).is_dir():
                self._held_out = RewardFit.load(self.newest.path / HELD_OUT)
            changed = {name: self.job.settings[name] for name in RESUME_MAY_CHANGE}
            for fit in (self._fit, self._held_out):
                if fit is not None:
                    fit.settings = replace(fit.settings, **changed)
            return
        model, tokenizer = self._policy()
        self._fit = RewardFit(classifier_of(model, settings.members), tokenizer, settings)
        if self.job.held_out_members:
            other = replace(settings, members=self.job.held_out_members, seed=settings.seed + 1)
            self._held_out = RewardFit(classifier_of(model, other.members), tokenizer, other)

    def _next_number(self) -> int:
        """Above every number in the folder, complete or not, and in the store, which may have been used elsewhere."""
        known = [number for number, _ in _versions(self.folder)]
        return 1 + max(known + [version.number for version in self.store.versions("reward")], default=0)

    def _write(self, version: Refitted) -> Refitted:
        fit, path = self._fit, self.folder / f"version-{version.number}"
        assert fit is not None

        def write(folder: Path) -> None:
            fit.save(folder)
            if self._held_out is not None:
                self._held_out.save(folder / HELD_OUT)
            written = {name: value for name, value in asdict(version).items() if name != "path"}
            write_summary(folder / VERSION, {**written, DIGESTS: _digests(folder)})

        try:
            replace_folder(path, write)
        except OSError as error:
            raise CheckpointError(f"The reward model could not be written to '{path}': {error.strerror}.") from error
        for number, old in _versions(self.folder)[KEPT:]:
            logger.debug("Removing version %d of the reward model.", number)
            shutil.rmtree(old, ignore_errors=True)
        return replace(version, path=path)

    def _findings(
        self, labels: list[Label], predicted: Mapping[int, float], count: int, *, pairs: int
    ) -> dict[str, Any]:
        """Annotator reliability, the comparison of active with random selection, and the forecast, as JSON by key."""
        assert self._fit is not None
        labels_per_pair = count / pairs  # a ranking is one label and several pairs
        history = [(known * labels_per_pair, share, new) for known, share, new in self._fit.state.history]
        agreement, forecast = reliability.alpha(labels), forecast_accuracy(history, count)
        return {
            ANNOTATORS.key: ANNOTATORS.encode(reliability.figures(labels, predicted)),
            AGREEMENT.key: None if agreement is None else AGREEMENT.encode(agreement),
            SELECTION.key: SELECTION.encode(compare_selection(labels, predicted)),
            FORECAST.key: None if forecast is None else FORECAST.encode(forecast),
        }

    def _store_findings(self, version: Refitted) -> None:
        for key, value in version.findings.items():
            self.store.put(key, value)


def newest_version(folder: Path) -> Refitted | None:
    """The newest version in a folder that can be read; None if there is none."""
    return version_until(folder, None)


def version_until(folder: Path, number: int | None) -> Refitted | None:
    """The newest version in a folder that can be read and is not newer than `number`; None if there is none."""
    for found, path in _versions(folder):
        if number is not None and found > number:
            continue
        try:
            return _read_version(path)
        except _DAMAGE as error:
            logger.warning("Skipping the reward model in '%s': it cannot be read (%s).", path, error)
    return None


def set_damaged_aside(folder: Path) -> None:
    """Renames damaged versions that are newer than the newest complete one, so that nobody uses them; warns of each."""
    for number, path in _versions(folder):
        try:
            digests = _read_json(path / VERSION).get(DIGESTS, {})  # missing in versions of earlier releases
            _read_version(path)
            problem = next((name for name, digest in digests.items() if file_digest(path / name) != digest), None)
        except _DAMAGE as error:
            problem = str(error)
        if problem is None:
            return
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        logger.warning("Version %d of the reward model is damaged (%s) and kept in '%s'.", number, problem, aside)


def check_continuation(folder: Path, job: RefitJob) -> None:
    """Raises ConfigError if the reward model in a folder cannot be continued with the settings of `job`."""
    newest = newest_version(folder)
    if newest is None:
        return
    begun = RewardFit.load(newest.path).settings
    for name in ("members", "template"):
        if (was := getattr(begun, name)) != (now := job.settings[name]):
            raise ConfigError(
                f"The reward model in '{folder}' was begun with {name}={was}, not {now}: leave --{name} as it was, or"
                " give another --output_dir and --store."
            )


def start_responses(folder: Path) -> list[tuple[str, str]] | None:
    """Prompts and responses of the start policy, on which every version has mean 0 and standard deviation 1.

    They are the same for all versions, so that rewards of two versions are comparable and the KL penalty keeps its
    relative weight (as in Ziegler et al. 2019; Christiano et al. 2017 normalise on the newest responses).
    """
    path = folder / START_RESPONSES
    if not path.exists():
        return None
    try:
        found = [(prompt, response) for prompt, response in _read_json(path)["responses"]]
        if not found or not all(isinstance(text, str) for pair in found for text in pair):
            raise ValueError("it does not hold texts")
        return found
    except _DAMAGE as error:
        logger.warning("'%s' is damaged (%s): the start policy's responses are sampled again.", path, error)
        return None


def write_start_responses(folder: Path, samples: list[tuple[str, str]]) -> None:
    """Writes the (prompt, response) pairs that `start_responses` reads."""
    write_summary(folder / START_RESPONSES, {"responses": [list(pair) for pair in samples]})


def _figures(fitted: Fitted, held_out: Fitted | None) -> dict[str, float]:
    figures = {
        "train_loss": fitted.train_loss,
        "oob_loss": fitted.oob_loss,
        "ratio": fitted.ratio,
        "weight_decay": fitted.weight_decay,
        "oob_accuracy": sum(fitted.oob_accuracy) / len(fitted.oob_accuracy),
        "accuracy": fitted.accuracy,
        "seconds": fitted.seconds + (held_out.seconds if held_out else 0.0),
    }
    return {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}


def _read_version(path: Path) -> Refitted:
    """Raises one of _DAMAGE if it cannot be read."""
    values = _read_json(path / VERSION)
    values.pop(DIGESTS, None)
    return Refitted(**values, path=path)


def _read_json(path: Path) -> dict[str, Any]:
    refuse_pipes(path)
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    return values


def _digests(folder: Path) -> dict[str, str]:
    """The digests of all files in a folder by their relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): file_digest(path) for path in files}


def _versions(folder: Path) -> list[tuple[int, Path]]:
    """The numbers and folders of all versions, newest first."""
    found = [(int(match[1]), path) for path in folder.glob("version-*") if (match := _NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)
