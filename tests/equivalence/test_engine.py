"""Each optimisation of the engine compared with the same computation without it; test_sampling.py tests the whole."""

import logging
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D

from deep_rlhf.accel.cpu.kernels import FastLinear
from deep_rlhf.accel.cpu.packed import packed_weights
from deep_rlhf.errors import ResourceError
from deep_rlhf.models.policy import Policy
from deep_rlhf.rollout import engine as engine_module
from deep_rlhf.rollout.cache import BufferedLayer
from deep_rlhf.rollout.collect import prompt_batch
from deep_rlhf.rollout.decoding import bytes_per_token
from deep_rlhf.rollout.engine import Engine
from deep_rlhf.rollout.sampler import Sampled, sampling_uniforms
from deep_rlhf.runtime.precision import multiplies_bf16
from deep_rlhf.types import PromptBatch

KINDS = ["gpt2", "llama", "gemma2", "t5", "bart", "lora"]
PROMPTS = ["the cat sees", "red", "a very old dog finds the small house", "two fish", "moon or sun"]
STOPS = [1, 4, 9, 17, 23, 31]  # several, so that responses end at different times
LIMIT = 12


@pytest.fixture(params=KINDS)
def policy(request: pytest.FixtureRequest, make_model: Callable[..., Any]) -> Policy:
    return Policy(make_model(request.param))


def batch(tokenizer: Any, policy: Policy, texts: list[str] = PROMPTS) -> PromptBatch:
    return prompt_batch(texts, tokenizer, torch.device("cpu"), left=not policy.is_seq2seq)


def assert_same(one: Sampled, other: Sampled) -> None:
    assert torch.equal(one.response_mask, other.response_mask)
    assert torch.equal(one.response_ids, other.response_ids)
    assert torch.equal(one.finished, other.finished)
    for name in ("logprobs", "entropy"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-5, rtol=0)


def test_packed_weights_compute_the_same(policy: Policy, tokenizer: Any) -> None:
    prompts = batch(tokenizer, policy)
    response_ids = torch.randint(3, 43, (len(PROMPTS), 4), generator=torch.Generator().manual_seed(0))
    response_mask = torch.ones_like(response_ids, dtype=torch.bool)

    def logits() -> Tensor:
        return policy.head(policy.states(prompts.input_ids, prompts.mask, response_ids, response_mask))

    with torch.no_grad():
        plain = logits()
        with packed_weights(policy):
            changed = [module for module in policy.modules() if "forward" in vars(module)]
            packed = logits()
    assert changed == [module for module in policy.modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    torch.testing.assert_close(plain, packed, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not multiplies_bf16(torch.device("cpu")), reason="no bfloat16 instructions")
def test_packed_bf16_weights_compute_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = FastLinear(64, 96).bfloat16()
    inputs = torch.randn(5, 64, generator=generator).bfloat16()
    with torch.no_grad():
        plain = layer(inputs)
        with packed_weights(layer):
            assert "forward" in vars(layer)
            torch.testing.assert_close(layer(inputs), plain)  # to bfloat16's precision


def test_packing_uses_the_current_weights_and_is_always_undone(make_model: Callable[..., Any]) -> None:
    model = Policy(make_model("gpt2")).model
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        with packed_weights(model):
            before = model(ids).logits
            model.transformer.h[0].mlp.c_fc.weight.mul_(1.5)
            assert torch.equal(model(ids).logits, before)  # computed from the copies
        with packed_weights(model):
            after = model(ids).logits
        torch.testing.assert_close(after, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, after, atol=1e-3)
    with pytest.raises(KeyError), packed_weights(model):
        raise KeyError
    assert not any("forward" in vars(module) for module in model.modules())


def test_buffers_hold_what_transformers_would_concatenate() -> None:
    generator = torch.Generator().manual_seed(0)
    buffered, plain = BufferedLayer(9), DynamicLayer()
    rows = 4
    for new, keep in ((5, [0, 1, 1, 3, 2, 0]), (1, [5, 2, 0]), (1, None), (1, [1]), (1, None)):
        keys, values = torch.randn(2, rows, 2, new, 8, generator=generator)
        for mine, theirs in zip(buffered.update(keys, values), plain.update(keys, values), strict=True):
            assert torch.equal(mine, theirs)
        assert buffered.get_seq_length() == plain.get_seq_length()
        if keep is not None:
            for layer in (buffered, plain):
                layer.batch_select_indices(torch.tensor(keep))
            assert torch.equal(buffered.keys, plain.keys)
            assert torch.equal(buffered.values, plain.values)
            rows = len(keep)


def test_appending_a_token_does_not_move_the_others() -> None:
    layer = BufferedLayer(64)
    places = {tuple(tensor.data_ptr() for tensor in layer.update(*torch.zeros(2, 3, 2, 1, 8))) for _ in range(64)}
    assert len(places) == 1


def test_states_are_those_of_the_policy(policy: Policy, tokenizer: Any) -> None:
    prompts, uniforms = batch(tokenizer, policy), sampling_uniforms(3, 0, len(PROMPTS), LIMIT)
    assert Engine(policy, eos_ids=STOPS).sample(prompts, uniforms).states is None
    sampled = Engine(policy, eos_ids=STOPS, keep_states=True).sample(prompts, uniforms)
    assert sampled.states is not None
    with torch.no_grad():
        context = (prompts.input_ids, prompts.mask, sampled.response_ids, sampled.response_mask)
        plain = policy.states(*context)
    mask = sampled.response_mask
    assert not mask.all()
    torch.testing.assert_close(sampled.states[mask], plain[mask], atol=1e-5, rtol=1e-5)
    assert not sampled.states[~mask].any()


def test_equal_prompts_are_computed_once(policy: Policy, tokenizer: Any) -> None:
    texts = ["red", "two fish", "red", "moon or sun", "two fish", "red"]
    prompts, uniforms = batch(tokenizer, policy, texts), sampling_uniforms(5, 0, len(texts), LIMIT)
    prompts.input_ids[2][~prompts.mask[2]] = 7  # what stands under the mask makes no difference
    read: list[int] = []
    hook = policy.trunk.register_forward_pre_hook(
        lambda _, inputs, named: read.append(len(named["input_ids"])), with_kwargs=True
    )
    together = Engine(policy, eos_ids=STOPS).sample(prompts, uniforms)
    hook.remove()
    assert read[:3] == [1, 3, 6]  # the token whose cache is measured, the distinct prompts, the first of each response
    for i, text in enumerate(texts):
        alone = Engine(policy, eos_ids=STOPS).sample(batch(tokenizer, policy, [text]), uniforms[i : i + 1])
        mask = together.response_mask[i]
        assert alone.response_ids[0].tolist() == together.response_ids[i][mask].tolist()
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[i][mask], atol=1e-5, rtol=0)


def test_removing_finished_rows_changes_nothing(
    policy: Policy, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, uniforms = batch(tokenizer, policy), sampling_uniforms(6, 0, len(PROMPTS), LIMIT)
    by_default = Engine(policy, eos_ids=STOPS).sample(prompts, uniforms)
    for share in (0.0, 0.999):  # never, and at once
        monkeypatch.setattr(engine_module, "COMPACT_AT", share)
        assert_same(by_default, Engine(policy, eos_ids=STOPS).sample(prompts, uniforms))


@pytest.mark.parametrize(
    ("kind", "heads"), [("gpt2", 4), ("llama", 2), ("gemma2", 2), ("t5", 4), ("bart", 4), ("lora", 4)]
)
def test_bytes_per_token(kind: str, heads: int, make_model: Callable[..., Any]) -> None:
    layers, kinds, width, float32 = 2, 2, 8, 4
    with torch.no_grad():
        assert bytes_per_token(Policy(make_model(kind))) == layers * kinds * heads * width * float32


@contextmanager
def little_memory(spare: int) -> Iterator[None]:
    """Limits the process to `spare` bytes more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit is Linux's")
def test_out_of_memory_halves_the_batch(
    make_model: Callable[..., Any], tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Policy(make_model("llama", head_dim=512, num_key_value_heads=4, spread=0.05))
    texts = PROMPTS * 20
    prompts, uniforms = batch(tokenizer, policy, texts), sampling_uniforms(7, 0, len(texts), 48)
    with torch.no_grad():
        cache = len(texts) * (prompts.input_ids.shape[1] + 47) * bytes_per_token(policy)
    plenty = Engine(policy, eos_ids=[1]).sample(prompts, uniforms)
    engine = Engine(policy, eos_ids=[1])
    with little_memory(3 * cache // 4), caplog.at_level(logging.WARNING, "deep_rlhf"):
        assert_same(plenty, engine.sample(prompts, uniforms))
        halvings = len(caplog.records)
        assert halvings >= 1
        assert_same(plenty, engine.sample(prompts, uniforms))
        assert len(caplog.records) == halvings  # the smaller batch is kept


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit is Linux's")
def test_out_of_memory_with_a_single_response_is_an_error(make_model: Callable[..., Any], tokenizer: Any) -> None:
    policy = Policy(make_model("llama", head_dim=512, num_key_value_heads=4))
    limit = 4_000
    with torch.no_grad():
        cache = limit * bytes_per_token(policy)
    with little_memory(cache // 4), pytest.raises(ResourceError, match="single response"):
        Engine(policy, eos_ids=[1]).sample(batch(tokenizer, policy, ["red"]), torch.rand(1, limit))
