"""How many tokens a pass holds changes nothing in a reward model's training, nor does running out of memory."""

import logging

import pytest
import torch
from test_shared_prefix import classifier

from deep_rlhf.algorithms.supervised import reward_trainer
from deep_rlhf.algorithms.supervised.reward import RewardConfig, RewardTrainer, pair_features
from deep_rlhf.errors import UserError
from deep_rlhf.types import Preference

COLOURS = ["red", "green", "blue", "black"]


def preferences(count):
    """Responses of 1 to 13 words."""
    return [
        Preference(
            prompt=" ".join(COLOURS[: 1 + i % 4]) + " ",
            a=" ".join(["gold", *COLOURS * (i % 3)]),
            b=" ".join(["grey", *COLOURS * (i % 4)]),
            mu=float(i % 2),
            id=str(i),
        )
        for i in range(count)
    ]


@pytest.fixture
def trainer_of(make_tokenizer, tmp_path, monkeypatch):
    """trainer_of(model, tokens, **flags): of 16 pairs in batches of 8."""

    def make(model, tokens, **flags):
        monkeypatch.setitem(reward_trainer.TOKENS_AT_ONCE, "cpu", tokens)
        options = {"report_to": "none", "disable_tqdm": True, "template": "plain", "lr_scheduler_type": "constant"}
        config = RewardConfig(
            output_dir=str(tmp_path), eval_strategy="no", save_strategy="no", ensemble_size=2, **(options | flags)
        )
        features, _ = pair_features(preferences(16), make_tokenizer(), config, 64)
        return RewardTrainer(model, config, pad_token_id=0, train_dataset=features)

    return make


def step(trainer, rows=8):
    """The loss and the gradients of one batch."""
    batch = trainer.collate(trainer.train_dataset[:rows])
    (loss,) = trainer.gradients([batch], torch.tensor(float(rows)))
    return loss.item(), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def plain_step(trainer, rows=8):
    """The same in one pass, with PyTorch's own means."""
    batch = trainer.collate(trainer.train_dataset[:rows])
    trainer.tokens = 10**6
    loss = trainer.loss(batch) / rows
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["GPT2", "Llama", "DistilBert"])
@pytest.mark.parametrize("tokens", [1, 40, 10**6])
def test_loss_and_gradients_are_those_of_one_pass(trainer_of, kind, tokens):
    expected = plain_step(trainer_of(classifier(kind), tokens))
    assert expected[1].keys() == dict(classifier(kind).named_parameters()).keys()
    trainer = trainer_of(classifier(kind), tokens)
    passes = []
    trainer.model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    assert_same(step(trainer), expected)
    assert (len(passes) > 1) == (tokens < 10**6)


def test_a_part_that_is_trained_with_adapters_leaves_the_table_alone(trainer_of):
    model = classifier("GPT2")
    model.get_input_embeddings().weight.requires_grad_(False)
    _, gradients = step(trainer_of(model, 40))
    assert "transformer.wte.weight" not in gradients
    assert "transformer.h.0.attn.c_attn.weight" in gradients


def too_much():
    """A real failure of PyTorch's allocator."""
    torch.empty(2**61, dtype=torch.uint8)


def fails_in_forward(model, tokens):
    def look(_, args):
        if args[0].numel() > tokens:
            too_much()

    model.get_input_embeddings().register_forward_pre_hook(look)


def fails_in_backward(model, tokens):
    """After the gradients of the upper layer have been added."""

    def watch(_, __, output):
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad and hidden.shape[:-1].numel() > tokens:
            hidden.register_hook(lambda _: too_much())

    model.transformer.h[0].register_forward_hook(watch)


@pytest.mark.parametrize("fail", [fails_in_forward, fails_in_backward])
def test_out_of_memory_halves_the_parts_with_the_same_result(trainer_of, caplog, fail):
    expected = plain_step(trainer_of(classifier("GPT2"), 1))
    model = classifier("GPT2")
    trainer = trainer_of(model, 400)
    fail(model, 60)
    with caplog.at_level(logging.WARNING, "deep_rlhf"):
        assert_same(step(trainer), expected)
    told = [record.getMessage() for record in caplog.records if "Out of memory" in record.getMessage()]
    assert len(told) == 3  # 200, 100, 50
    assert trainer.tokens == 50


def test_batches_accumulated_before_out_of_memory_are_computed_again(trainer_of):
    expected = plain_step(trainer_of(classifier("GPT2"), 1))
    model = classifier("GPT2")
    trainer = trainer_of(model, 400)
    features = trainer.train_dataset
    batches = [trainer.collate(features[:4]), trainer.collate(features[4:8])]
    batches[1]["second"] = torch.ones(4)
    loss, passes = trainer.loss, []

    def fails_later(part):
        if "second" in part and passes and not any("second" in earlier for earlier in passes):
            fails_in_backward(model, 70)  # the gradients of the first batch have been added
        passes.append(part)
        return loss(part)

    trainer.loss = fails_later
    first, second = trainer.gradients(batches, torch.tensor(8.0))
    assert "second" not in passes[0]
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert_same(((first + second).item(), gradients), expected)
    assert trainer.tokens < 400


def test_a_pair_too_large_for_the_memory_is_reported(trainer_of):
    model = classifier("GPT2")
    trainer = trainer_of(model, 400)
    fails_in_forward(model, 1)
    with pytest.raises(UserError, match=r"memory.* single pair"):
        step(trainer)


def test_other_errors_are_not_taken_for_a_lack_of_memory(trainer_of):
    model = classifier("GPT2")
    trainer = trainer_of(model, 400)
    model.get_input_embeddings().register_forward_pre_hook(lambda *_: torch.empty(2).view(3))
    with pytest.raises(RuntimeError, match="shape"):
        step(trainer)
    assert trainer.tokens == 400
