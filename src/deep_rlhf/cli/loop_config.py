"""The flags that `deep-rlhf loop` and `deep-rlhf teach` share, and the prompts and labelers that they name."""

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deep_rlhf.data.chat import get_template
from deep_rlhf.data.prompts import load_prompts
from deep_rlhf.data.synthetic import generate_prompts, judge
from deep_rlhf.errors import ConfigError, ResourceError
from deep_rlhf.feedback.annotators.base import Labeler, People
from deep_rlhf.feedback.annotators.replay import Replay, read_votes
from deep_rlhf.feedback.annotators.simulated import SimulatedLabeler, Utility
from deep_rlhf.feedback.loop.config import SessionConfig
from deep_rlhf.settings import setting

STORE_VARIABLE = "DEEP_RLHF_STORE"  # an address may contain a password, which belongs in no command line or file
GUARDED = "DEEP_RLHF_GUARDED"  # set by `teach`: the loop ends when its standard input closes
MOST_HELD_OUT = 64
SHORT_WORDS = 50  # the taste "short" gives 0 from this length on

Taste = Literal["judge", "short", "polite"]


def _shortness(prompt: str, response: str) -> float:
    return 1 - min(len(response.split()), SHORT_WORDS) / SHORT_WORDS


def _politeness(prompt: str, response: str) -> float:
    return judge.assess(prompt, response).courtesy


TASTES: dict[Taste, Utility] = {"judge": judge.score, "short": _shortness, "polite": _politeness}


@dataclass(frozen=True)
class LoopConfig(SessionConfig):
    """The settings of a session, its models and data, and who labels.

    Raises ConfigError for a value out of bounds and for settings that contradict each other.
    """

    model: str | None = setting(
        None, "start policy: a folder or Hub name; default: the small policy of the synthetic task, trained once"
    )
    prompts: str | None = setting(None, "Hub name, file or folder of prompts; default: those of the synthetic task")
    prompts_split: str = setting("train", "split of --prompts")
    prompts_column: str | None = setting(None, "column of --prompts; default: the first known name")
    store: str | None = setting(
        None,
        f"store of labels: a file or PostgreSQL address; default: ${STORE_VARIABLE}, or labels.db in the output folder",
    )
    output_dir: str = setting("outputs/teach", "folder of the run: policy, reward model and checkpoints")
    labeler: str = setting("web", "who labels: web (people on the page), simulated, or replay:FILE")
    annotators: int = setting(3, "number of simulated annotators", least=1, most=10_000)
    taste: Taste = setting("judge", "what simulated annotators prefer")

    def __post_init__(self) -> None:
        super().__post_init__()
        is_replay = self.labeler.startswith("replay:") and self.labeler != "replay:"
        if self.labeler not in ("web", "simulated") and not is_replay:
            raise ConfigError(f"labeler must be web, simulated or replay:FILE, not {self.labeler}.")
        if self.labeler == "simulated" and self.prompts is not None:
            raise ConfigError("Simulated annotators know the prompts of the synthetic task only: leave out --prompts.")

    @property
    def store_address(self) -> str:
        """The file or database address of the store."""
        return self.store or os.environ.get(STORE_VARIABLE) or str(Path(self.output_dir) / "labels.db")


@contextmanager
def run_folder_errors() -> Iterator[None]:
    """Within this context a file of the run folder that cannot be read or written raises ResourceError with its name.

    Such a file may be a folder of that name, a link to nowhere, or one without permission.
    """
    try:
        yield
    except OSError as error:
        name = error.filename2 or error.filename
        if name is None:
            raise
        raise ResourceError(
            f"'{name}' cannot be read or written ({error.strerror}): remove it, or give another --output_dir."
        ) from error


def open_prompts(config: LoopConfig, labeler: Labeler) -> tuple[list[str], list[str]]:
    """The training prompts and the held-out prompts. Raises DataError as `load_prompts` does."""
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
    """Opens the labeler that `config` names. Raises DataError for a file that cannot be replayed."""
    if config.labeler == "web":
        return People()
    if config.labeler == "simulated":
        return SimulatedLabeler(TASTES[config.taste], count=config.annotators, seed=config.seed)
    return Replay(read_votes(config.labeler.removeprefix("replay:"), template=config.template), seed=config.seed)


def mean_taste(config: LoopConfig, prompts: Sequence[str], responses: Sequence[str]) -> float:
    """The mean utility of responses to simulated annotators, without label noise."""
    taste = TASTES[config.taste]
    return sum(taste(prompt, response) for prompt, response in zip(prompts, responses, strict=True)) / len(responses)


def _split(prompts: list[str], seed: int) -> tuple[list[str], list[str]]:
    """Holds out a tenth of the prompts, at most 64; none of fewer than ten."""
    held_out = set(random.Random(seed).sample(prompts, min(MOST_HELD_OUT, len(prompts) // 10)))
    return [prompt for prompt in prompts if prompt not in held_out], [p for p in prompts if p in held_out]
