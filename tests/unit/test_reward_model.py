"""Reward models and their loss: expectations by hand, and against plain transformers."""

import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from tokenizers import processors
from torch import nn
from transformers import AutoModelForSequenceClassification

from deep_rlhf.algorithms.supervised.reward import (
    RewardConfig,
    RewardTrainer,
    out_of_bag_accuracy,
    pair_features,
    train_reward_model,
)
from deep_rlhf.algorithms.supervised.reward_trainer import accuracy, collate, label_noise_of, pair_metrics
from deep_rlhf.errors import ModelError, UserError
from deep_rlhf.models.reward import RewardModel, init_reward_head
from deep_rlhf.types import Preference

WORDS = 46  # in the tokenizer's vocabulary, with its special tokens
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
CLASSIFIERS = {
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "Llama": {**LLAMA, "max_position_embeddings": 64},
    "DistilBert": {**DISTILBERT, "max_position_embeddings": 64},
    "Bert": {**LLAMA, "max_position_embeddings": 64},
    "DebertaV2": {**LLAMA, "max_position_embeddings": 64, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
}


def classifier(kind, members=1, **overrides):
    torch.manual_seed(0)
    shared = {"vocab_size": WORDS, "pad_token_id": 0, "num_labels": members}
    config = getattr(transformers, f"{kind}Config")(**(shared | CLASSIFIERS[kind] | overrides))
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)  # large enough that a wrong mask or position is seen
    return model


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def gpt2(tokenizer):
    return RewardModel(classifier("GPT2", 2), tokenizer)


def settings(folder, **flags):
    quiet = {"report_to": "none", "disable_tqdm": True, "template": "plain", "lr_scheduler_type": "constant"}
    return RewardConfig(output_dir=str(folder), **(quiet | flags))


def pairs(count, good="gold", bad="grey"):
    """The better response holds the word `good`; texts of several lengths."""
    colours = ["red", "green", "blue", "black"]
    rows = []
    for i in range(count):
        filler = " ".join(colours[(i + j) % 4] for j in range(1 + i % 5))
        responses = (f" {good} {filler}", f" {bad} {filler}")
        a, b = responses if i % 2 == 0 else responses[::-1]
        rows.append(Preference(prompt="the cat", a=a, b=b, mu=1.0 if i % 2 == 0 else 0.0, id=str(i)))
    return rows


# ---- the model


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_score_does_not_depend_on_the_other_texts_of_a_batch(kind, tokenizer):
    model = RewardModel(classifier(kind, 3), tokenizer)
    texts = ["red", "the cat sees a very small red bird and eats", "green blue", "two three four five six"]
    together = model.score([""] * 4, texts)
    alone = torch.cat([model.score([""], [text]) for text in texts])
    assert together.shape == (4, 3)
    torch.testing.assert_close(together, alone, atol=3e-6, rtol=0)
    assert together.std(dim=0).min() > 1e-3


def test_token_types_left_out_are_those_bert_assumes(tokenizer):
    model = RewardModel(classifier("Bert"), tokenizer)
    ids = tokenizer("red cat", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model.model(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits
    torch.testing.assert_close(model.raw_scores(["red cat"]), expected)


def test_scores_are_normalised_per_member(tokenizer):
    mean, std = torch.tensor([1.0, -2.0]), torch.tensor([2.0, 0.5])
    model = RewardModel(classifier("GPT2", 2), tokenizer, mean=mean, std=std)
    raw = model.raw_scores(["the cat red"])[0]
    score = model.score(["the cat "], ["red"])[0]
    assert score.tolist() == pytest.approx([(raw[0].item() - 1) / 2, (raw[1].item() + 2) / 0.5])


def test_no_texts_give_no_scores(gpt2):
    assert gpt2.score([], []).shape == (0, 2)


def test_long_texts_lose_their_start(tokenizer):
    model = RewardModel(classifier("GPT2"), tokenizer, max_length=4)
    kept = model.raw_scores(["six seven eight gold"])
    torch.testing.assert_close(model.score(["one two three four five "], ["six seven eight gold"]), kept)
    assert not torch.allclose(model.raw_scores(["one two three four"]), kept)


def test_long_texts_keep_the_special_tokens_of_an_encoder(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.BertProcessing(("<eos>", 1), ("<unk>", 2))
    model = RewardModel(classifier("DistilBert"), tokenizer, max_length=4)
    seen = []
    model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    model.raw_scores(["one two three gold"])
    assert tokenizer.convert_ids_to_tokens(seen[0][0].tolist()) == ["<unk>", "three", "gold", "<eos>"]


def test_the_longest_input_is_what_the_model_reads(tokenizer):
    assert RewardModel(classifier("GPT2"), tokenizer, max_length=512).max_length == 64


@pytest.mark.parametrize("pad_token", [None, "<eos>"])
def test_a_decoder_gets_a_padding_token_of_its_own(make_tokenizer, pad_token):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = pad_token
    model = RewardModel(classifier("GPT2", vocab_size=len(tokenizer)), tokenizer)
    pad = model.model.config.pad_token_id
    assert pad == model.tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.pad_token == pad_token  # a policy may use the caller's tokenizer, so it stays as it is
    assert model.model.get_input_embeddings().num_embeddings > pad
    together = model.raw_scores(["red", "green blue black"])
    torch.testing.assert_close(together[:1], model.raw_scores(["red"]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["GPT2", "DistilBert"])
def test_fresh_heads_are_small_and_without_bias(kind):
    model = classifier(kind, 32)  # as many heads as the width: other layers have the same shape
    body = model.pre_classifier.weight.clone() if kind == "DistilBert" else None
    torch.manual_seed(0)
    init_reward_head(model)
    head = model.score if kind == "GPT2" else model.classifier
    assert head.weight.std().item() == pytest.approx(1 / math.sqrt(33), rel=0.1)
    if body is not None:
        assert torch.equal(model.pre_classifier.weight, body)
        assert not head.bias.any()


# ---- on disk


def test_a_saved_model_scores_the_same(tokenizer, tmp_path):
    mean, std = torch.tensor([0.1, 0.2]), torch.tensor([0.3, 1 / 3])
    model = classifier("GPT2", 2)
    init_reward_head(model)
    saved = RewardModel(model, tokenizer, template="hh", max_length=32, mean=mean, std=std, metrics={"accuracy": 0.75})
    saved.save(tmp_path)
    loaded = RewardModel.load(tmp_path)
    prompts, responses = ["the cat", "a dog"], ["sees gold", "eats"]
    before = saved.score(prompts, responses)
    torch.testing.assert_close(loaded.score(prompts, responses), before, atol=1e-6, rtol=0)
    assert (loaded.template, loaded.max_length, loaded.metrics) == ("hh", 32, {"accuracy": 0.75})

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    text = "\n\nHuman: the cat\n\nAssistant: sees gold"
    with torch.no_grad():
        raw = plain(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0]
    torch.testing.assert_close((raw - mean) / std, before[0], atol=1e-5, rtol=0)
    assert not list(tmp_path.glob("*.bin"))


def test_prompts_are_brought_into_the_form_of_training(tokenizer):
    model = RewardModel(classifier("GPT2"), tokenizer, template="hh")
    rendered = model.score(["\n\nHuman: the cat\n\nAssistant:"], [" sees gold"])
    torch.testing.assert_close(model.score(["the cat"], ["sees gold"]), rendered)


@pytest.fixture
def folder(tokenizer, tmp_path):
    model = classifier("GPT2")
    init_reward_head(model)
    RewardModel(model, tokenizer, template="hh").save(tmp_path)
    return tmp_path


def test_a_saved_tokenizer_does_not_remember_how_the_last_text_was_cut(tokenizer, tmp_path):
    model = RewardModel(classifier("GPT2"), tokenizer, max_length=5)
    model.score(["the cat sees a very old dog"], [" and a bird"])  # is truncated
    model.save(tmp_path / "first")
    assert json.loads((tmp_path / "first" / "tokenizer.json").read_text())["truncation"] is None
    RewardModel.load(tmp_path / "first").save(tmp_path / "second")
    assert "max_length" not in json.loads((tmp_path / "second" / "tokenizer_config.json").read_text())
    assert (tmp_path / "first" / "tokenizer.json").read_text() == (tmp_path / "second" / "tokenizer.json").read_text()


def test_any_classifier_with_one_label_is_a_reward_model(folder):
    (folder / "reward_model.json").unlink()
    model = RewardModel.load(folder)
    assert (model.template, model.mean.tolist(), model.std.tolist(), model.max_length) == (None, [0.0], [1.0], 64)
    torch.testing.assert_close(model.score(["red "], ["cat"]), model.raw_scores(["red cat"]))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"template_fingerprint": "0" * 16}, "another version"), ({"template": "chatml"}, "unknown template 'chatml'")],
)
def test_another_template_causes_a_warning(folder, caplog, change, words):
    card = json.loads((folder / "reward_model.json").read_text())
    (folder / "reward_model.json").write_text(json.dumps(card | change))
    with caplog.at_level(logging.WARNING, "deep_rlhf"):
        RewardModel.load(folder)
    assert words in caplog.text


def test_the_same_template_causes_no_warning(folder, caplog):
    with caplog.at_level(logging.WARNING, "deep_rlhf"):
        RewardModel.load(folder)
    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not valid JSON"), ('{"mean": [0.0, 1.0]}', "list of 1 finite"), ("{}", "mean"), ("[]", "object")],
)
def test_a_broken_card_is_refused(folder, text, words):
    (folder / "reward_model.json").write_text(text)
    with pytest.raises(ModelError, match=words):
        RewardModel.load(folder)


def test_models_that_are_not_reward_models_are_refused(make_model, tokenizer, tmp_path):
    make_model("gpt2").save_pretrained(tmp_path / "lm")
    classifier("GPT2", 2).save_pretrained(tmp_path / "classes")
    for name in ("lm", "classes"):
        tokenizer.save_pretrained(tmp_path / name)
    with pytest.raises(ModelError, match="no reward head"):
        RewardModel.load(tmp_path / "lm")
    with pytest.raises(ModelError, match="2 classes"):
        RewardModel.load(tmp_path / "classes")
    with pytest.raises(ModelError, match="nowhere"):
        RewardModel.load(tmp_path / "nowhere")


# ---- the loss


class Table(nn.Module):
    """Rewards by token id: token 3 is worth 2 to every member, token 4 is worth 1."""

    def __init__(self, members):
        super().__init__()
        self.config = SimpleNamespace(num_labels=members, hidden_size=1)
        self.rewards = nn.Embedding.from_pretrained(torch.tensor([[0.0], [0.0], [0.0], [2.0], [1.0]]), freeze=False)
        self.score = nn.Linear(1, members, bias=False)
        nn.init.ones_(self.score.weight)

    def get_input_embeddings(self):
        return self.rewards

    def forward(self, input_ids, attention_mask, position_ids=None):
        return SimpleNamespace(logits=self.score(self.rewards(input_ids))[:, 0])


def loss_of(tmp_path, *, mu=1.0, margin=0.0, weight=(1.0,), count=None, rows=1, told=None, **flags):
    """Of pairs in which a is worth 2 and b is worth 1."""
    config = settings(tmp_path, eval_strategy="no", ensemble_size=len(weight), **flags)
    trainer = RewardTrainer(Table(len(weight)), config, pad_token_id=0)
    pair = {"input_ids": torch.tensor([3, 4]), "lengths": (0, 1, 1), "labels": mu, "margin": margin, "longer": 0.5}
    pair |= {} if told is None else {"label_noise": told}
    batch = trainer.collate([pair | {"weight": torch.tensor(weight)}] * rows)
    return trainer.gradients([batch], torch.tensor(float(count or rows)))[0].item()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.313262),  # −log σ(1)
        ({"mu": 0.0}, 1.313262),  # −log σ(−1)
        ({"mu": 0.5}, 0.813262),  # a tie: their mean
        ({"margin": 1.0}, 0.693147),  # −log σ(1 − 1)
        ({"mu": 0.0, "margin": 1.0}, 2.126928),  # −log σ(−1 − 1)
        ({"label_noise": 0.1}, 0.345378),  # −log(0.9 · 0.731059 + 0.05)
        ({"told": 0.5}, 0.485273),  # −log(0.5 · 0.731059 + 0.25)
        ({"told": 0.0, "label_noise": 0.1}, 0.313262),  # what is told of a pair goes before what the run assumes
        ({"center_rewards_coefficient": 0.1}, 1.213262),  # + 0.1 · (2 + 1)²
        ({"weight": (2.0, 0.0)}, 0.313262),  # members' mean: (2 + 0) / 2
        ({"weight": (3.0,), "rows": 4}, 0.939787),  # weighted, over the number of pairs
        ({"rows": 2, "count": torch.tensor(8)}, 0.078316),  # 2 of the update's 8 pairs
    ],
)
def test_loss_by_hand(tmp_path, options, expected):
    assert loss_of(tmp_path, **options) == pytest.approx(expected, abs=1e-5)


def test_accuracy_counts_equal_rewards_half_and_leaves_ties_out():
    advantage = torch.tensor([2.0, -1.0, 0.0, 5.0, 1.0])
    mu = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.2])
    assert accuracy(advantage, mu) == pytest.approx((1 + 0 + 0.5 + 0) / 4)
    assert accuracy(torch.tensor([1.0]), torch.tensor([0.5])) == 0.5


def test_metrics_are_of_the_members_mean():
    rewards = torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [3.0, -5.0]]])  # a − b: 1 and 1
    metrics = pair_metrics(rewards, torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.5]))
    expected = {"loss": (0.313262 + 1.313262) / 2, "accuracy": 0.5, "accuracy_length_baseline": 0.75}
    assert metrics == pytest.approx(expected, abs=1e-5)
    noisy = pair_metrics(rewards, torch.ones(2), torch.ones(2), label_noise=torch.tensor([0.0, 0.1]))
    assert noisy["loss"] == pytest.approx((0.313262 + 0.345378) / 2, abs=1e-5)


def test_out_of_bag_accuracy_is_of_pairs_a_member_never_saw():
    weights = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]])
    features = [{"labels": 1.0, "weight": weight} for weight in weights]
    a = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [-1.0, 0.0]])
    assert out_of_bag_accuracy(torch.stack([a, torch.zeros(3, 2)], dim=1), features) == [0.5, 0.75]


# ---- the pairs


def test_pairs_that_are_too_long_are_dropped_and_counted(tokenizer, tmp_path):
    rows = [
        Preference(prompt="the cat ", a="sees gold", b="eats", mu=0.0, margin=2.0, weight=3.0),
        Preference(prompt="the cat ", a="eats", b="one two three"),
        Preference(prompt="the cat ", a="one two three", b="eats"),
    ]
    features, report = pair_features(rows, tokenizer, settings(tmp_path), max_length=4)
    assert (report.read, report.kept, report.dropped) == (3, 1, {"too long": 2})
    (pair,) = features
    assert pair["input_ids"].tolist() == tokenizer("the cat sees gold eats")["input_ids"]
    assert pair["lengths"] == (2, 2, 1)
    assert (pair["labels"], pair["margin"], pair["longer"]) == (0.0, 2.0, 1.0)
    assert pair["weight"].tolist() == [3.0]
    assert "label_noise" not in pair


def test_a_pair_carries_the_noise_of_its_annotator(tokenizer, tmp_path):
    rows = [Preference(prompt="the ", a="red", b="grey", label_noise=noise) for noise in (None, 0.25, 0.0)]
    features, _ = pair_features(rows, tokenizer, settings(tmp_path), max_length=9)
    told = collate(features, pad_token_id=0)["label_noise"]
    assert told.isnan().tolist() == [True, False, False]
    assert label_noise_of(told, 0.1).tolist() == pytest.approx([0.1, 0.25, 0.0])
    assert label_noise_of(told[:1], 0.1) == 0.1  # a number, as in a run in which nothing is told


def test_the_bootstrap_weights_of_a_pair_do_not_depend_on_other_pairs(tokenizer, tmp_path):
    config = settings(tmp_path, ensemble_size=8)
    rows = [Preference(prompt="the ", a=word, b="grey") for word in ("red", "green", "blue", "black")]  # without ids
    all_of_them, _ = pair_features(rows, tokenizer, config, 64)
    last, _ = pair_features(rows[-1:], tokenizer, config, 64)
    assert torch.equal(all_of_them[-1]["weight"], last[0]["weight"])
    assert len({tuple(pair["weight"].tolist()) for pair in all_of_them}) == 4


def test_training_without_a_usable_pair_is_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"[Nn]o training pair.*\b4 too long"):
        train_reward_model(settings(tmp_path, max_length=2), classifier("GPT2"), tokenizer, pairs(4), pairs(4))


# ---- training


def test_evaluation_follows_logging_and_the_best_model_is_kept_by_default(tmp_path):
    config = RewardConfig(output_dir=str(tmp_path), logging_steps=7)
    assert (config.eval_strategy, config.eval_steps, config.save_strategy) == ("steps", 7, "best")
    assert (config.load_best_model_at_end, config.metric_for_best_model) == (True, "loss")
    for flags in ({"eval_strategy": "no"}, {"save_strategy": "no"}):
        assert not RewardConfig(output_dir=str(tmp_path), **flags).load_best_model_at_end


@pytest.mark.parametrize(
    "flags", [{"max_length": 0}, {"ensemble_size": 0}, {"label_noise": 1.0}, {"template": "hhh"}, {"eval_samples": 0}]
)
def test_values_out_of_range_are_refused(tmp_path, flags):
    with pytest.raises(UserError, match=str(next(iter(flags.values())))):
        RewardConfig(output_dir=str(tmp_path), **flags)


def test_gradient_accumulation_changes_nothing(tokenizer, tmp_path):
    runs = []
    for batch, micro_batches in ((8, 1), (2, 4)):
        config = settings(
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=micro_batches,
            learning_rate=1e-2,
            logging_steps=1,
            eval_strategy="no",
            ensemble_size=2,
            center_rewards_coefficient=0.01,
        )
        result = train_reward_model(config, classifier("GPT2", 2), tokenizer, pairs(21), pairs(4))
        runs.append(([row["loss"] for row in result.history if "loss" in row], result.rewards))
    (losses, rewards), (accumulated, same_rewards) = runs
    assert len(losses) == 3
    assert accumulated == pytest.approx(losses, abs=1e-5)
    torch.testing.assert_close(same_rewards, rewards, atol=1e-4, rtol=0)


def test_the_best_model_is_kept_not_the_last(tokenizer, tmp_path):
    config = settings(tmp_path, per_device_train_batch_size=4, learning_rate=5e-3, logging_steps=2)
    against = pairs(20, good="grey", bad="gold")  # the held-out pairs prefer what training teaches against
    result = train_reward_model(config, classifier("GPT2"), tokenizer, pairs(40), against)
    losses = [row["eval_loss"] for row in result.history if "eval_loss" in row]
    assert len(losses) == 6
    assert losses[-2] > 2 * losses[0]
    assert result.metrics["loss"] == pytest.approx(min(losses), abs=1e-5)


def test_scores_of_training_responses_have_mean_0_and_deviation_1(tokenizer, tmp_path):
    config = settings(tmp_path, ensemble_size=2, eval_strategy="no")
    rows = pairs(24)
    result = train_reward_model(config, classifier("GPT2", 2), tokenizer, rows, rows[:12])
    scores = result.model.score([p.prompt for p in rows] * 2, [p.a for p in rows] + [p.b for p in rows])
    torch.testing.assert_close(scores.mean(dim=0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.std(dim=0, correction=0), torch.ones(2), atol=1e-4, rtol=0)
    raw = result.model.raw_scores([p.prompt + response for p in rows[:12] for response in (p.a, p.b)])
    torch.testing.assert_close(result.rewards, raw.mean(dim=1).reshape(12, 2), atol=1e-5, rtol=0)


def test_a_trained_reward_model_is_refined_not_started_anew(folder, tokenizer, tmp_path):
    config = settings(tmp_path / "again", learning_rate=0.0, eval_strategy="no")
    before = RewardModel.load(folder).raw_scores(["the cat gold"])
    result = train_reward_model(config, str(folder), None, pairs(4), pairs(4))
    torch.testing.assert_close(result.model.raw_scores(["the cat gold"]), before)


@pytest.mark.parametrize("kind", ["GPT2", "DistilBert"])
def test_lora_trains_adapters_and_head_alone_and_is_saved_merged(kind, tokenizer, tmp_path):
    config = settings(
        tmp_path, use_peft=True, lora_r=4, learning_rate=1e-2, logging_steps=2, per_device_train_batch_size=8
    )
    model = classifier(kind)
    init_reward_head(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    result = train_reward_model(config, model, tokenizer, pairs(32), pairs(8))
    result.model.save(tmp_path / "saved")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    changed = {name for name, parameter in plain.named_parameters() if not torch.equal(parameter, before[name])}
    changed -= {"classifier.bias"}  # cancels out of every difference of rewards: only rounding moves it
    head = {
        "GPT2": {"score.weight"},
        "DistilBert": {"classifier.weight", "pre_classifier.weight", "pre_classifier.bias"},
    }
    assert head[kind] <= changed
    adapted = "c_attn" if kind == "GPT2" else "lin"
    assert changed - head[kind]
    assert {name for name in changed - head[kind] if adapted not in name or "bias" in name} == set()
    texts = ["the cat gold", "the cat grey"]
    torch.testing.assert_close(RewardModel(plain, tokenizer).raw_scores(texts), result.model.raw_scores(texts))
