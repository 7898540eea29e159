"""A pair computed with a shared prefix has the rewards and gradients of its two separate texts."""

import pytest
import torch
import transformers
from torch.nn.functional import logsigmoid

from deep_rlhf.models.adapters import add_lora
from deep_rlhf.models.load import disable_dropout
from deep_rlhf.models.pairs import PairScorer, common_prefix

PAD, WORDS, LONGEST = 0, 46, 24
WIDTH = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CLASSIFIERS = {
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "Llama": WIDTH | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64},
    "Gemma2": WIDTH | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64},
    "Bert": WIDTH | {"max_position_embeddings": 64},
}


def classifier(kind, members=2, **overrides):
    torch.manual_seed(0)
    shared = {"vocab_size": WORDS, "pad_token_id": PAD, "num_labels": members}
    config = getattr(transformers, f"{kind}Config")(**(shared | CLASSIFIERS[kind] | overrides))
    model = disable_dropout(getattr(transformers, f"{kind}ForSequenceClassification")(config)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)  # large enough that a wrong mask or position is seen
    return model


def with_lora(model):
    adapted = add_lora(model, r=4, alpha=8, task_type="SEQ_CLS", modules_to_save=["score"])
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return adapted.eval()


def batch_of_pairs():
    """Rows of several lengths, one without a prefix."""
    lengths = torch.tensor([[9, 3, 7], [1, 6, 1], [0, 4, 5], [12, 12, 2]])
    ids = torch.randint(1, WORDS, (4, 26), generator=torch.Generator().manual_seed(1))
    return ids.where(torch.arange(26) < lengths.sum(1, keepdim=True), PAD), lengths


def sides_alone(model, ids, lengths):
    """The plain computation, one response at a time, without padding: rewards [B, 2, K]."""
    rewards = []
    for row, (prefix, a, b) in zip(ids, lengths.tolist(), strict=True):
        responses = row[: prefix + a], torch.cat([row[:prefix], row[prefix + a : prefix + a + b]])
        rewards.append(torch.cat([model(input_ids=response[None]).logits for response in responses]))
    return torch.stack(rewards)


def gradients(model, rewards):
    model.zero_grad()
    loss = -logsigmoid(rewards[:, 0] - rewards[:, 1]).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["GPT2", "Llama", "GPT2 with LoRA", "Llama, checkpointed"])
def test_loss_and_gradients_are_those_of_two_plain_passes(kind):
    model = classifier(kind.split(",")[0].split()[0])
    if "LoRA" in kind:
        model = with_lora(model)
    if "checkpointed" in kind:
        model.gradient_checkpointing_enable()
        model.train()
    scorer = PairScorer(model, pad_token_id=PAD, longest=LONGEST)
    scorer.share_prefix(model)
    assert scorer.shares_prefix
    ids, lengths = batch_of_pairs()
    rewards = scorer.rewards(model, ids, lengths, tokens=60)
    expected = sides_alone(model, ids, lengths)
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1
    loss, shared = gradients(model, rewards)
    expected_loss, plain = gradients(model, expected)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert shared.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(shared[name], gradient, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["Gemma2", "Bloom", "DistilBert", "Bert"])
def test_models_that_cannot_share_a_prefix_score_each_response_separately(kind):
    """A window of 8 tokens, positions computed from a mask [B, L], and two models that are not causal."""
    model = classifier(kind)
    scorer = PairScorer(model, pad_token_id=PAD, longest=LONGEST)
    scorer.share_prefix(model)
    assert not scorer.shares_prefix
    ids, lengths = batch_of_pairs()
    expected = sides_alone(model, ids, lengths)
    for tokens in (1, 30, 1000):  # alone, groups of like length, all together
        rewards = scorer.rewards(model, ids, lengths, tokens=tokens)
        torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=1e-5)


def test_a_window_longer_than_the_texts_changes_nothing():
    model = classifier("Gemma2", sliding_window=64)
    scorer = PairScorer(model, pad_token_id=PAD, longest=LONGEST)
    scorer.share_prefix(model)
    assert scorer.shares_prefix


def test_positions_of_padding_stay_in_range():
    """17 tokens of padding after response b, and 48 tokens of response a: 65 positions in all."""
    model = classifier("GPT2")
    scorer = PairScorer(model, pad_token_id=PAD, longest=LONGEST)
    scorer.share_prefix(model)
    lengths = torch.tensor([[2, 60, 38], [1, 2, 2]])
    ids = torch.randint(1, WORDS, (2, 100)).where(torch.arange(100) < lengths.sum(1, keepdim=True), PAD)
    torch.testing.assert_close(
        scorer.rewards(model, ids, lengths, tokens=1000), sides_alone(model, ids, lengths), atol=1e-5, rtol=1e-5
    )


def test_fewer_tokens_are_computed():
    model = classifier("GPT2")
    scorer = PairScorer(model, pad_token_id=PAD, longest=LONGEST)
    assert scorer.tokens([[90, 3, 7]]) == [93 + 97]
    scorer.share_prefix(model)
    assert scorer.tokens([[90, 3, 7]]) == [128]  # 100, rounded to a width


@pytest.mark.parametrize(
    ("a", "b", "prefix"), [([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 1), ([5], [5], 0), ([1, 2], [2, 1], 0)]
)
def test_each_response_keeps_at_least_one_token(a, b, prefix):
    assert common_prefix(torch.tensor(a), torch.tensor(b)) == prefix
