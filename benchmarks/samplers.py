"""Compares samplers: this project's engine, transformers' `generate`, and its continuous batching.

`python benchmarks/samplers.py` (about four minutes on two cores) writes results/samplers.json. Each sampler draws
responses to the same 64 prompts of mixed length in three rounds, once with responses of full length, once with early
EOS. The engine uses this project's CPU kernels (accel/cpu), the others PyTorch's. Tokens per second count real tokens.
The gap is the largest and the mean difference in nats between the log-probabilities of the sampler and those computed
in training.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig, GPT2Config, GPT2LMHeadModel

from deep_rlhf.models.policy import Policy
from deep_rlhf.rollout.engine import Engine
from deep_rlhf.types import PromptBatch

RESULTS = Path(__file__).parent / "results" / "samplers.json"
PROMPTS, LONGEST, LIMIT, ROUNDS = 64, 128, 64, 3
VOCABULARY = 50_257
EARLY = list(range(0, VOCABULARY, 40))  # an untrained model draws one of these every 40 tokens, on average

Responses = list[tuple[list[int], list[float]]]  # ids and log-probabilities of each


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=6, n_embd=384, n_head=6)).eval()
    lengths = torch.randint(LONGEST // 8, LONGEST + 1, (PROMPTS,)).tolist()
    prompts = [torch.randint(0, VOCABULARY, (length,)).tolist() for length in lengths]
    rows = []
    for name, ends in (("full length", []), ("early ends", EARLY)):
        ways = {
            "engine": engine(model, ends),
            "generate": generate(model, ends),
            "continuous batching": continuous_batching(model, ends),
        }
        measured: dict[str, list[tuple[int, float]]] = {way: [] for way in ways}
        gaps: dict[str, dict[str, float]] = {}
        for round_ in range(ROUNDS):
            for way, sample in ways.items():
                start = time.perf_counter()
                responses = sample(prompts, round_)
                seconds = time.perf_counter() - start
                measured[way].append((sum(len(ids) for ids, _ in responses), seconds))
                gaps[way] = gap(model, prompts, responses)
        rows += [
            {
                "ends": name,
                "way": way,
                "tokens": [tokens for tokens, _ in measured[way]],
                "seconds": [round(seconds, 2) for _, seconds in measured[way]],
                "tokens_per_second": round(statistics.median(tokens / seconds for tokens, seconds in measured[way])),
                **gaps[way],
            }
            for way in ways
        ]
    result = {
        "model": "GPT-2, 6 layers x 384, vocabulary 50257, float32, random weights",
        "prompts": PROMPTS,
        "prompt_tokens": [min(lengths), max(lengths)],
        "response_tokens": LIMIT,
        "cores": os.cpu_count(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "rows": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(RESULTS.read_text())


def engine(model: GPT2LMHeadModel, ends: list[int]) -> Callable[[list[list[int]], int], Responses]:
    sampler = Engine(Policy(copy.deepcopy(model)), eos_ids=ends)

    def sample(prompts: list[list[int]], seed: int) -> Responses:
        uniforms = torch.rand(len(prompts), LIMIT, generator=torch.Generator().manual_seed(seed))
        sampled = sampler.sample(padded(prompts), uniforms)
        rows = zip(sampled.response_ids, sampled.logprobs, sampled.response_mask, strict=True)
        return [(ids[mask].tolist(), logprobs[mask].tolist()) for ids, logprobs, mask in rows]

    return sample


def generate(model: GPT2LMHeadModel, ends: list[int]) -> Callable[[list[list[int]], int], Responses]:
    """The log-probabilities come from its scores, which are the logits of every token."""

    def sample(prompts: list[list[int]], seed: int) -> Responses:
        torch.manual_seed(seed)
        batch = padded(prompts)
        output = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.mask.long(),
            generation_config=settings(ends),
            output_scores=True,
            return_dict_in_generate=True,
        )
        logprobs = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
        responses = output.sequences[:, batch.input_ids.shape[1] :].tolist()
        counts = [length_of(ids, ends) for ids in responses]
        return [
            (ids[:count], row[:count]) for ids, row, count in zip(responses, logprobs.tolist(), counts, strict=True)
        ]

    return sample


def continuous_batching(model: GPT2LMHeadModel, ends: list[int]) -> Callable[[list[list[int]], int], Responses]:
    """The manager persists between rounds, as it would in a trainer; the first round creates it."""
    model = copy.deepcopy(model)  # generate_batch replaces its attention
    config = ContinuousBatchingConfig(return_logprobs=True, seed=0)

    def sample(prompts: list[list[int]], seed: int) -> Responses:
        outputs = model.generate_batch(
            prompts, settings(ends), continuous_batching_config=config, persistent_manager=True
        )
        return [(output.generated_tokens, output.logprobs) for output in outputs.values()]

    return sample


def settings(ends: list[int]) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=LIMIT, do_sample=True, top_k=0, top_p=1.0, eos_token_id=ends or None, pad_token_id=0
    )


def padded(prompts: list[list[int]]) -> PromptBatch:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in prompts])
    return PromptBatch(texts=[""] * len(prompts), input_ids=ids, mask=mask)


def length_of(ids: list[int], ends: list[int]) -> int:
    return next((count for count, token in enumerate(ids, start=1) if token in set(ends)), len(ids))


@torch.no_grad()
def gap(model: GPT2LMHeadModel, prompts: list[list[int]], responses: Responses) -> dict[str, Any]:
    """The differences between the sampler's log-probabilities and those of one forward pass over the whole text."""
    differences = []
    for prompt, (ids, logprobs) in zip(prompts, responses, strict=True):
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        trained = logits.log_softmax(-1).gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1)
        differences.append((trained - torch.tensor(logprobs)).abs())
    every = torch.cat(differences)
    return {"largest_gap": float(every.max()), "mean_gap": float(every.mean())}


if __name__ == "__main__":
    main()
