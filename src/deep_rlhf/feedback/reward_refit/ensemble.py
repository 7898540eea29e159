"""The reward-model ensemble and its refits (Christiano et al. 2017, §2.2.3). A refit continues from the last weights.

A refit trains on the new pairs and on about as many older ones again; every pair stays in its bags. The weight decay
adapts from refit to refit so that the held-out loss stays between 1.1 and 1.5 times the training loss.

Departures from the paper: the members share a trunk, which learns from every pair that is in some member's bag. So the
out-of-bag pairs are the held-out pairs, a sixth of all, and not 1/e of them for each member. `Fitted.accuracy` is that
of predictions made before the pairs were learned from. `Fitted.predictions` are made by the current members that do not
have the pair in their bag; through the shared trunk they are slightly biased towards the label that was given.
"""

import copy
import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
)

from deep_rlhf.algorithms.supervised.reward import pair_features
from deep_rlhf.algorithms.supervised.reward_config import RewardConfig
from deep_rlhf.algorithms.supervised.reward_trainer import Features, RewardTrainer, accuracy
from deep_rlhf.errors import ConfigError, DataError, ModelError
from deep_rlhf.feedback.reward_refit.bootstrap import (
    bag_id,
    bag_losses,
    held_out_accuracies,
    is_held_out,
    rankings_of,
    texts_of,
)
from deep_rlhf.feedback.reward_refit.regularisation import L2SPCallback, adapted_weight_decay, anchor_weights
from deep_rlhf.models.load import disable_dropout, has_reward_head
from deep_rlhf.models.reward import RewardModel, init_reward_head, render
from deep_rlhf.ops.queries import preferred_probability
from deep_rlhf.settings import check_settings, setting
from deep_rlhf.types import Preference

CARD = "fit.json"
ANCHOR = "anchor.safetensors"
NORMALISATION_RESPONSES = 512
VISITS = 4  # pairs to train on in a refit for each new pair
MOST_PASSES = 3
RECENT_PREDICTIONS = 200  # `Fitted.accuracy` is that of these many predictions


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitSettings:
    """What stays the same from refit to refit. Raises ConfigError for a value out of bounds."""

    members: int = setting(4, "size of the ensemble", least=1)  # Coste et al. 2023: 4 to 5 suffice
    template: str = "hh"
    max_length: int = setting(512, "longest prompt with response, in tokens", least=1)
    seed: int = 0  # of the heads, the bags and the order of pairs
    learning_rate: float = setting(5e-4, "suits the demo's small model; 1e-5 for a pretrained one", above=0)
    batch_size: int = setting(16, "pairs per optimiser step", least=1)
    pairs: tuple[int, int] = (64, 512)  # fewest and most pairs to train on in a refit, new and old
    most_labels: int = setting(3000, "newest pairs that are kept (Christiano et al. 2017, A.2)", least=1)
    label_noise: float = setting(0.1, "lower bound of every annotator's share of random labels", least=0, below=1)
    weight_decay: float = setting(100.0, "of the first refit; decoupled, as in regularisation.py", least=0)
    ratio: tuple[float, float] = (1.1, 1.5)  # bounds of held-out loss / training loss

    def __post_init__(self) -> None:
        check_settings(self)
        if not 1 <= self.ratio[0] < self.ratio[1]:
            raise ConfigError(f"ratio must be two increasing numbers of at least 1, not {self.ratio}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """The result of a refit. `model` shares its weights with the RewardFit: the next refit changes them."""

    model: RewardModel  # each member has mean 0 and standard deviation 1 on the responses it was normalised on
    labels: int  # pairs it has learned from
    left_out: int  # pairs that were too long or had no weight
    train_loss: float  # mean per pair of a member's bag, mean of the members
    oob_loss: float  # the same of the held-out pairs; NaN while there are none
    ratio: float  # oob_loss / train_loss
    weight_decay: float  # in this refit
    oob_accuracy: list[float]  # of each member on the held-out pairs
    accuracy: float | None  # of the newest predictions made before learning; None before there are any
    predictions: dict[str, float]  # preference id -> P(a is better), by the members that did not learn from the pair
    seconds: float


@dataclass(slots=True)
class FitState:
    """What a RewardFit remembers beside its weights; stored in `fit.json`."""

    weight_decay: float
    refits: int = 0
    # preference id -> prediction before it was learned from; None if there was none or the same texts were known
    predicted: dict[str, float | None] = field(default_factory=dict)
    out_of_bag: dict[str, float] = field(default_factory=dict)  # newest prediction by members without it in their bag
    # one entry per refit but the first: labels learned from before, accuracy on the new ones, number of new ones
    history: list[tuple[int, float, int]] = field(default_factory=list)


class RewardFit:
    """An ensemble that is fitted repeatedly, in one process or, through `save` and `load`, in several."""

    def __init__(
        self,
        classifier: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: RefitSettings,
        *,
        anchor: Mapping[str, Tensor] | None = None,
        state: FitState | None = None,
    ) -> None:
        """`classifier` has one output per member and is changed in place; reward heads are added if it has none.

        `anchor`: the weights that L2-SP draws to; by default the current trunk and zeros for the heads. Raises
        ConfigError if the classifier's outputs are not as many as the members.
        """
        if classifier.config.num_labels != settings.members:
            heads = classifier.config.num_labels
            raise ConfigError(f"The model has {heads} heads, not one for each of {settings.members} members.")
        self.settings = settings
        self.model = RewardModel(  # with its own copy of the tokenizer
            disable_dropout(classifier), tokenizer, template=settings.template, max_length=settings.max_length
        )
        classifier.config.use_cache = False  # scoring needs no key/value cache
        if not has_reward_head(classifier.config):
            with torch.random.fork_rng():
                torch.manual_seed(settings.seed)
                init_reward_head(classifier)
        self.anchor = dict(anchor) if anchor else anchor_weights(classifier)
        self.state = state or FitState(weight_decay=settings.weight_decay)

    # ---- saving and loading

    def save(self, folder: str | Path) -> None:
        """Writes the folder of a RewardModel, with the anchor weights and `fit.json` in it."""
        self.model.save(folder)
        save_file({name: tensor.contiguous() for name, tensor in self.anchor.items()}, Path(folder) / ANCHOR)
        card = {"settings": asdict(self.settings), "state": asdict(self.state)}
        (Path(folder) / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "RewardFit":
        """Reads what `save` wrote. Raises ModelError if it cannot be read."""
        try:
            model = RewardModel.load(folder)
            card = json.loads((Path(folder) / CARD).read_text(encoding="utf-8"))
            settings = RefitSettings(
                **card["settings"] | {name: tuple(card["settings"][name]) for name in ("ratio", "pairs")}
            )
            history = [(int(labels), float(share), int(pairs)) for labels, share, pairs in card["state"]["history"]]
            state = FitState(**card["state"] | {"history": history})
            anchor = load_file(Path(folder) / ANCHOR)
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise ModelError(f"The reward model in '{folder}' cannot be fitted again: {error}.") from error
        fit = cls(model.model, model.tokenizer, settings, anchor=anchor, state=state)
        fit.model.mean, fit.model.std, fit.model.metrics = model.mean, model.std, model.metrics
        return fit

    # ---- a refit

    def fit(
        self,
        preferences: Sequence[Preference],
        *,
        error_rates: Mapping[str, float] | None = None,
        ranking_responses: Mapping[str, Sequence[str]] | None = None,
        normalise_on: Sequence[tuple[str, str]] | None = None,
    ) -> Fitted:
        """Fits the ensemble to all preferences so far, which must be in the order in which they were labelled.

        error_rates: share of random labels by annotator; `label_noise` for those who are missing. ranking_responses:
        by preference id, all responses of the ranking that the pair belongs to. normalise_on: (prompt, response) pairs
        on which each member gets mean 0 and standard deviation 1; by default the responses of the newest pairs.

        Random generators are left as they were. Raises DataError if no pair is left to learn from.
        """
        started = time.perf_counter()
        error_rates, ranking_responses = error_rates or {}, ranking_responses or {}
        with TemporaryDirectory() as folder, preserve_rng_state():
            config = self._config(folder)
            pairs, features, left_out = self._features(preferences, error_rates, ranking_responses, config)
            new = [row for row, pair in enumerate(pairs) if pair.id not in self.state.predicted]
            self._predict(pairs, features, new, config)
            rankings = rankings_of(pairs, ranking_responses)
            if (size := max(map(len, rankings))) > 1:  # a ranking in one batch; split up, one pass already over-fits
                config.train_sampling_strategy = "sequential"
                config.per_device_train_batch_size = max(1, self.settings.batch_size // size) * size
            rows = self._training_rows(features, new, rankings)
            trainer = self._trainer([features[row] for row in rows], config)
            weight_decay = self.state.weight_decay
            trainer.add_callback(L2SPCallback(self.model.model, self.anchor, weight_decay))
            trainer.train()
            rows = self._measured_rows(len(pairs))
            measured, rewards = [features[row] for row in rows], trainer.rewards([features[row] for row in rows])
        weights = torch.tensor([pairs[row].weight for row in rows])
        train_loss, oob_loss = bag_losses(rewards, measured, weights, self.settings.label_noise)
        ratio = oob_loss / train_loss
        self.state.weight_decay = adapted_weight_decay(weight_decay, ratio, self.settings.ratio)
        self.state.refits += 1
        self._remember({pair.id for pair in pairs}, [pairs[row].id for row in rows], measured, rewards)
        self._normalise(rewards, normalise_on)
        self.model.model.eval()
        return Fitted(
            model=self.model,
            labels=len(pairs),
            left_out=left_out,
            train_loss=train_loss,
            oob_loss=oob_loss,
            ratio=ratio,
            weight_decay=weight_decay,
            oob_accuracy=held_out_accuracies(rewards, measured),
            accuracy=self._accuracy(pairs),
            predictions=self._predictions(pairs),
            seconds=time.perf_counter() - started,
        )

    def _config(self, folder: str) -> RewardConfig:
        settings = self.settings
        return RewardConfig(
            output_dir=folder,
            ensemble_size=settings.members,
            label_noise=settings.label_noise,
            template=settings.template,
            max_length=settings.max_length,
            per_device_train_batch_size=settings.batch_size,
            num_train_epochs=1,
            learning_rate=settings.learning_rate,
            weight_decay=0.0,
            lr_scheduler_type="linear",
            seed=settings.seed + self.state.refits,
            precision="fp32",  # L2SPCallback changes the weights themselves
            report_to="none",
            save_strategy="no",
            eval_strategy="no",
            logging_strategy="no",
        )

    def _trainer(self, features: list[Features], config: RewardConfig) -> RewardTrainer:
        trainer = RewardTrainer(
            self.model.model, config, pad_token_id=self.model.tokenizer.pad_token_id, train_dataset=features
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        return trainer

    def _features(
        self,
        preferences: Sequence[Preference],
        error_rates: Mapping[str, float],
        ranking_responses: Mapping[str, Sequence[str]],
        config: RewardConfig,
    ) -> tuple[list[Preference], list[Features], int]:
        """The newest pairs that are short enough, their training features, and how many were left out."""
        kept, features, left_out = [], [], 0
        for pair in preferences[-self.settings.most_labels :]:
            rate = max(self.settings.label_noise, error_rates.get(pair.annotator, 0.0))
            texts = ranking_responses.get(pair.id, (pair.a, pair.b))
            keyed = replace(pair, id=bag_id(pair.prompt, texts, self.settings.seed), label_noise=rate)
            found, _ = pair_features([keyed], self.model.tokenizer, config, self.model.max_length)
            if found and is_held_out(keyed.id):
                found[0]["weight"] = torch.zeros(self.settings.members)
            if found and pair.weight > 0:
                kept.append(pair)
                features += found
            else:
                left_out += 1
        if not preferences:
            raise DataError("None of the labels says which response is better: collect more labels.")
        if not features:
            raise DataError(
                f"No pair is left to learn from: {left_out} have more than {config.max_length} tokens or no weight."
            )
        return kept, features, left_out

    def _predict(self, pairs: list[Preference], features: list[Features], new: list[int], config: RewardConfig) -> None:
        """Stores the ensemble's predictions of new pairs whose texts it has not learned from in any label."""
        known = len(self.state.predicted)
        known_texts = {texts_of(pair) for pair in pairs if pair.id in self.state.predicted}
        unknown = [row for row in new if texts_of(pairs[row]) not in known_texts] if self.state.refits else []
        self.state.predicted |= dict.fromkeys(pairs[row].id for row in new)
        if not unknown:
            return
        rewards = self._trainer(features, config).rewards([features[row] for row in unknown])
        p = preferred_probability(rewards).mean(dim=1)
        self.state.predicted |= {pairs[row].id: value for row, value in zip(unknown, p.tolist(), strict=True)}
        mu = torch.tensor([pairs[row].mu for row in unknown])
        decided = int((mu != 0.5).sum())
        if decided:
            self.state.history.append((known, accuracy(p - 0.5, mu), decided))

    def _training_rows(self, features: list[Features], new: list[int], rankings: list[list[int]]) -> list[int]:
        """The rows to train on, in order: all new pairs, and a random sample of the others, of which some may repeat.

        The pairs of a ranking stay adjacent (Ouyang et al. 2022, §3.5).
        """
        rng = random.Random(f"{self.settings.seed}/{self.state.refits}")
        trainable = [rows for rows in rankings if any(features[row]["weight"].any() for row in rows)]
        if not trainable:
            raise DataError("All labelled pairs are in the validation split; collect more labels.")
        chosen = [rows for rows in trainable if not set(rows).isdisjoint(new)]
        count, size = sum(map(len, chosen)), max(map(len, trainable))
        least, most = self.settings.pairs
        visits = min(max(VISITS * count, least), max(most, count), MOST_PASSES * sum(map(len, trainable)))
        others = [rows for rows in trainable if set(rows).isdisjoint(new)] or trainable
        while count < visits:
            more = rng.sample(others, min(len(others), -(-(visits - count) // size)))
            chosen, count, others = chosen + more, count + sum(map(len, more)), trainable
        rng.shuffle(chosen)
        return [row for rows in chosen for row in rows]

    def _measured_rows(self, count: int) -> list[int]:
        """The rows whose losses and predictions are computed: all, or the newest and a random sample of the rest."""
        most = self.settings.pairs[1]
        if count <= most:
            return list(range(count))
        older = range(count - most // 2)
        rng = random.Random(f"{self.settings.seed}/{self.state.refits}/measured")
        return [*sorted(rng.sample(older, most - most // 2)), *range(count - most // 2, count)]

    def _normalise(self, rewards: Tensor, normalise_on: Sequence[tuple[str, str]] | None) -> None:
        if normalise_on:
            scores = self.model.raw_scores([render(self.settings.template, *sample) for sample in normalise_on])
        else:
            scores = rewards[-NORMALISATION_RESPONSES // 2 :].flatten(0, 1)  # [≤ 512, K]
        self.model.mean = scores.mean(dim=0)
        self.model.std = scores.std(dim=0, correction=0).clamp(min=1e-6)

    def _accuracy(self, pairs: list[Preference]) -> float | None:
        """The accuracy of the newest predictions that were made before the pairs were learned from."""
        made = [(pair, p) for pair in pairs if (p := self.state.predicted[pair.id]) is not None and pair.mu != 0.5]
        newest = made[-RECENT_PREDICTIONS:]
        if not newest:
            return None
        return accuracy(torch.tensor([p - 0.5 for _, p in newest]), torch.tensor([pair.mu for pair, _ in newest]))

    def _remember(self, kept: set[str], ids: list[str], features: list[Features], rewards: Tensor) -> None:
        """Stores the mean prediction of the members without the pair in their bag, for each measured pair.

        Predictions of pairs that are not `kept` are dropped.
        """
        out_of_bag = torch.stack([pair["weight"] for pair in features]) == 0
        p = (preferred_probability(rewards) * out_of_bag).sum(dim=1) / out_of_bag.sum(dim=1)
        newest = {name: value for name, value in zip(ids, p.tolist(), strict=True) if not math.isnan(value)}
        known = self.state.out_of_bag | newest
        self.state.out_of_bag = {name: value for name, value in known.items() if name in kept}
        self.state.predicted = {name: value for name, value in self.state.predicted.items() if name in kept}

    def _predictions(self, pairs: list[Preference]) -> dict[str, float]:
        """By the members without the pair in their bag; for a pair in all bags, the prediction before learning."""
        found = {pair.id: self.state.out_of_bag.get(pair.id, self.state.predicted[pair.id]) for pair in pairs}
        return {name: p for name, p in found.items() if p is not None}


def classifier_of(policy: PreTrainedModel, members: int) -> PreTrainedModel:
    """A sequence classifier with a copy of a language model's trunk and one new reward head per member."""
    config = copy.deepcopy(policy.config)
    config.id2label = {member: f"member {member}" for member in range(members)}
    config.label2id = {name: member for member, name in config.id2label.items()}
    config.problem_type = "regression"  # as that of a model that is opened again
    classifier = AutoModelForSequenceClassification.from_config(config)
    trunk = getattr(classifier, classifier.base_model_prefix)
    trunk.load_state_dict(getattr(policy, policy.base_model_prefix).state_dict())
    return classifier


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restores the random generators of Python, NumPy and PyTorch at the end: Trainer seeds them all."""
    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)
