"""Builds the parts of a session from its settings: the trainer, the job of the refits, and the reward models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deep_rlhf.algorithms.online.build import open_scorer
from deep_rlhf.algorithms.ppo import PPOConfig, PPOTrainer
from deep_rlhf.feedback.loop.checkpoints import SessionProgress
from deep_rlhf.feedback.loop.config import SessionConfig
from deep_rlhf.feedback.monitoring.win_rate import BACK_AT
from deep_rlhf.feedback.questions.candidates import LogOdds
from deep_rlhf.feedback.questions.questions import CurrentModels
from deep_rlhf.feedback.records import Version
from deep_rlhf.feedback.reward_refit.versions import (
    HELD_OUT,
    RefitJob,
    Refitted,
    newest_version,
    start_responses,
    write_start_responses,
)
from deep_rlhf.feedback.state import PolicyWinRate
from deep_rlhf.models.load import load_language_model
from deep_rlhf.models.reward import RewardModel
from deep_rlhf.runtime.run_directory import replace_folder

START_RESPONSES = 128  # on which rewards are normalised


class NoReward:
    """A placeholder for the scorer before the first reward model is fitted."""

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Any:
        """Raises AssertionError: the session trains the policy only once there is a reward model."""
        raise AssertionError("the policy cannot be trained before there is a reward model")


def make_trainer(
    config: SessionConfig,
    model: PreTrainedModel | str,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[str],
) -> PPOTrainer:
    """The PPO trainer of a session, which has PPO's defaults for everything that is not set here.

    Raises what PPOTrainer raises.
    """
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
        learning_rate=config.learning_rates(weight_count(opened))[0],
        lam=1.0,  # so young a critic would add more bias than it removes variance
        init_kl_coef=config.init_kl_coef,
        adap_kl_ctrl=False,
    )
    named = tokenizer if tokenizer is not None else model if isinstance(model, str) else None
    return PPOTrainer(settings, model=opened, tokenizer=named, prompts=prompts, reward=NoReward())


def refit_job(config: SessionConfig, model: PreTrainedModel | str, weights: int) -> RefitJob:
    """The job of the refits. `weights`: the number of weights of the policy."""
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
    """A version of the reward model and its held-out ensemble, on the trainer's device and in its precision."""
    found: list[RewardModel] = []
    for folder in (refitted.path, refitted.path / HELD_OUT):
        if folder.is_dir():
            scorer = open_scorer(RewardModel.load(folder), trainer.runtime.device, trainer.config)
            assert isinstance(scorer, RewardModel)
            found.append(scorer)
    return found[0], found[1] if len(found) > 1 else None


def ensure_start_responses(rewards: Path, trainer: PPOTrainer) -> None:
    """Samples the start policy's responses on which rewards are normalised, unless they are there already."""
    if start_responses(rewards) is None:
        prompts = [trainer.prompts[i % len(trainer.prompts)] for i in range(START_RESPONSES)]
        responses = trainer.generate(prompts, seed=trainer.config.seed, reference=True)
        write_start_responses(rewards, list(zip(prompts, responses, strict=True)))


def save_models(folder: Path, rewards: Path, trainer: PPOTrainer) -> None:
    """Saves the policy to `model` and the newest reward model to `reward_model`, as plain transformers folders."""
    replace_folder(folder / "model", trainer.save)
    newest = newest_version(rewards)
    if newest is not None:
        replace_folder(folder / "reward_model", RewardModel.load(newest.path).save)


def version_of(refitted: Refitted, step: int) -> Version:
    """The store's record of a reward model that is used from update `step` on."""
    return Version(
        kind="reward",
        number=refitted.number,
        step=step,
        labels=refitted.labels,
        last_event=refitted.last_event,
        figures=refitted.figures,
    )


def policy_version(number: int, progress: SessionProgress, won: PolicyWinRate | None) -> Version:
    """The store's record of the policy as it is now. `won`: its win rate."""
    figures = {} if progress.restored is None else {BACK_AT: float(progress.restored)}
    if won is not None and won.rate is not None:
        figures["win_rate"] = won.rate
    return Version(
        kind="policy",
        number=number,
        step=progress.step,
        labels=progress.reward_labels,
        last_event=progress.reward_last_event,
        figures=figures,
    )


def current_models(trainer: PPOTrainer, scorer: RewardModel | None, progress: SessionProgress) -> CurrentModels:
    """The models that questions are about now."""
    return CurrentModels(
        generate=lambda prompts, seed: trainer.generate(prompts, seed=seed),
        generate_start=lambda prompts, seed: trainer.generate(prompts, seed=seed, reference=True),
        scorer=LogOdds(scorer) if scorer else None,
        policy_version=progress.policy_version,
        reward_version=progress.reward_version,
    )


def start_policy(trainer: PPOTrainer) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The start policy and its tokenizer."""
    with trainer._reference.model() as frozen:
        return frozen.plain_model(), trainer.tokenizer


def weight_count(model: PreTrainedModel) -> int:
    """The number of weights of a model."""
    return sum(parameter.numel() for parameter in model.parameters())
