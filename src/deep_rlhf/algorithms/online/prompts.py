"""The prompts of a run: which ones fit, how many updates they make, and which ones each update samples from."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deep_rlhf.algorithms.online.config import OnlineConfig
from deep_rlhf.errors import ConfigError, DataError
from deep_rlhf.types import RowReport


def longest_prompt(model: PreTrainedModel, config: OnlineConfig) -> int:
    """The largest number of tokens in a prompt: `max_prompt_length`, or what the response leaves of the positions.

    Raises ConfigError if the response leaves none.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return config.max_prompt_length
    if config.max_new_tokens >= positions:
        raise ConfigError(
            f"max_new_tokens={config.max_new_tokens} leaves no room for a prompt in the {positions} positions of the"
            " model: lower it."
        )
    return min(config.max_prompt_length, positions - config.max_new_tokens)


def usable_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, longest: int
) -> tuple[list[str], RowReport]:
    """Keeps the prompts with 1 to `longest` tokens, and counts the others. Raises DataError if none is left."""
    lengths = [len(row) for row in tokenizer(list(prompts)).input_ids] if len(prompts) else []
    kept = [prompt for prompt, length in zip(prompts, lengths, strict=True) if 0 < length <= longest]
    dropped = {"too long": sum(length > longest for length in lengths), "empty": lengths.count(0)}
    if not kept:
        raise DataError(
            f"None of the {len(prompts)} prompts can be used ({dropped['too long']} have more than {longest} tokens, "
            f"{dropped['empty']} are empty): raise max_prompt_length or give other prompts."
        )
    return kept, RowReport(read=len(prompts), kept=len(kept), dropped={k: v for k, v in dropped.items() if v})


def count_updates(prompts: int, config: OnlineConfig) -> int:
    """The number of updates of a run: `steps` responses in batches, or one pass over the prompts."""
    if config.steps is None:
        return max(1, prompts * config.samples_per_prompt // config.batch_size)
    return -(-config.steps // config.batch_size)


class PromptWalk:
    """Walks through the prompts, each pass in another random order: position n has the same prompt in every process.

    A pass draws its order once, so a prompt costs the same however many there are.
    """

    def __init__(self, prompts: Sequence[str], *, seed: int) -> None:
        self.prompts = prompts
        self._seed = seed
        self._pass, self._order = -1, list[int]()  # the newest pass and its order

    def between(self, start: int, end: int) -> list[str]:
        """The prompts at the positions start ≤ n < end; never runs out."""
        found = []
        for position in range(start, end):
            number, offset = divmod(position, len(self.prompts))
            if number != self._pass:
                generator = torch.Generator().manual_seed(self._seed * 7_919 + number)
                self._pass = number
                self._order = torch.randperm(len(self.prompts), generator=generator).tolist()
            found.append(self.prompts[self._order[offset]])
        return found


class PromptBatches:
    """Draws the prompts of each update: every pass over the data is a new permutation, and batches span passes.

    A batch depends on the seed and the number of the update only, so a resumed run draws the same ones.
    """

    def __init__(self, prompts: Sequence[str], *, seed: int, batch_size: int, samples_per_prompt: int) -> None:
        """`batch_size` counts responses, of which every drawn prompt gets `samples_per_prompt`."""
        self._walk = PromptWalk(prompts, seed=seed)
        self._size = batch_size // samples_per_prompt
        self._samples_per_prompt = samples_per_prompt

    def of_update(self, update: int) -> list[str]:
        """The prompts of one update, [batch_size]; the repetitions of a prompt are neighbours."""
        drawn = self._walk.between(update * self._size, (update + 1) * self._size)
        return [prompt for prompt in drawn for _ in range(self._samples_per_prompt)]
