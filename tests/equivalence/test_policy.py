"""The policy compared with a plain forward pass of the same model, one unpadded row at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from deep_rlhf.errors import ModelError
from deep_rlhf.models.adapters import add_lora
from deep_rlhf.models.policy import Policy, Reference
from deep_rlhf.models.trunk import position_ids

KINDS = ["gpt2", "llama", "granite", "gemma2", "t5", "t5-untied", "bart", "lora"]
PROMPTS = [[5, 9, 11], [7], [3, 4, 5, 6, 7, 8, 9, 10], [30, 31]]
RESPONSES = [[12, 1], [13, 14, 15, 16, 17], [40], [18, 19, 20, 21, 22, 23, 1]]
TEMPERATURE = 0.6


@pytest.fixture(params=KINDS)
def policy(request: pytest.FixtureRequest, make_model: Callable[..., Any]) -> Policy:
    return Policy(make_model(request.param))


def padded(rows: list[list[int]], *, left: bool, extra: int = 0, filler: int = 0) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows)) + extra
    ids, mask = torch.full((len(rows), width), filler), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, columns], mask[i, columns] = torch.tensor(row), True
    return ids, mask


def read_out(states: Tensor) -> Tensor:
    """Something that depends on all of a state [..., H] -> [...]."""
    return states @ torch.linspace(-0.2, 0.2, states.shape[-1])


def of_policy(policy: Policy, extra: int = 0, filler: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """log-probabilities [N, R] and read-outs of the states [N, R] by the policy, and the response mask."""
    prompts = padded(PROMPTS, left=not policy.is_seq2seq, extra=extra, filler=filler)
    response_ids, response_mask = padded(RESPONSES, left=False, filler=filler)
    states = policy.states(*prompts, response_ids, response_mask)
    return policy.logprobs(states, response_ids, response_mask, TEMPERATURE), read_out(states), response_mask


def plain(policy: Policy, prompt: list[int], response: list[int]) -> tuple[Tensor, Tensor]:
    """log-probabilities and read-outs of the states [R] by the model's own forward."""
    model, options = policy.model, {"output_hidden_states": True}
    if policy.is_seq2seq:
        decoder_ids = torch.tensor([[model.config.decoder_start_token_id, *response[:-1]]])
        output = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder_ids, **options)
        logits, hidden = output.logits[0], output.decoder_hidden_states[-1][0]
    else:
        output = model(input_ids=torch.tensor([prompt + response]), **options)
        before = slice(len(prompt) - 1, -1)
        logits, hidden = output.logits[0, before], output.hidden_states[-1][0, before]
    logprobs = (logits / TEMPERATURE).log_softmax(-1).gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1)
    return logprobs, read_out(hidden)


def test_logprobs_and_states_are_those_of_a_plain_forward(policy: Policy) -> None:
    logprobs, values, mask = of_policy(policy)
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        expected_logprobs, expected_values = plain(policy, prompt, response)
        torch.testing.assert_close(logprobs[i][mask[i]], expected_logprobs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values[i][mask[i]], expected_values, atol=1e-5, rtol=1e-5)
    assert not logprobs[~mask].any()


def test_padding_changes_nothing(policy: Policy) -> None:
    with torch.no_grad():
        (logprobs, values, mask), (more_logprobs, more_values, _) = of_policy(policy), of_policy(policy, 4, 33)
    torch.testing.assert_close(more_logprobs, logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(more_values[mask], values[mask], atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_a_plain_loop(policy: Policy) -> None:
    def gradients(logprobs: Tensor, values: Tensor) -> dict[str, Tensor]:
        policy.zero_grad()
        weights = torch.linspace(-1, 1, len(logprobs))
        ((weights * logprobs).sum() + (weights**2 * values).sum()).backward()
        return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}

    logprobs, values, mask = of_policy(policy)
    ours = gradients(logprobs[mask], values[mask])
    rows = [plain(policy, *row) for row in zip(PROMPTS, RESPONSES, strict=True)]
    expected = gradients(torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows]))
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, atol=2e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_position_ids_count_real_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]


class ScaledLogits(GPT2LMHeadModel):
    """A model whose logits are not simply its output embeddings of the last hidden state."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.01
        return output


def test_a_model_with_other_logits_is_refused() -> None:
    model = ScaledLogits(GPT2Config(vocab_size=43, n_embd=32, n_layer=1, n_head=4, initializer_range=0.2))
    with pytest.raises(ModelError, match="'gpt2' computes its logits"):
        Policy(model)


def test_a_model_fresh_from_its_configuration_has_no_dropout() -> None:
    dropout = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    policy = Policy(GPT2LMHeadModel(GPT2Config(vocab_size=43, n_embd=32, n_layer=2, n_head=4, **dropout)).train())
    policy.train()
    assert torch.equal(of_policy(policy)[0], of_policy(policy)[0])


def shaken(policy: Policy) -> None:
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.1)


def test_reference_of_an_adapted_policy_is_the_base_model(make_model: Callable[..., Any]) -> None:
    base, adapted = Policy(make_model("gpt2")), Policy(make_model("lora"))  # one seed: the same base weights
    reference = Reference(adapted)
    shaken(adapted)
    with reference.model() as frozen:
        logprobs = of_policy(frozen)[0]
    torch.testing.assert_close(logprobs, of_policy(base)[0], atol=1e-6, rtol=0)
    assert not logprobs.requires_grad
    assert not torch.allclose(of_policy(adapted)[0], logprobs, atol=1e-3)  # the adapters are on again


def test_reference_of_a_plain_policy_is_a_frozen_copy(make_model: Callable[..., Any]) -> None:
    policy = Policy(make_model("t5"))
    before = of_policy(policy)[0].detach()
    reference = Reference(policy)
    shaken(policy)
    with reference.model() as frozen:
        torch.testing.assert_close(of_policy(frozen)[0], before, atol=1e-6, rtol=0)
        assert not frozen.trainable_parameters()
    assert policy.trainable_parameters()


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_a_plain_model_has_the_logits_of_the_adapters_and_training_continues(
    kind: str, make_model: Callable[..., Any]
) -> None:
    task_type = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    policy = Policy(add_lora(make_model(kind), r=4, alpha=8, task_type=task_type))
    assert all("lora" in name for name, p in policy.named_parameters() if p.requires_grad)
    assert len(policy.trainable_parameters()) > 2
    shaken(policy)
    plain_model = policy.plain_model()
    assert isinstance(plain_model, PreTrainedModel)
    assert not any("lora" in name for name in plain_model.state_dict())
    with torch.no_grad():
        logprobs = of_policy(policy)[0]
        torch.testing.assert_close(of_policy(Policy(plain_model))[0], logprobs, atol=1e-5, rtol=0)
        shaken(policy)
        assert not torch.allclose(of_policy(policy)[0], logprobs, atol=1e-3)
        torch.testing.assert_close(of_policy(Policy(plain_model))[0], logprobs, atol=1e-5, rtol=0)


def test_a_saved_plain_model_reopens_unchanged(make_model: Callable[..., Any], tmp_path: Any) -> None:
    policy = Policy(make_model("lora"))
    policy.plain_model().save_pretrained(tmp_path)
    reopened = Policy(AutoModelForCausalLM.from_pretrained(tmp_path))
    torch.testing.assert_close(of_policy(reopened)[0], of_policy(policy)[0], atol=1e-5, rtol=0)
