"""The engine compared with a plain sampler: one prompt at a time, a whole forward pass per token, no cache."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from deep_rlhf.models.policy import Policy
from deep_rlhf.rollout import engine as engine_module
from deep_rlhf.rollout.collect import complete, prompt_batch
from deep_rlhf.rollout.engine import Engine
from deep_rlhf.rollout.generate import eos_token_ids, generate_text
from deep_rlhf.rollout.sampler import Sampled, draw_tokens, sampling_uniforms
from deep_rlhf.types import PromptBatch

KINDS = ["gpt2", "llama", "gemma2", "t5", "bart", "lora"]
PROMPTS = [
    "the cat sees",
    "red",
    "a very old dog finds the small house",
    "two fish",
    "moon or sun",
]
STOPS = [1, 4, 9, 17, 23, 31]  # several, so that responses end at different times
TEMPERATURE = 0.7
LIMIT = 12


@pytest.fixture(params=KINDS)
def policy(request: pytest.FixtureRequest, make_model: Callable[..., Any]) -> Policy:
    return Policy(make_model(request.param))


def batch(tokenizer: Any, policy: Policy, texts: list[str]) -> PromptBatch:
    return prompt_batch(texts, tokenizer, torch.device("cpu"), left=not policy.is_seq2seq)


def engine(policy: Policy, temperature: float = TEMPERATURE, stops: list[int] = STOPS) -> Engine:
    return Engine(policy, eos_ids=stops, temperature=temperature)


@torch.no_grad()
def plain_logits(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """Logits [R + 1, V] before each response token and after the last, by the model's own forward on one row."""
    if model.config.is_encoder_decoder:
        decoder_ids = torch.tensor([[model.config.decoder_start_token_id, *response]])
        return model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder_ids).logits[0]
    return model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 :]


def plain_sample(model: Any, prompt: list[int], uniforms: Tensor) -> tuple[list[int], list[float], list[float]]:
    response: list[int] = []
    logprobs, entropies = [], []
    for uniform in uniforms.tolist():
        log_distribution = (plain_logits(model, prompt, response)[-1].double() / TEMPERATURE).log_softmax(0)
        probabilities = log_distribution.exp().tolist()
        token, total = 0, probabilities[0]
        while total <= uniform:
            token += 1
            total += probabilities[token]
        response.append(token)
        logprobs.append(float(log_distribution[token]))
        entropies.append(-sum(p * float(log_p) for p, log_p in zip(probabilities, log_distribution, strict=True)))
        if token in STOPS:
            break
    return response, logprobs, entropies


def rows_of(sampled: Sampled) -> list[tuple[list[int], list[float], bool]]:
    """Ids, log-probabilities and end of each row."""
    return [
        (sampled.response_ids[i][mask].tolist(), sampled.logprobs[i][mask].tolist(), bool(sampled.finished[i]))
        for i, mask in enumerate(sampled.response_mask)
    ]


def reordered(sampled: Sampled, order: Tensor) -> Sampled:
    fields = {field.name: getattr(sampled, field.name) for field in dataclasses.fields(Sampled)}
    return Sampled(**{name: None if values is None else values[order] for name, values in fields.items()})


def assert_same(one: Sampled, other: Sampled) -> None:
    for (ids, logprobs, finished), (other_ids, other_logprobs, other_finished) in zip(
        rows_of(one), rows_of(other), strict=True
    ):
        assert ids == other_ids
        assert finished == other_finished
        assert logprobs == pytest.approx(other_logprobs, abs=2e-5)


def test_the_engine_samples_as_the_plain_sampler(policy: Policy, tokenizer: Any) -> None:
    uniforms = sampling_uniforms(3, 0, len(PROMPTS), LIMIT)
    sampled = engine(policy).sample(batch(tokenizer, policy, PROMPTS), uniforms)
    lengths = set()
    for i, text in enumerate(PROMPTS):
        ids, logprobs, entropies = plain_sample(policy.model, tokenizer(text).input_ids, uniforms[i])
        mask = sampled.response_mask[i]
        assert sampled.response_ids[i][mask].tolist() == ids
        assert mask.tolist() == [True] * len(ids) + [False] * (mask.shape[0] - len(ids))  # EOS inside, then nothing
        assert bool(sampled.finished[i]) == (ids[-1] in STOPS)
        torch.testing.assert_close(sampled.logprobs[i][mask], torch.tensor(logprobs), atol=2e-5, rtol=0)
        torch.testing.assert_close(sampled.entropy[i][mask], torch.tensor(entropies), atol=2e-5, rtol=0)
        for field in (sampled.logprobs, sampled.entropy, sampled.response_ids):
            assert not field[i][~mask].any()
        lengths.add(len(ids))
    assert sampled.response_ids.shape[1] == max(lengths)
    assert len(lengths) > 1  # otherwise nothing left the batch


def test_a_sample_depends_on_its_own_prompt_and_uniforms_alone(
    policy: Policy, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, uniforms = batch(tokenizer, policy, PROMPTS), sampling_uniforms(4, 0, len(PROMPTS), LIMIT)
    whole = engine(policy).sample(prompts, uniforms)

    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = engine(policy).sample(
        PromptBatch(texts=PROMPTS, input_ids=prompts.input_ids[order], mask=prompts.mask[order]), uniforms[order]
    )
    assert_same(whole, reordered(shuffled, order.argsort()))

    for i, text in enumerate(PROMPTS):
        alone = engine(policy).sample(batch(tokenizer, policy, [text]), uniforms[i : i + 1])
        assert rows_of(alone)[0][0] == rows_of(whole)[i][0]

    padding = torch.zeros(len(PROMPTS), 3, dtype=torch.int64)
    sides = (padding, prompts.input_ids) if not policy.is_seq2seq else (prompts.input_ids, padding)
    masks = (padding.bool(), prompts.mask) if not policy.is_seq2seq else (prompts.mask, padding.bool())
    padded = PromptBatch(texts=PROMPTS, input_ids=torch.cat(sides, 1) + 0, mask=torch.cat(masks, 1))
    padded.input_ids[~padded.mask] = 7  # whatever stands under the mask is never read
    assert_same(whole, engine(policy).sample(padded, uniforms))

    for budget in (1, 20_000):
        monkeypatch.setattr(engine_module, "CPU_BYTES", budget)
        assert_same(whole, engine(policy).sample(prompts, uniforms))


def test_sampling_at_a_low_temperature_is_greedy_generation(policy: Policy, tokenizer: Any) -> None:
    prompts = batch(tokenizer, policy, PROMPTS)
    cold = engine(policy, temperature=1e-5).sample(prompts, torch.full((len(PROMPTS), LIMIT), 0.5))
    generated = policy.model.generate(
        input_ids=prompts.input_ids,
        attention_mask=prompts.mask.long(),
        max_new_tokens=LIMIT,
        do_sample=False,
        eos_token_id=STOPS,
        pad_token_id=0,
    )
    generated = generated[:, 1:] if policy.is_seq2seq else generated[:, prompts.input_ids.shape[1] :]
    assert torch.where(cold.response_mask, cold.response_ids, 0).tolist() == generated.tolist()


def test_draw_follows_the_distribution_at_its_temperature() -> None:
    logits = torch.tensor([1.0, -1.0, float("-inf"), 0.5, -3.0, 2.0])
    count = 20_000
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(0))
    tokens = draw_tokens(logits.expand(count, -1), uniforms, 1.7).token_ids
    observed = tokens.bincount(minlength=6).double()
    expected = (logits.double() / 1.7).softmax(0) * count
    assert observed[2] == 0
    possible = expected > 0
    chi_square = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 18.5  # the 99.9 % point for 4 degrees of freedom


@pytest.mark.parametrize("seed", range(3))
def test_draw_never_takes_an_impossible_token(seed: int) -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(seed))
    logits[:, ::3] = float("-inf")  # the first token among them
    logits[:, -7:] = float("-inf")  # and the last, where rounding of the total would land
    for uniform in (0.0, 2.0**-24, 0.5, 1.0 - 2.0**-24):
        tokens = draw_tokens(logits, torch.full((50,), uniform), 1.0).token_ids
        assert torch.isfinite(logits.gather(1, tokens.unsqueeze(1))).all()


def test_uniforms_depend_on_seed_and_batch_alone() -> None:
    assert torch.equal(sampling_uniforms(1, 2, 4, 8), sampling_uniforms(1, 2, 4, 8))
    assert not torch.equal(sampling_uniforms(1, 2, 4, 8), sampling_uniforms(1, 3, 4, 8))
    assert not torch.equal(sampling_uniforms(1, 2, 4, 8), sampling_uniforms(2, 2, 4, 8))


def test_text_continues_the_prompt_and_has_no_special_tokens(make_model: Callable[..., Any], tokenizer: Any) -> None:
    policy = Policy(make_model("gpt2", spread=0.02))
    uniforms = sampling_uniforms(0, 0, len(PROMPTS), LIMIT)
    prompts = batch(tokenizer, policy, PROMPTS)
    completions = complete(prompts, engine(policy, stops=[1]).sample(prompts, uniforms), tokenizer)
    assert completions.finished.any()
    for i, (prompt, response) in enumerate(zip(PROMPTS, completions.responses, strict=True)):
        ids = completions.response_ids[i][completions.response_mask[i]].tolist()
        words = [tokenizer.convert_ids_to_tokens(token) for token in ids if token > 2]
        assert prompt + response == " ".join([*prompt.split(), *words])


def test_generation_stops_after_the_eos_of_the_model_and_of_the_tokenizer(
    make_model: Callable[..., Any], tokenizer: Any
) -> None:
    model = make_model("gpt2", spread=0.0)
    model.generation_config.eos_token_id = [5, 6]
    assert set(eos_token_ids(model, tokenizer)) == {1, 5, 6}
    model.generation_config.eos_token_id = None
    assert eos_token_ids(model, tokenizer) == [1]
    texts = generate_text(Policy(model), tokenizer, ["red"] * 64, max_new_tokens=40, seed=1)
    assert min(len(text.split()) for text in texts) < 20  # uniform over 43 tokens: some end early
    assert texts == generate_text(Policy(model), tokenizer, ["red"] * 64, max_new_tokens=40, seed=1)
