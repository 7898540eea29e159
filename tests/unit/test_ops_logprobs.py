import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from deep_rlhf.ops.logprobs import (
    chunked_kl_full,
    chunked_logprobs_and_entropy,
    chunked_token_logprobs,
    entropy,
    token_logprobs,
)

LN2, LN3 = math.log(2), math.log(3)
# softmax: (½, ¼, ¼), (¾, ¼, 0 to float precision), and the first one shifted by a constant
LOGITS = torch.tensor([[[LN2, 0.0, 0.0], [LN3, 0.0, -200.0], [LN2 + 50.0, 50.0, 50.0], [0.0, 0.0, 0.0]]])
TOKEN_IDS = torch.tensor([[0, 1, 2, 0]])


def test_token_logprobs_by_hand() -> None:
    expected = torch.tensor([[math.log(1 / 2), math.log(1 / 4), math.log(1 / 4), math.log(1 / 3)]])
    assert_close(token_logprobs(LOGITS, TOKEN_IDS), expected, rtol=0, atol=1e-5)


def test_the_temperature_divides_the_logits() -> None:
    # T = ½ doubles the logits: (2², 1, 1)/6, (3², 1, 0)/10, the first again, thirds
    expected = torch.tensor([[math.log(4 / 6), math.log(1 / 10), math.log(1 / 6), math.log(1 / 3)]])
    assert_close(token_logprobs(LOGITS, TOKEN_IDS, 0.5), expected, rtol=0, atol=1e-5)


def test_entropy_by_hand() -> None:
    # ½ ln 2 + 2 · ¼ ln 4 = 1.5 ln 2;  ¾ ln(4/3) + ¼ ln 4 = 2 ln 2 − ¾ ln 3;  ln 3
    expected = torch.tensor([[1.5 * LN2, 2 * LN2 - 0.75 * LN3, 1.5 * LN2, LN3]])
    assert_close(entropy(LOGITS), expected, rtol=0, atol=1e-5)


def test_entropy_at_another_temperature() -> None:
    # (4, 1, 1)/6: ln 6 − (4/6) ln 4;  (9, 1)/10: ln 10 − 0.9 ln 9;  ln 3
    first = math.log(6) - 4 / 6 * math.log(4)
    expected = torch.tensor([[first, math.log(10) - 0.9 * math.log(9), first, LN3]])
    assert_close(entropy(LOGITS, 0.5), expected, rtol=0, atol=1e-5)


def test_suppressed_tokens_count_nothing() -> None:
    # ½ and ½ remain: entropy ln 2, and its gradient at the maximum is 0
    logits = torch.tensor([7.0, -math.inf, 7.0], requires_grad=True)
    assert_close(token_logprobs(logits, torch.tensor(2)), torch.tensor(-LN2))
    entropy(logits).backward()
    assert_close(entropy(logits), torch.tensor(LN2))
    assert_close(logits.grad, torch.zeros(3))


def test_half_precision_logits_give_float32() -> None:
    logits = LOGITS[:, 3:].bfloat16()
    for result in (token_logprobs(logits, TOKEN_IDS[:, 3:]), entropy(logits)):
        assert result.dtype == torch.float32
        assert abs(result.item()) == pytest.approx(LN3, abs=1e-6)  # bfloat16 arithmetic is off by 1e-3


def test_the_gradient_is_one_hot_minus_softmax_over_the_temperature() -> None:
    logits = torch.tensor([LN2, 0.0, 0.0], requires_grad=True)
    token_logprobs(logits, torch.tensor(1), temperature=0.5).backward()
    # softmax(2 ln 2, 0, 0) = (4, 1, 1)/6; ((0, 1, 0) − (4, 1, 1)/6) / ½
    assert_close(logits.grad, torch.tensor([-4 / 3, 5 / 3, -1 / 3]))


def _hidden_head_and_ids() -> tuple[Tensor, torch.nn.Linear, Tensor]:
    torch.manual_seed(0)
    head = torch.nn.Linear(4, 11)
    return torch.randn(7, 4, requires_grad=True), head, torch.randint(11, (7,))


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_change_neither_value_nor_gradient(chunk_size: int, temperature: float) -> None:
    hidden, head, ids = _hidden_head_and_ids()
    weights = torch.linspace(-1, 2, 7)
    plain = token_logprobs(head(hidden), ids, temperature)
    expected = torch.autograd.grad((weights * plain).sum(), [hidden, head.weight, head.bias])
    chunked = chunked_token_logprobs(hidden, head, ids, temperature=temperature, chunk_size=chunk_size)
    gradients = torch.autograd.grad((weights * chunked).sum(), [hidden, head.weight, head.bias])
    assert_close(chunked, plain, rtol=0, atol=1e-6)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert_close(gradient, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_change_neither_the_entropy_nor_its_gradient(chunk_size: int, temperature: float) -> None:
    hidden, head, ids = _hidden_head_and_ids()
    weights = torch.linspace(-1, 2, 14).split(7)

    def gradients(logprobs: Tensor, entropies: Tensor) -> tuple[Tensor, ...]:
        loss = (weights[0] * logprobs).sum() + (weights[1] * entropies).sum()
        return torch.autograd.grad(loss, [hidden, head.weight, head.bias])

    logits = head(hidden)
    plain = (token_logprobs(logits, ids, temperature), entropy(logits, temperature))
    chunked = chunked_logprobs_and_entropy(hidden, head, ids, temperature=temperature, chunk_size=chunk_size)
    for actual, wanted in zip([*chunked, *gradients(*chunked)], [*plain, *gradients(*plain)], strict=True):
        assert_close(actual, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_logprobs_and_entropy_share_their_chunks_of_logits(training: bool) -> None:
    hidden, linear, ids = _hidden_head_and_ids()
    rows = []

    def head(states: Tensor) -> Tensor:
        rows.append(len(states))
        return linear(states)

    with torch.set_grad_enabled(training):
        logprobs, entropies = chunked_logprobs_and_entropy(hidden, head, ids, chunk_size=3)
    assert rows == [3, 3, 1]
    assert logprobs.requires_grad == entropies.requires_grad == training


def test_the_full_kl_of_two_models_by_hand() -> None:
    # the states are the logits. Policy (½, ½, –) against (¼, ¾, –): ½ ln 2 − ½ ln 1.5; (½, ¼, ¼) against itself
    suppressed = -math.inf
    logits = torch.tensor([[1.0, 1.0, suppressed], [LN2, 0.0, 0.0]])
    ref_logits = torch.tensor([[0.0, LN3, suppressed], [LN2 + 5, 5.0, 5.0]])
    identity = torch.nn.Identity()
    for chunk_size in (1, 2, 100):
        kl = chunked_kl_full(logits, identity, ref_logits, identity, chunk_size=chunk_size)
        assert_close(kl, torch.tensor([0.1438410, 0.0]))
    # at T = ½ the reference is (1, 9)/10: ½ ln 5 + ½ ln(5/9)
    kl = chunked_kl_full(logits, identity, ref_logits, identity, temperature=0.5)
    assert_close(kl, torch.tensor([0.5108256, 0.0]))
    # at T = 2 the second model is (1, √3) / (1 + √3): ½ ln(½ / 0.3660254) + ½ ln(½ / 0.6339746), also the other way
    kl = chunked_kl_full(ref_logits, identity, logits, identity, temperature=2.0)
    assert_close(kl, torch.tensor([0.3660254 * math.log(2 * 0.3660254) + 0.6339746 * math.log(2 * 0.6339746), 0.0]))


def test_the_full_kl_is_computed_in_float32_in_chunks_and_without_gradient() -> None:
    hidden, linear, _ = _hidden_head_and_ids()
    rows = []

    def head(states: Tensor) -> Tensor:
        rows.append(len(states))
        return linear(states).bfloat16()

    kl = chunked_kl_full(hidden, head, hidden, lambda states: linear(states).bfloat16() * 1, chunk_size=3)
    assert rows == [3, 3, 1]
    assert kl.dtype == torch.float32
    assert not kl.requires_grad
    assert_close(kl, torch.zeros(7), rtol=0, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_no_more_than_one_chunk_of_logits_is_made_at_once(training: bool) -> None:
    hidden, linear, ids = _hidden_head_and_ids()
    rows = []

    def head(states: Tensor) -> Tensor:
        rows.append(len(states))
        return linear(states)

    with torch.set_grad_enabled(training):
        logprobs = chunked_token_logprobs(hidden, head, ids, chunk_size=3)
    assert rows == [3, 3, 1]
    assert logprobs.requires_grad == training
    if training:  # the logits were not kept: the backward pass makes them again
        logprobs.sum().backward()
        assert sorted(rows) == [1, 1, 3, 3, 3, 3]


def test_no_tokens_give_no_logprobs() -> None:
    _, head, _ = _hidden_head_and_ids()
    assert chunked_token_logprobs(torch.zeros(0, 4), head, torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_as_many_states_as_tokens_are_needed() -> None:
    _, head, _ = _hidden_head_and_ids()
    with pytest.raises(ValueError, match="zip"):
        chunked_token_logprobs(torch.zeros(4, 4), head, torch.zeros(2, dtype=torch.long), chunk_size=2)
