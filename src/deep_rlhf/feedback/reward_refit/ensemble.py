"""The reward-model ensemble between refits (Christiano et al. 2017, §2.2.3): it goes on from what it was.

A refit starts from the last weights, reads what is new and as many older pairs again, and leaves every pair in the bags
it was in. The strength of L2 is adapted from refit to refit so that out-of-bag loss stays 1.1 to 1.5 times the training
loss. L2 is decoupled from the gradient (Loshchilov & Hutter 2019), so that its strength is not scaled away by Adam, and
draws the trunk to the weights it began with, the heads to zero: drawn to zero, a trunk would forget its language
(Li et al. 2018, "L2-SP").

Where it departs from the paper: the members share a trunk, which learns from a pair for all of them if one has it in
its bag. So out of bag are the pairs in nobody's bag, a sixth of all, not 1/e for each member, and `Fitted.accuracy` is
of what was predicted before it was learned from. `Fitted.predictions` are of the members without the pair in their bag,
for early ones would be of a worse model; through the trunk they lean a little to the answer that was given.
"""

import copy
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)

from deep_rlhf.algorithms.supervised.reward import pair_features
from deep_rlhf.algorithms.supervised.reward_config import RewardConfig
from deep_rlhf.algorithms.supervised.reward_trainer import Features, RewardTrainer, accuracy
from deep_rlhf.errors import UserError
from deep_rlhf.feedback.reward_refit.bootstrap import (
    accuracies,
    adapted,
    bag_id,
    bag_losses,
    is_outside,
    rankings_of,
    texts_of,
)
from deep_rlhf.models.load import disable_dropout
from deep_rlhf.models.reward import RewardModel, has_reward_head, init_reward_head, render, reward_head
from deep_rlhf.ops.queries import preferred_probability
from deep_rlhf.types import Preference

CARD = "fit.json"
BASE = "base.safetensors"
NORMALISATION_ANSWERS = 512
VISITS = 4  # pairs that are gone over in a refit for each new one
MOST_PASSES = 3
RECENT_PREDICTIONS = 200  # whose accuracy is told


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitSettings:
    """What stays the same from refit to refit. Raises UserError for a value out of range."""

    members: int = 4  # Coste et al. 2023: 4 to 5 suffice
    template: str = "hh"
    max_length: int = 512
    seed: int = 0  # of the heads, the bags and the order
    learning_rate: float = 5e-4  # of the demo's small model; 1e-5 for a pretrained one
    batch_size: int = 16
    pairs: tuple[int, int] = (64, 512)  # least and most to go over in a refit, new and old
    most_labels: int = 3000  # the newest (Christiano et al. 2017, A.2)
    label_noise: float = 0.1  # the floor: nobody errs less
    weight_decay: float = 100.0  # of the first refit; a step draws by learning rate × this
    ratio: tuple[float, float] = (1.1, 1.5)  # of out-of-bag to training loss

    def __post_init__(self) -> None:
        if self.members < 1:
            raise UserError(f"The reward model must have at least 1 member, not {self.members}.")
        if not 1 <= self.ratio[0] < self.ratio[1]:
            raise UserError(f"The ratio of the losses must be kept between two numbers from 1 on, not {self.ratio}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What a refit gives. `model` shares its weights with the fit: the next refit changes them."""

    model: RewardModel  # each member with mean 0 and standard deviation 1 on recent answers
    labels: int  # pairs that it has learned from, the newest `most_labels`
    left_out: int  # too long, or without weight
    train_loss: float  # mean per pair of a member's bag, mean of the members
    oob_loss: float  # the same of the pairs in nobody's bag; NaN while there are none
    ratio: float
    weight_decay: float  # of this refit
    oob_accuracy: list[float]  # of each member
    accuracy: float | None  # of the newest predictions before learning, None before there are any
    predictions: dict[str, float]  # id of a preference -> P(a is better), by the members that did not learn from it
    seconds: float


@dataclass(slots=True)
class _Progress:
    """What a fit remembers beside its weights; `fit.json`."""

    weight_decay: float
    refits: int = 0
    # id of a preference -> what was predicted before it was learned from, None if its texts were known before
    predicted: dict[str, float | None] = field(default_factory=dict)
    outside: dict[str, float] = field(default_factory=dict)  # newest prediction by members out of whose bag it is
    # of each refit but the first: labels learned from before, accuracy on the new ones, and how many these were
    history: list[tuple[int, float, int]] = field(default_factory=list)


class RewardFit:
    """An ensemble that is fitted again and again, in one process or, through `save` and `load`, in several."""

    def __init__(
        self,
        classifier: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: RefitSettings,
        *,
        base: Mapping[str, Tensor] | None = None,
        progress: _Progress | None = None,
    ) -> None:
        """`classifier`: with one label per member, changed in place; fresh heads are drawn if it has none.

        Raises UserError if its labels are not as many as the members.
        """
        if classifier.config.num_labels != settings.members:
            heads = classifier.config.num_labels
            raise UserError(f"The model has {heads} heads, not one for each of {settings.members} members.")
        self.settings = settings
        self.model = RewardModel(  # with its own copy of the tokenizer
            disable_dropout(classifier), tokenizer, template=settings.template, max_length=settings.max_length
        )
        classifier.config.use_cache = False  # keys and values of a text that is never continued
        if not has_reward_head(classifier.config):
            with torch.random.fork_rng():
                torch.manual_seed(settings.seed)
                init_reward_head(classifier)
        self.base = dict(base) if base else _base(classifier)
        self.progress = progress or _Progress(weight_decay=settings.weight_decay)

    # ---- between processes

    def save(self, folder: str | Path) -> None:
        """The plain folder of a RewardModel, with the weights that L2 draws to and `fit.json` beside it."""
        self.model.save(folder)
        save_file({name: tensor.contiguous() for name, tensor in self.base.items()}, Path(folder) / BASE)
        card = {"settings": asdict(self.settings), "progress": asdict(self.progress)}
        (Path(folder) / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "RewardFit":
        """As it was saved. Raises UserError if it cannot be read."""
        try:
            model = RewardModel.load(folder)
            card = json.loads((Path(folder) / CARD).read_text(encoding="utf-8"))
            settings = RefitSettings(**card["settings"] | {"ratio": tuple(card["settings"]["ratio"])})
            history = [(int(labels), float(share), int(pairs)) for labels, share, pairs in card["progress"]["history"]]
            progress = _Progress(**card["progress"] | {"history": history})
            base = load_file(Path(folder) / BASE)
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise UserError(f"'{folder}' is no reward model that can be fitted again: {error}.") from error
        fit = cls(model.model, model.tokenizer, settings, base=base, progress=progress)
        fit.model.mean, fit.model.std, fit.model.metrics = model.mean, model.std, model.metrics
        return fit

    # ---- the refit

    def fit(
        self,
        preferences: Sequence[Preference],
        *,
        noise: Mapping[str, float] | None = None,
        together: Mapping[str, Sequence[str]] | None = None,
        recent: Sequence[tuple[str, str]] | None = None,
    ) -> Fitted:
        """Learns from all preferences so far, in the order in which they were given.

        noise: error rate by annotator, where it is known; the floor otherwise. together: by a preference's id all
        answers of the ranking that it is from. recent: prompts and answers of the current policy, to normalise on;
        those of the newest pairs otherwise. Raises UserError if no pair is left. The caller's random numbers are not
        touched.
        """
        started = time.perf_counter()
        with TemporaryDirectory() as folder, _kept_randomness():
            config = self._config(folder)
            pairs, features, left_out = self._features(preferences, noise or {}, together or {}, config)
            new = [row for row, pair in enumerate(pairs) if pair.id not in self.progress.predicted]
            self._predict(pairs, features, new, config)
            rankings = rankings_of(pairs, together or {})
            if (size := max(map(len, rankings))) > 1:  # whole rankings in one batch: apart they over-fit in one pass
                config.train_sampling_strategy = "sequential"
                config.per_device_train_batch_size = max(1, self.settings.batch_size // size) * size
            rows = self._training_rows(features, new, rankings)
            trainer = self._trainer([features[row] for row in rows], config)
            weight_decay = self.progress.weight_decay
            trainer.add_callback(_Pull(self.model.model, self.base, weight_decay))
            trainer.train()
            rows = self._measured_rows(len(pairs))
            measured, rewards = [features[row] for row in rows], trainer.rewards([features[row] for row in rows])
        weights = torch.tensor([pairs[row].weight for row in rows])
        train_loss, oob_loss = bag_losses(rewards, measured, weights, self.settings.label_noise)
        ratio = oob_loss / train_loss
        self.progress.weight_decay = adapted(weight_decay, ratio, self.settings.ratio)
        self.progress.refits += 1
        self._remember({pair.id for pair in pairs}, [pairs[row].id for row in rows], measured, rewards)
        self._normalise(rewards, recent)
        self.model.model.eval()
        return Fitted(
            model=self.model,
            labels=len(pairs),
            left_out=left_out,
            train_loss=train_loss,
            oob_loss=oob_loss,
            ratio=ratio,
            weight_decay=weight_decay,
            oob_accuracy=accuracies(rewards, measured),
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
            seed=settings.seed + self.progress.refits,
            precision="fp32",  # so that L2 draws the weights themselves
            report_to="none",
            save_strategy="no",
            eval_strategy="no",
            logging_strategy="no",
        )

    def _trainer(self, features: list[Features], config: RewardConfig) -> RewardTrainer:
        trainer = RewardTrainer(
            self.model.model, config, pad_token_id=self.model.tokenizer.pad_token_id, train_dataset=features
        )
        for shown in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(shown)
        return trainer

    def _features(
        self,
        preferences: Sequence[Preference],
        noise: Mapping[str, float],
        together: Mapping[str, Sequence[str]],
        config: RewardConfig,
    ) -> tuple[list[Preference], list[Features], int]:
        """The newest pairs that are short enough, as they are learned from."""
        kept, features, left_out = [], [], 0
        for pair in preferences[-self.settings.most_labels :]:
            rate = max(self.settings.label_noise, noise.get(pair.annotator, 0.0))
            texts = together.get(pair.id, (pair.a, pair.b))
            named = replace(pair, id=bag_id(pair.prompt, texts, self.settings.seed), label_noise=rate)
            found, _ = pair_features([named], self.model.tokenizer, config, self.model.max_length)
            if found and is_outside(named.id):
                found[0]["weight"] = torch.zeros(self.settings.members)
            if found and pair.weight > 0:
                kept.append(pair)
                features += found
            else:
                left_out += 1
        if not features:
            raise UserError(
                f"No pair is left to learn from: {left_out} have more than {config.max_length} tokens or no weight."
            )
        return kept, features, left_out

    def _predict(self, pairs: list[Preference], features: list[Features], new: list[int], config: RewardConfig) -> None:
        """What the ensemble as it is says of pairs that it has not learned from, be it from another person's answer."""
        known = len(self.progress.predicted)
        seen = {texts_of(pair) for pair in pairs if pair.id in self.progress.predicted}
        unknown = [row for row in new if texts_of(pairs[row]) not in seen] if self.progress.refits else []
        self.progress.predicted |= dict.fromkeys(pairs[row].id for row in new)
        if not unknown:
            return
        rewards = self._trainer(features, config).rewards([features[row] for row in unknown])
        p = preferred_probability(rewards).mean(dim=1)
        self.progress.predicted |= {pairs[row].id: value for row, value in zip(unknown, p.tolist(), strict=True)}
        mu = torch.tensor([pairs[row].mu for row in unknown])
        decided = int((mu != 0.5).sum())
        if decided:
            self.progress.history.append((known, accuracy(p - 0.5, mu), decided))

    def _training_rows(self, features: list[Features], new: list[int], rankings: list[list[int]]) -> list[int]:
        """Which pairs are gone over, in which order: all new ones, and so many others that each is met a few times.

        All of a ranking come together (Ouyang et al. 2022, §3.5).
        """
        lot = random.Random(f"{self.settings.seed}/{self.progress.refits}")
        inside = [rows for rows in rankings if any(features[row]["weight"].any() for row in rows)]
        if not inside:
            raise UserError("No pair is left to learn from but those that are kept to validate: it takes more labels.")
        chosen = [rows for rows in inside if not set(rows).isdisjoint(new)]
        count, size = sum(map(len, chosen)), max(map(len, inside))
        least, most = self.settings.pairs
        visits = min(max(VISITS * count, least), max(most, count), MOST_PASSES * sum(map(len, inside)))
        others = [rows for rows in inside if set(rows).isdisjoint(new)] or inside
        while count < visits:
            more = lot.sample(others, min(len(others), -(-(visits - count) // size)))
            chosen, count, others = chosen + more, count + sum(map(len, more)), inside
        lot.shuffle(chosen)
        return [row for rows in chosen for row in rows]

    def _measured_rows(self, count: int) -> list[int]:
        """Pairs to compute losses and predictions of: all, or the newer half of `most` and others by lot."""
        most = self.settings.pairs[1]
        if count <= most:
            return list(range(count))
        older = range(count - most // 2)
        lot = random.Random(f"{self.settings.seed}/{self.progress.refits}/measured")
        return [*sorted(lot.sample(older, most - most // 2)), *range(count - most // 2, count)]

    def _normalise(self, rewards: Tensor, recent: Sequence[tuple[str, str]] | None) -> None:
        if recent:
            texts = [render(self.settings.template, prompt, answer) for prompt, answer in recent]
            answers = self.model.raw_scores(texts)
        else:
            answers = rewards[-NORMALISATION_ANSWERS // 2 :].flatten(0, 1)  # [≤ 512, K]
        self.model.mean = answers.mean(dim=0)
        self.model.std = answers.std(dim=0, correction=0).clamp(min=1e-6)

    def _accuracy(self, pairs: list[Preference]) -> float | None:
        """Of the newest predictions that were made before anything was learned from them."""
        made = [(pair, p) for pair in pairs if (p := self.progress.predicted[pair.id]) is not None and pair.mu != 0.5]
        newest = made[-RECENT_PREDICTIONS:]
        if not newest:
            return None
        return accuracy(torch.tensor([p - 0.5 for _, p in newest]), torch.tensor([pair.mu for pair, _ in newest]))

    def _remember(self, kept: set[str], ids: list[str], features: list[Features], rewards: Tensor) -> None:
        """For each pair that was measured, the mean prediction of the members outside whose bag it is, if any are.

        What is said of pairs that are not `kept` any more is forgotten.
        """
        unseen = torch.stack([pair["weight"] for pair in features]) == 0
        p = (preferred_probability(rewards) * unseen).sum(dim=1) / unseen.sum(dim=1)
        self.progress.outside |= {name: value for name, value in zip(ids, p.tolist(), strict=True) if value == value}
        self.progress.outside = {name: value for name, value in self.progress.outside.items() if name in kept}
        self.progress.predicted = {name: value for name, value in self.progress.predicted.items() if name in kept}

    def _predictions(self, pairs: list[Preference]) -> dict[str, float]:
        """By the members outside whose bag a pair is; of one in all bags, what was predicted before."""
        found = {pair.id: self.progress.outside.get(pair.id, self.progress.predicted[pair.id]) for pair in pairs}
        return {name: p for name, p in found.items() if p is not None}


class _Pull(TrainerCallback):
    """Decoupled L2: after every update the weights go a share learning rate × strength of their way to `base`."""

    def __init__(self, model: nn.Module, base: Mapping[str, Tensor], strength: float) -> None:
        self.weights = [(parameter, base[name]) for name, parameter in model.named_parameters() if name in base]
        self.strength = strength

    @torch.no_grad()
    def on_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        share = min(1.0, optimizer.param_groups[0]["lr"] * self.strength)
        for parameter, base in self.weights:
            parameter.lerp_(base.to(parameter.device), share)


def classifier_of(policy: PreTrainedModel, members: int) -> PreTrainedModel:
    """A sequence classifier with a copy of a language model's trunk and fresh heads, one per member."""
    config = copy.deepcopy(policy.config)
    config.id2label = {member: f"member {member}" for member in range(members)}
    config.label2id = {name: member for member, name in config.id2label.items()}
    classifier = AutoModelForSequenceClassification.from_config(config)
    trunk = getattr(classifier, classifier.base_model_prefix)
    trunk.load_state_dict(getattr(policy, policy.base_model_prefix).state_dict())
    return classifier


def _base(model: PreTrainedModel) -> dict[str, Tensor]:
    """What L2 draws to: the trunk as it is, and heads of zero."""
    head = {id(parameter) for parameter in reward_head(model).parameters()}
    return {
        name: torch.zeros_like(parameter) if id(parameter) in head else parameter.detach().clone()
        for name, parameter in model.named_parameters()
    }


@contextmanager
def _kept_randomness() -> Iterator[None]:
    """Whatever is drawn meanwhile, the caller's random numbers go on as if nothing had been: Trainer seeds them all."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
