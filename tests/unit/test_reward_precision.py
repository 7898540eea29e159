"""bf16 weights with float32 masters: what a run computes in, what it keeps, and how it goes on after a stop."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import BartConfig, BartForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from deep_rlhf.algorithms.supervised.reward import RewardConfig, RewardTrainer, train_reward_model
from deep_rlhf.errors import ConfigError
from deep_rlhf.models.load import disable_dropout
from deep_rlhf.models.reward import RewardModel
from deep_rlhf.runtime.checkpoint import latest_checkpoint
from deep_rlhf.types import Preference

LAYERS = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}


def config_of(folder, **flags):
    return RewardConfig(output_dir=str(folder), **({"report_to": "none", "disable_tqdm": True} | flags))


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ({}, "auto"),
        ({"bf16": True}, "bf16"),
        ({"precision": "bf16"}, "bf16"),
        ({"optim": "adafactor"}, "fp32"),
    ],
)
def test_flags_of_transformers_settle_the_precision(tmp_path, flags, precision):
    config = config_of(tmp_path, **flags)
    assert (config.precision, config.bf16) == (precision, False)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"precision": "fp8"}, "precision must be one of auto, fp32, bf16, not fp8"),
        ({"precision": "fp32", "bf16": True}, "--bf16 contradicts --precision=fp32"),
        ({"fp16": True}, "--fp16=True is not supported"),
        ({"precision": "bf16", "fp16": True}, "--fp16"),
        ({"precision": "bf16", "optim": "adafactor"}, "--optim=adafactor"),
    ],
)
def test_formats_that_do_not_go_together_are_told(tmp_path, flags, words):
    with pytest.raises(ConfigError, match=words):
        config_of(tmp_path, **flags)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": len(tokenizer)}
    return disable_dropout(GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=1, pad_token_id=0)))


def preferences(count):
    words = ["red", "green", "blue"]
    return [
        Preference(prompt="the cat ", a=f"sees {words[i % 3]} gold", b=f"sees {words[i % 2]}", id=str(i), mu=1.0)
        for i in range(count)
    ]


def flags_of_run(**flags):
    shared = {"precision": "bf16", "learning_rate": 3e-3, "per_device_train_batch_size": 4, "max_grad_norm": 0.5}
    return shared | {"logging_steps": 2, "weight_decay": 0.1, "lr_scheduler_type": "linear"} | flags


@pytest.mark.parametrize("use_peft", [False, True])
def test_the_best_model_is_kept_in_float32(model, tokenizer, tmp_path, use_peft):
    config = config_of(tmp_path, **flags_of_run(use_peft=use_peft, lora_r=4))
    seen = []
    model.transformer.h[0].register_forward_hook(lambda *call: seen.append(call[2][0].dtype))
    result = train_reward_model(config, model, tokenizer, preferences(24), preferences(8))
    assert torch.bfloat16 in seen
    weights = dict(result.model.model.named_parameters())
    assert {p.dtype for p in weights.values()} == {torch.float32}
    head = weights["score.weight"]
    assert not torch.equal(head, head.bfloat16().float())  # a master, not a rounded weight
    best = latest_checkpoint(tmp_path / "checkpoints").state["weights"]
    if not use_peft:  # the held-out loss falls all the time, so the last evaluation was the best
        torch.testing.assert_close(best["score.weight"], head, atol=0, rtol=0)
    result.model.save(tmp_path / "saved")
    texts = ["the cat sees gold", "the cat sees"]
    loaded = RewardModel.load(tmp_path / "saved")
    torch.testing.assert_close(loaded.raw_scores(texts), result.model.raw_scores(texts), atol=1e-6, rtol=0)


def test_a_resumed_run_ends_as_one_that_nothing_stopped(model, tokenizer, tmp_path):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    finals = []
    for run in ("whole", "again"):
        model.float().load_state_dict(state)
        flags = flags_of_run(save_strategy="steps", save_steps=3, save_total_limit=None, load_best_model_at_end=False)
        resume = str(tmp_path / "checkpoints" / "step-3") if run == "again" else None
        config = config_of(tmp_path, **flags, resume_from_checkpoint=resume)
        result = train_reward_model(config, model, tokenizer, preferences(24), preferences(8))
        finals.append({name: value.clone() for name, value in result.model.model.state_dict().items()})
    for name, value in finals[0].items():
        assert torch.equal(finals[1][name], value), name


def test_scores_of_bf16_weights_are_float32(model, tokenizer):
    plain = RewardModel(model, tokenizer).raw_scores(["the cat sees gold"])
    rounded = RewardModel(model.bfloat16(), tokenizer).raw_scores(["the cat sees gold"])
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, plain, atol=2e-2, rtol=2e-2)


def test_auto_is_float32_for_a_narrow_model(model, tmp_path):
    trainer = RewardTrainer(model, config_of(tmp_path, eval_strategy="no"), pad_token_id=0)
    assert trainer.dtype == torch.float32


def test_an_encoder_decoder_trains_whose_two_halves_read_one_table(make_tokenizer, tmp_path):
    """BART wants an EOS in every text, so its prefixes are not shared, and has two modules around its table."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    torch.manual_seed(0)
    sizes = {f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in LAYERS.items()}
    shared = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 1}
    model = BartForSequenceClassification(BartConfig(d_model=32, num_labels=1, **sizes, **shared))
    table = model.get_input_embeddings().weight.detach().clone()
    config = config_of(tmp_path, **flags_of_run())
    result = train_reward_model(config, disable_dropout(model), tokenizer, preferences(24), preferences(8))
    trained = result.model.model.get_input_embeddings().weight
    assert trained.dtype == torch.float32
    assert not torch.equal(trained, table)
    assert torch.isfinite(result.rewards).all()
