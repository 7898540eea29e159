"""The flags that `deep-rlhf loop` and `deep-rlhf teach` share, and what they name: store, policy, prompts, labeler."""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deep_rlhf.data.chat import get_template
from deep_rlhf.data.prompts import load_prompts
from deep_rlhf.data.synthetic import generate_prompts, judge
from deep_rlhf.errors import UserError
from deep_rlhf.feedback.annotators.base import Labeler, People
from deep_rlhf.feedback.annotators.replay import Replay, read_votes
from deep_rlhf.feedback.annotators.simulated import SimulatedLabeler, Utility
from deep_rlhf.feedback.loop.config import SessionConfig

STORE_VARIABLE = "DEEP_RLHF_STORE"  # a password in an address is neither for the command line nor for a file
GUARDED = "DEEP_RLHF_GUARDED"  # set by `teach`: the end of standard input is the end of the loop
MOST_HELD_OUT = 64
ROOM = 50  # words


def _shortness(prompt: str, answer: str) -> float:
    return 1 - min(len(answer.split()), ROOM) / ROOM


def _politeness(prompt: str, answer: str) -> float:
    return judge.assess(prompt, answer).courtesy


TASTES: dict[str, Utility] = {"judge": judge.score, "short": _shortness, "polite": _politeness}


@dataclass(frozen=True)
class LoopConfig(SessionConfig):
    """What is taught, by whom, and where it is kept. Raises UserError for a value that cannot work."""

    model: str | None = field(
        default=None, metadata={"help": "the policy: a folder or Hub name; default: the embedded world's, made once"}
    )
    prompts: str | None = field(
        default=None, metadata={"help": "a Hub name, file or folder of prompts; default: the embedded world's"}
    )
    prompts_split: str = field(default="train", metadata={"help": "split of --prompts"})
    prompts_column: str | None = field(default=None, metadata={"help": "column of --prompts; default: the first known"})
    store: str | None = field(
        default=None,
        metadata={
            "help": f"a file or a PostgreSQL address; default: ${STORE_VARIABLE}, or labels.db in the output folder"
        },
    )
    output_dir: str = field(default="outputs/teach", metadata={"help": "folder of the policy, reward model and state"})
    labeler: str = field(
        default="web", metadata={"help": "who answers: web (people on the page), simulated, or replay:FILE"}
    )
    annotators: int = field(default=3, metadata={"help": "simulated annotators"})
    taste: str = field(default="judge", metadata={"help": "of simulated annotators: judge, short or polite"})
    pace: float = field(default=3.0, metadata={"help": "seconds an answer that simulated and replayed annotators take"})
    threads: int | None = field(
        default=None, metadata={"help": "of the policy's process and of the refits'; default: half of the cores each"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.taste not in TASTES:
            raise UserError(f"taste must be one of {', '.join(TASTES)}, not {self.taste}.")
        known = self.labeler in ("web", "simulated") or self.labeler.removeprefix("replay:") not in ("", self.labeler)
        if not known:
            raise UserError(f"labeler is web, simulated or replay:FILE, not {self.labeler}.")
        if self.labeler == "simulated" and self.prompts is not None:
            raise UserError("Simulated annotators know the embedded world's questions only: leave out --prompts.")
        if self.annotators < 1 or (self.threads is not None and self.threads < 1):
            raise UserError("annotators and threads must be at least 1.")
        if not 0 <= self.pace < 3600:
            raise UserError(f"pace is in seconds, 0 or more, not {self.pace}.")

    @property
    def store_address(self) -> str:
        """Where the store is."""
        return self.store or os.environ.get(STORE_VARIABLE) or str(Path(self.output_dir) / "labels.db")

    @property
    def threads_each(self) -> int:
        """Of each of the two processes that compute."""
        return self.threads or max(1, (os.cpu_count() or 1) // 2)


def open_prompts(config: LoopConfig, labeler: Labeler) -> tuple[list[str], list[str]]:
    """Prompts to learn on and held-out ones to measure with. Raises UserError as `load_prompts`."""
    template = get_template(config.template)
    if config.prompts is None and not isinstance(labeler, Replay):
        train, held_out = (generate_prompts(config.seed, split) for split in ("train", "test"))
        return [template.prompt(text) for text in train], [template.prompt(text) for text in held_out]
    if config.prompts is None:
        assert isinstance(labeler, Replay)
        prompts = labeler.prompts
    else:
        prompts, _ = load_prompts(
            config.prompts, split=config.prompts_split, column=config.prompts_column, template=config.template
        )
    return _split(prompts, config.seed)


def open_labeler(config: LoopConfig) -> Labeler:
    """Who answers. Raises UserError for a file that cannot be replayed."""
    if config.labeler == "web":
        return People()
    if config.labeler == "simulated":
        return SimulatedLabeler(TASTES[config.taste], count=config.annotators, seed=config.seed)
    return Replay(read_votes(config.labeler.removeprefix("replay:"), template=config.template), seed=config.seed)


def mean_taste(config: LoopConfig, prompts: Sequence[str], answers: Sequence[str]) -> float:
    """What simulated annotators think of answers, without their noise."""
    taste = TASTES[config.taste]
    return sum(taste(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)) / len(answers)


def _split(prompts: list[str], seed: int) -> tuple[list[str], list[str]]:
    """A tenth of the prompts, at most 64, is held out; of fewer than ten none is."""
    held_out = set(random.Random(seed).sample(prompts, min(MOST_HELD_OUT, len(prompts) // 10)))
    return [prompt for prompt in prompts if prompt not in held_out], [p for p in prompts if p in held_out]
