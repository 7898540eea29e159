"""Options that save memory, compared with the runs that they must equal or approximate."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BertConfig, BertForSequenceClassification

from deep_rlhf import PPOConfig, PPOTrainer, RewardModel, UserError
from deep_rlhf.algorithms.online.build import open_policy, open_reference, open_scorer
from deep_rlhf.algorithms.trpo import TRPOConfig, TRPOTrainer
from deep_rlhf.models.policy import Policy, Reference
from deep_rlhf.models.quantisation import four_bit_layers
from deep_rlhf.rollout.collect import collect, complete, prompt_batch
from deep_rlhf.rollout.engine import Engine
from deep_rlhf.rollout.sampler import sampling_uniforms
from deep_rlhf.types import Rollout

PROMPTS = ["the cat sees", "red", "a very old dog finds the small house and not", "two fish", "moon or sun", "bad", "a"]
SMALL: dict[str, Any] = {"batch_size": 8, "steps": 32, "max_new_tokens": 6, "learning_rate": 3e-3}
CPU = torch.device("cpu")
NOT_THE_RESULT = ("tokens_per_second", "sampling_share_of_time", "memory_gb")

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    return [len(response) / 10 for response in responses]


def results(trainer: PPOTrainer) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k not in NOT_THE_RESULT} for row in trainer.history]


@pytest.fixture
def on_disk(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Callable[[str], str]:
    """Folders with a model, for what has to be loaded by name."""

    def write(kind: str) -> str:
        folder = tmp_path / kind
        make_model(kind).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return write


@pytest.fixture
def bert(tokenizer: Any) -> RewardModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = BertConfig(
            **{"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"intermediate_size": 64, "max_position_embeddings": 64, "num_labels": 1, "initializer_range": 0.2},
        )
        return RewardModel(BertForSequenceClassification(config), tokenizer)


def looked_at(policy: Policy, reference: Reference, tokenizer: Any, kl_penalty: Any) -> Rollout:
    prompts = prompt_batch(PROMPTS, tokenizer, policy.device)
    sampled = Engine(policy, eos_ids=[1]).sample(prompts, sampling_uniforms(0, 0, len(PROMPTS), 6))
    completions = complete(prompts, sampled, tokenizer)
    scores = torch.zeros(len(PROMPTS), 1)
    return collect(completions, policy, reference, scores, scores[:, 0], temperature=1.0, kl_penalty=kl_penalty)


@pytest.mark.parametrize("kl_penalty", ["kl", "full"])
@pytest.mark.parametrize(
    ("settings", "dtype", "atol"),
    [
        ({"frozen_device": "cpu"}, torch.float32, 0.0),
        ({"frozen_precision": "bf16"}, torch.bfloat16, 0.1),
        ({"precision": "bf16", "frozen_precision": "fp32"}, torch.float32, 0.1),
    ],
    ids=["in main memory", "in bf16", "in fp32 beside a policy in bf16"],
)
def test_the_reference_computes_in_its_format_the_same_as_a_plain_copy(
    settings: dict[str, Any], dtype: torch.dtype, atol: float, kl_penalty: str, make_model: Any, tokenizer: Any
) -> None:
    policy = open_policy(make_model("llama"), CPU, PPOConfig(**({"precision": "fp32"} | settings)))
    own = {name: weight.dtype for name, weight in policy.named_parameters()}
    plain, told = Reference(policy), open_reference(policy, PPOConfig(**({"precision": "fp32"} | settings)))
    with told.model() as frozen:
        assert {weight.dtype for weight in frozen.parameters()} == {dtype}
        assert not any(weight.requires_grad for weight in frozen.parameters())
    assert {name: weight.dtype for name, weight in policy.named_parameters()} == own
    expected, found = (looked_at(policy, each, tokenizer, kl_penalty) for each in (plain, told))
    torch.testing.assert_close(found.ref_logprobs, expected.ref_logprobs, atol=atol, rtol=0)
    torch.testing.assert_close(found.kl, expected.kl, atol=atol, rtol=0)
    if atol:
        assert not torch.equal(found.ref_logprobs, expected.ref_logprobs)


def test_a_copied_reference_does_not_change_with_the_policy(make_model: Any) -> None:
    policy = open_policy(make_model("gpt2"), CPU, PPOConfig())
    reference = open_reference(policy, PPOConfig())
    with reference.model() as frozen:
        assert frozen.language_model.lm_head.weight is frozen.language_model.transformer.wte.weight  # tied, as it was
        before = {name: weight.clone() for name, weight in frozen.named_parameters()}
        with torch.no_grad():
            for weight in policy.parameters():
                weight.add_(1.0)
        assert all(torch.equal(before[name], weight) for name, weight in frozen.named_parameters())


def test_with_adapters_the_reference_is_the_policy(make_model: Any) -> None:
    config = PPOConfig(use_peft=True, frozen_precision="bf16")
    policy = open_policy(make_model("llama"), CPU, config)
    with open_reference(policy, config).model() as frozen:
        assert frozen is policy


def test_a_reward_model_in_another_format_is_a_copy(bert: RewardModel) -> None:
    weights = {name: weight.detach().clone() for name, weight in bert.model.named_parameters()}
    scorer = open_scorer(bert, CPU, PPOConfig(frozen_precision="bf16"))
    assert isinstance(scorer, RewardModel)
    assert {weight.dtype for weight in scorer.model.parameters()} == {torch.bfloat16}
    assert all(weight.requires_grad for weight in bert.model.parameters())  # it may go on being trained
    assert all(torch.equal(weights[name], weight) for name, weight in bert.model.named_parameters())
    expected, found = (each.score(PROMPTS, PROMPTS) for each in (bert, scorer))
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("settings", [{}, {"frozen_precision": "fp32"}, {"frozen_device": "cpu"}])
def test_a_reward_model_that_fits_is_used_as_it_is(settings: dict[str, Any], bert: RewardModel) -> None:
    assert open_scorer(bert, CPU, PPOConfig(**settings)) is bert


def test_a_run_with_frozen_models_on_the_cpu_is_the_same_run(make_model: Any, tokenizer: Any, bert: Any) -> None:
    runs = []
    for settings in ({}, {"frozen_device": "cpu", "frozen_precision": "fp32"}):
        config = PPOConfig(**SMALL, **settings)
        trainer = PPOTrainer(config, model=make_model("gpt2"), tokenizer=tokenizer, prompts=PROMPTS, reward=bert)
        trainer.train()
        runs.append(results(trainer))
    assert runs[0] == runs[1]


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_trained_in_4_bits_is_saved_as_it_computes(
    kind: str, precision: Any, on_disk: Any, tokenizer: Any, tmp_path: Path
) -> None:
    settings = {"load_in_4bit": True, "use_peft": True, "use_seq2seq": kind == "t5", "precision": precision}
    config = PPOConfig(**SMALL, **settings, model_name=on_disk(kind))
    trainer = PPOTrainer(config, prompts=PROMPTS, reward=reward)
    assert len(four_bit_layers(trainer._policy)) == {"gpt2": 8, "llama": 14, "t5": 28}[kind]
    history = trainer.train()
    assert history[0]["kl"] == pytest.approx(0, abs=0.05 if precision == "bf16" else 1e-4)  # the base is the reference
    assert history[0]["grad_norm"] > 0
    trainer.save(tmp_path / "model")
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    saved = auto.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert not hasattr(saved.config, "quantization_config")
    before = auto.from_pretrained(config.model_name, dtype=torch.float32).eval()
    assert {n: w.shape for n, w in saved.named_parameters()} == {n: w.shape for n, w in before.named_parameters()}
    ids = torch.tensor([[5, 9, 30, 12]])
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if kind == "t5" else {})

    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            return model(**inputs).logits.float()

    trained = logits(trainer._policy.model)
    atol = 1e-4 if precision == "fp32" else 0.05  # of logits with a deviation of about 0.3 (T5) to 2
    torch.testing.assert_close(logits(saved), trained, atol=atol, rtol=0)
    with trainer._reference.model() as base:
        assert (logits(base.model) - trained).abs().max() > 2 * atol  # the adapters do something …
        assert (logits(base.model) - logits(before)).abs().max() > 2 * atol  # … and so did 4 bits


@needs_bitsandbytes
def test_4_bits_are_a_fraction_of_the_memory(on_disk: Any) -> None:
    config = PPOConfig(load_in_4bit=True, use_peft=True, model_name=on_disk("llama"))
    trainer = PPOTrainer(config, prompts=PROMPTS, reward=reward)
    for layer in four_bit_layers(trainer._policy).values():
        assert layer.weight.nbytes * 8 == 4 * layer.in_features * layer.out_features


@needs_bitsandbytes
@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw_8bit"},
        {"optimizer": "adamw_8bit", "precision": "bf16", "frozen_precision": "fp32"},
        {"load_in_4bit": True, "use_peft": True, "optimizer": "adamw_8bit"},
        {"load_in_4bit": True, "use_peft": True, "critic": "separate", "gradient_checkpointing": True},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_a_resumed_run_ends_the_same(settings: dict[str, Any], on_disk: Any, tmp_path: Path) -> None:
    name = on_disk("gpt2")

    def trainer(folder: str, **more: Any) -> PPOTrainer:
        config = PPOConfig(**SMALL, **settings, **more, model_name=name, save_freq=2, output_dir=str(tmp_path / folder))
        return PPOTrainer(config, prompts=PROMPTS, reward=reward)

    whole = trainer("whole")
    whole.train()
    trainer("stopped").train(updates=2)
    resumed = trainer("stopped", resume=True)
    assert len(resumed.history) == 2
    resumed.train()
    assert results(resumed) == results(whole)
    expected = dict(whole._policy.named_parameters())
    assert all(torch.equal(expected[name], weight) for name, weight in resumed._policy.named_parameters())


@needs_bitsandbytes
def test_trpo_differentiates_4_bit_layers_twice(on_disk: Any) -> None:
    settings = SMALL | {"batch_size": 32, "steps": 64}
    config = TRPOConfig(**settings, load_in_4bit=True, use_peft=True, model_name=on_disk("llama"))
    history = TRPOTrainer(config, prompts=PROMPTS, reward=reward).train()
    assert all(row["step_fraction"] > 0 for row in history)


@needs_bitsandbytes
def test_a_model_that_is_loaded_already_is_not_quantised(make_model: Any, tokenizer: Any) -> None:
    config = PPOConfig(load_in_4bit=True, use_peft=True)
    with pytest.raises(UserError, match=r"load_in_4bit.*loaded.*\bname\b"):
        PPOTrainer(config, model=make_model("gpt2"), tokenizer=tokenizer, prompts=PROMPTS, reward=reward)


def test_the_trainer_opens_the_reference_in_its_format(make_model: Any, tokenizer: Any) -> None:
    config = PPOConfig(**SMALL, precision="fp32", frozen_precision="bf16")
    trainer = PPOTrainer(config, model=make_model("gpt2"), tokenizer=tokenizer, prompts=PROMPTS, reward=reward)
    with trainer._reference.model() as frozen:
        assert {weight.dtype for weight in frozen.parameters()} == {torch.bfloat16}
    assert trainer._policy.dtype == torch.float32
    assert trainer.train()[0]["kl"] == pytest.approx(0, abs=0.1)
