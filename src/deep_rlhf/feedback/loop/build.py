"""What a session is made of, from its settings: the trainer of the policy, the refits, the schedule of labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deep_rlhf.algorithms.online.build import open_scorer
from deep_rlhf.algorithms.ppo import PPOConfig, PPOTrainer
from deep_rlhf.feedback.loop.config import SessionConfig
from deep_rlhf.feedback.questions.schedule import LabelSchedule
from deep_rlhf.feedback.records import Version
from deep_rlhf.feedback.reward_refit.versions import (
    HELD_OUT,
    RefitJob,
    Refitted,
    newest_version,
    start_responses,
    write_start_responses,
)
from deep_rlhf.feedback.store import Store
from deep_rlhf.models.load import load_language_model
from deep_rlhf.models.reward import RewardModel
from deep_rlhf.runtime.run_directory import replace_folder

START_RESPONSES = 128  # by which the scale of the reward is set


class Schedule(Protocol):
    """How many labels are wanted by when; `LabelSchedule` is one."""

    def due(self, step: float, steps: float) -> int:
        """When `step` of `steps` updates are done."""
        ...


class NoReward:
    """Stands where the first reward model will."""

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Any:
        """Nobody asks it: the policy does not learn before there is a reward model."""
        raise AssertionError("the policy cannot learn before there is a reward model")


def make_trainer(
    config: SessionConfig,
    model: PreTrainedModel | str,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[str],
) -> PPOTrainer:
    """PPO as a session runs it; what is not set here is its default. Raises UserError as PPOTrainer."""
    opened = load_language_model(model) if isinstance(model, str) else model
    settings = PPOConfig(
        exp_name="session",
        seed=config.seed,
        max_prompt_length=config.max_prompt_length,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        steps=config.updates * config.batch_size,
        batch_size=config.batch_size,
        mini_batch_size=config.mini_batch_size,
        ppo_epochs=config.ppo_epochs,
        learning_rate=config.learning_rates(weights_of(opened))[0],
        lam=1.0,  # a critic as young as this is worth less than the plain sum of rewards
        init_kl_coef=config.init_kl_coef,
        adap_kl_ctrl=False,
    )
    words = tokenizer if tokenizer is not None else model if isinstance(model, str) else None
    return PPOTrainer(settings, model=opened, tokenizer=words, prompts=prompts, reward=NoReward())


def refit_job(config: SessionConfig, model: PreTrainedModel | str, weights: int) -> RefitJob:
    """What the refits are told."""
    return RefitJob(
        policy=model if isinstance(model, str) else "",
        initial_labels=config.initial_labels,
        refit_after=config.refit_after,
        refit_growth=config.refit_growth,
        settings={
            "members": config.members,
            "template": config.template,
            "max_length": config.max_prompt_length + config.max_new_tokens,
            "seed": config.seed,
            "learning_rate": config.learning_rates(weights)[1],
            "batch_size": config.reward_batch_size,
            "label_noise": config.label_noise,
        },
        held_out_members=config.held_out_members,
    )


def open_rewards(refitted: Refitted, trainer: PPOTrainer) -> tuple[RewardModel, RewardModel | None]:
    """A version of the reward model and the ensemble that watches, where and how the trainer computes."""
    found: list[RewardModel] = []
    for folder in (refitted.path, refitted.path / HELD_OUT):
        if folder.is_dir():
            scorer = open_scorer(RewardModel.load(folder), trainer.runtime.device, trainer.config)
            assert isinstance(scorer, RewardModel)
            found.append(scorer)
    return found[0], found[1] if len(found) > 1 else None


def ensure_start_responses(rewards: Path, trainer: PPOTrainer) -> None:
    """Makes the answers of the start policy that the reward is scaled on, if they are not there yet."""
    if start_responses(rewards) is None:
        prompts = [trainer.prompts[i % len(trainer.prompts)] for i in range(START_RESPONSES)]
        texts = trainer.generate(prompts, seed=trainer.config.seed, reference=True)
        write_start_responses(rewards, list(zip(prompts, texts, strict=True)))


def save_models(folder: Path, rewards: Path, trainer: PPOTrainer) -> None:
    """The policy as it is and the newest reward model of `rewards`, in folders that transformers opens."""
    replace_folder(folder / "model", trainer.save)
    newest = newest_version(rewards)
    if newest is not None:
        replace_folder(folder / "reward_model", RewardModel.load(newest.path).save)


def version_of(refitted: Refitted, step: int) -> Version:
    """What the store keeps of a reward model that is used from `step` on."""
    return Version(
        kind="reward",
        number=refitted.number,
        step=step,
        labels=refitted.labels,
        last_event=refitted.last_event,
        figures=refitted.figures,
    )


def known_reward(store: Store, number: int) -> Refitted | None:
    """What the store says of a reward model that may not be on the disk any more."""
    for version in store.versions("reward"):
        if version.number == number:
            return Refitted(number=number, labels=version.labels, last_event=version.last_event)
    return None


def label_schedule(config: SessionConfig) -> LabelSchedule | None:
    """When how many labels are wanted; None for as many as people give."""
    if config.labels is None:
        return None
    return LabelSchedule(initial=config.initial_labels, total=config.labels, decay=config.label_decay)


def weights_of(model: PreTrainedModel) -> int:
    """How many numbers it has learned."""
    return sum(parameter.numel() for parameter in model.parameters())
