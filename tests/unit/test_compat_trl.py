"""TRL's interface: its names, defaults, keys and complaints, over this project's PPO."""

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.tracking import GeneralTracker
from datasets import Dataset
from facts import assert_names
from grids import slow_but
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import HfArgumentParser

from deep_rlhf.algorithms.ppo import PPO
from deep_rlhf.compat.trl import (
    AdaptiveKLController,
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    FixedKLController,
    LengthSampler,
    PPOConfig,
    PPOTrainer,
    create_reference_model,
    respond_to_batch,
    set_seed,
)
from deep_rlhf.errors import ConfigError, ModelError, RewardError
from deep_rlhf.models.critic import Critic
from deep_rlhf.models.policy import Policy, Reference
from deep_rlhf.rollout.collect import collect
from deep_rlhf.runtime.processes import Runtime
from deep_rlhf.types import Completions

PAD, EOS = 0, 1  # of the tests' tokenizer
QUERIES = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14]]
RESPONSES = [[20, 21, EOS], [22, 23, 24, 25], [26, EOS], [27]]
SCORES = [1.0, -0.5, 0.25, 2.0]
GREEDY = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": PAD}


def tensors(rows: list[Any]) -> list[torch.Tensor]:
    return [torch.tensor(row) for row in rows]


@pytest.fixture
def wrapped(make_model: Callable[..., Any]) -> Callable[..., Any]:
    """wrapped(kind, **options): a tiny model with a value head that says something."""

    def make(kind: str = "gpt2", **options: Any) -> Any:
        seq2seq = kind in ("t5", "bart")
        auto = AutoModelForSeq2SeqLMWithValueHead if seq2seq else AutoModelForCausalLMWithValueHead
        torch.manual_seed(3)
        return auto.from_pretrained(make_model(kind, **options), v_head_init_strategy="normal")

    return make


@pytest.fixture
def make_trainer(wrapped: Callable[..., Any], tokenizer: Any) -> Callable[..., PPOTrainer]:
    """make_trainer(kind, ref_model=…, …, **settings)"""

    def make(kind: str = "gpt2", *, ref_model: Any = None, optimizer: Any = None, **settings: Any) -> PPOTrainer:
        config = PPOConfig(**({"batch_size": 4, "mini_batch_size": 2, "learning_rate": 1e-2} | settings))
        return PPOTrainer(config, wrapped(kind), ref_model, tokenizer, optimizer=optimizer)

    return make


# Configuration


def test_fields_order_and_defaults_are_those_of_trl() -> None:
    expected = {
        "task_name": None, "model_name": "gpt2", "query_dataset": "imdb", "remove_unused_columns": True,
        "tracker_project_name": "trl", "steps": 20_000, "learning_rate": 1.41e-5, "adap_kl_ctrl": True,
        "init_kl_coef": 0.2, "kl_penalty": "kl", "target": 6.0, "horizon": 10_000.0, "gamma": 1.0, "lam": 0.95,
        "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1, "batch_size": 128, "forward_batch_size": None,
        "mini_batch_size": 128, "gradient_accumulation_steps": 1, "world_size": None, "ppo_epochs": 4,
        "max_grad_norm": None, "optimize_cuda_cache": None, "optimize_device_cache": False, "early_stopping": False,
        "target_kl": 1.0, "compare_steps": 1, "ratio_threshold": 10.0, "use_score_scaling": False,
        "use_score_norm": False, "score_clip": None, "whiten_rewards": False, "gradient_checkpointing": False,
        "backward_batch_size": 128, "dataset_num_proc": None,
    }  # fmt: skip
    config = PPOConfig()
    assert {name: getattr(config, name) for name in expected} == expected
    order = [field.name for field in dataclasses.fields(PPOConfig)]
    assert [name for name in order if name in expected] == list(expected)
    assert order[:4] == ["exp_name", "seed", "log_with", "task_name"]
    assert config.total_ppo_epochs == 157  # ⌈20,000 / 128⌉
    config.learning_rate = 1.0  # scripts change it


def test_a_command_line_reads_it() -> None:
    arguments = [
        "--batch_size=8",
        "--mini_batch_size=4",
        "--adap_kl_ctrl=False",
        '--tracker_kwargs={"wandb": {"a": 1}}',
    ]
    (config,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(arguments)
    assert (config.batch_size, config.adap_kl_ctrl, config.tracker_kwargs) == (8, False, {"wandb": {"a": 1}})
    assert config.to_dict()["tracker_kwargs/wandb/a"] == 1
    assert config.to_dict()["backward_batch_size"] == 4


def test_old_names_are_translated() -> None:
    config = PPOConfig(batch_size=8, forward_batch_size=2, optimize_cuda_cache=True)
    assert (config.mini_batch_size, config.backward_batch_size, config.optimize_device_cache) == (2, 2, True)
    with pytest.raises(ValueError, match="Both `optimize_device_cache` and `optimize_cuda_cache`"):
        PPOConfig(optimize_cuda_cache=True, optimize_device_cache=True)


def test_batch_sizes_of_one_process_become_those_of_all() -> None:
    native = PPOConfig(batch_size=8, mini_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=None).native(3)
    assert (native.batch_size, native.mini_batch_size, native.optimizer_batch_size) == (24, 6, 12)
    assert native.forward_batch_size == 2
    assert native.max_grad_norm is None


def test_compare_steps_without_a_repository_is_left_out_as_trl_does() -> None:
    assert PPOConfig(compare_steps=5).native(1).compare_steps == 1
    assert PPOConfig(compare_steps=5, push_to_hub_if_best_kwargs={"repo_id": "me/best"}).native(1).compare_steps == 5


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"batch_size": 6, "mini_batch_size": 4}, ValueError, "`batch_size` must be a multiple"),
        ({"use_score_norm": True}, ConfigError, "use_score_norm does nothing without use_score_scaling"),
        ({"kl_penalty": "cosine"}, ConfigError, "kl_penalty must be one of kl, abs, mse, full"),
        ({"push_to_hub_if_best_kwargs": {"private": True}}, ConfigError, "needs a repo_id"),
        ({"lam": 1.5}, ConfigError, "lam must be at least 0 and at most 1"),
    ],
)
def test_impossible_settings_are_refused_at_once(settings: dict[str, Any], error: type, sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        PPOConfig(**settings)


# Small parts


def test_lengths_run_up_to_but_not_including_the_last() -> None:
    set_seed(0)
    drawn = [LengthSampler(2, 5)() for _ in range(100)]
    assert set(drawn) == {2, 3, 4}
    set_seed(0)
    assert drawn == [LengthSampler(2, 5)() for _ in range(100)]


def test_kl_controllers() -> None:
    adaptive, fixed = AdaptiveKLController(0.2, 6.0, 10_000.0), FixedKLController(0.2)
    adaptive.update(6.6, 256)  # 0.2 · (1 + 0.1 · 0.0256)
    assert adaptive.value == pytest.approx(0.2 * 1.00256)
    adaptive.update(60.0, 256)  # clipped to + 0.2
    assert adaptive.value == pytest.approx(0.2 * 1.00256 * 1.00512)
    fixed.update(60.0, 256)
    assert fixed.value == 0.2


def test_respond_to_batch_is_exact_in_length_and_follows_top_k(wrapped: Callable[..., Any]) -> None:
    model, queries = wrapped(), torch.tensor([[5, 6, 7], [8, 9, 10]])
    best = respond_to_batch(model, queries, txt_len=4, top_k=1)
    expected = queries
    for _ in range(4):
        expected = torch.cat([expected, model(expected)[0][:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(best, expected[:, 3:])
    assert respond_to_batch(model, queries, txt_len=7, top_p=0.9).shape == (2, 7)


# Models


def test_the_head_is_zero_unless_it_is_asked_to_be_random(make_model: Callable[..., Any]) -> None:
    auto, model = AutoModelForCausalLMWithValueHead, make_model("gpt2")
    assert not auto.from_pretrained(model).v_head.summary.weight.any()
    torch.manual_seed(0)
    head = auto.from_pretrained(model, v_head_init_strategy="normal", v_head_initializer_range=0.5).v_head.summary
    assert float(head.weight.std()) == pytest.approx(0.5, rel=0.4)
    assert not head.bias.any()
    with pytest.raises(ValueError, match="v_head_init_strategy must be None"):
        auto.from_pretrained(model, v_head_init_strategy="xavier")


@pytest.mark.parametrize("kind", slow_but(["gpt2", "t5"], ["gpt2", "llama", "t5", "bart"]))
def test_forward_gives_logits_loss_and_values(wrapped: Callable[..., Any], kind: str) -> None:
    model, ids = wrapped(kind).eval(), torch.tensor([[5, 6, 7, 8]])
    more = {"decoder_input_ids": ids[:, :3]} if kind in ("t5", "bart") else {}
    logits, loss, values = model(ids, attention_mask=torch.ones_like(ids), **more)
    plain = model.pretrained_model(input_ids=ids, output_hidden_states=True, **more)
    torch.testing.assert_close(logits, plain.logits)
    states = plain.decoder_hidden_states[-1] if more else plain.hidden_states[-1]
    torch.testing.assert_close(values, states @ model.v_head.summary.weight[0] + model.v_head.summary.bias)
    assert loss is None
    assert values.shape == ((1, 3) if more else (1, 4))
    labels = {"labels": ids} if not more else {"labels": ids[:, :3]}
    assert model(ids, **labels)[1] > 0
    assert len(model(ids, return_past_key_values=True, **more)) == 4


def test_a_saved_model_is_plain_and_brings_its_head_back(wrapped: Callable[..., Any], tmp_path: Path) -> None:
    model = wrapped()
    model.save_pretrained(tmp_path)
    assert not any(name.startswith("v_head") for name in load_file(tmp_path / "model.safetensors"))
    reopened = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path))
    assert reopened.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in reopened.state_dict().items())
    assert "v_head.summary.weight" in model.state_dict()
    assert "transformer.wte.weight" in model.state_dict()
    assert reopened.config.n_embd == 32
    assert not reopened.is_peft_model


@pytest.mark.parametrize("sharded", [False, True])
def test_a_head_that_trl_saved_among_the_weights_is_found(
    wrapped: Callable[..., Any], tmp_path: Path, sharded: bool
) -> None:
    model = wrapped()
    model.save_pretrained(tmp_path)
    (tmp_path / "v_head.safetensors").unlink()
    weights = load_file(tmp_path / "model.safetensors")
    head = {f"v_head.summary.{name}": value.detach() for name, value in model.v_head.summary.named_parameters()}
    metadata = {"format": "pt"}
    if sharded:
        (tmp_path / "model.safetensors").unlink()
        shards = {"model-1.safetensors": weights, "model-2.safetensors": head}
        for file, content in shards.items():
            save_file(content, tmp_path / file, metadata)
        weight_map = {name: file for file, content in shards.items() for name in content}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(weights | head, tmp_path / "model.safetensors", metadata)
    reopened = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path))
    assert torch.equal(reopened.v_head.summary.weight, model.v_head.summary.weight)


@pytest.mark.parametrize(
    ("damage", "facts"),
    [
        ({"n_layer": 1}, ("layers", "transformer.h.1.attn.c_attn.weight")),
        ({"n_layer": 3}, ("lacks", "transformer.h.2.attn.c_attn.bias")),
        ({"n_embd": "32"}, ("n_embd",)),
        ({"model_type": 5}, ("config.json", "model_type")),
        (b"cut", ("model.safetensors", "cut off")),
        (b"", ("model.safetensors", "empty")),
    ],
    ids=str,
)
def test_a_damaged_model_is_one_sentence(
    damage: Any, facts: tuple[str, ...], make_model: Callable[..., Any], tmp_path: Path
) -> None:
    AutoModelForCausalLMWithValueHead(make_model("gpt2")).save_pretrained(tmp_path)
    if isinstance(damage, bytes):
        (tmp_path / "model.safetensors").write_bytes(damage)
    else:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(ModelError) as error:
        AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path))
    assert_names(error.value, *facts)


def test_pickled_weights_and_other_objects_are_refused(
    make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("gpt2").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="Only safetensors"):
        AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path), use_safetensors=False)
    with pytest.raises(ValueError, match=r"string.* PreTrainedModel"):
        AutoModelForCausalLMWithValueHead.from_pretrained(3)
    with pytest.raises(ValueError, match="language model head"):
        AutoModelForCausalLMWithValueHead.from_pretrained(make_model("gpt2").transformer)
    with pytest.raises(ValueError, match="reward_adapter is not supported"):
        AutoModelForCausalLMWithValueHead.from_pretrained(make_model("gpt2"), reward_adapter="folder")


def test_a_reference_is_a_frozen_copy_that_shares_its_first_layers(wrapped: Callable[..., Any]) -> None:
    model = wrapped()
    whole = create_reference_model(model)
    assert not any(parameter.requires_grad for parameter in whole.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    shared = create_reference_model(model, num_shared_layers=1)
    mine, theirs = model.pretrained_model.transformer, shared.pretrained_model.transformer
    assert theirs.wte.weight is mine.wte.weight
    assert theirs.h[0].mlp.c_fc.weight is mine.h[0].mlp.c_fc.weight
    assert not mine.h[0].mlp.c_fc.weight.requires_grad
    assert theirs.h[1].mlp.c_fc.weight is not mine.h[1].mlp.c_fc.weight
    assert torch.equal(theirs.h[1].mlp.c_fc.weight, mine.h[1].mlp.c_fc.weight)
    assert mine.h[1].mlp.c_fc.weight.requires_grad
    create_reference_model(model, 1, "transformer.h.{layer}")
    for arguments in [(2,), (1, "decoder.block.{layer}")]:
        with pytest.raises(ValueError, match="Layer pattern"):
            create_reference_model(model, *arguments)


# Sampling


@pytest.mark.parametrize("kind", slow_but(["gpt2", "t5"], ["gpt2", "llama", "t5"]))
def test_generating_in_batches_is_generating_one_by_one(make_trainer: Callable[..., PPOTrainer], kind: str) -> None:
    trainer = make_trainer(kind)
    queries = tensors(QUERIES)
    together = trainer.generate(queries, batch_size=3, **GREEDY)
    seq2seq = kind == "t5"
    for query, response in zip(queries, together, strict=True):
        alone = trainer.generate(query, **GREEDY)[0]
        start = 1 if seq2seq else len(query)
        ends = (alone[start:] == EOS).nonzero()
        expected = alone[: start + int(ends[0]) + 1] if len(ends) else alone
        assert torch.equal(response, expected)
    without = trainer.generate(queries, return_prompt=False, **GREEDY)
    for query, response, whole in zip(queries, without, together, strict=True):
        assert torch.equal(response, whole if seq2seq else whole[len(query) :])
    one = trainer.generate(queries[2], return_prompt=False, **GREEDY)
    assert torch.equal(one[0][: len(without[2])], without[2])


def test_responses_end_with_their_eos(make_trainer: Callable[..., PPOTrainer]) -> None:
    trainer = make_trainer()
    torch.manual_seed(0)
    responses = trainer.generate(
        tensors(QUERIES) * 20, batch_size=80, return_prompt=False, do_sample=True, top_k=0, max_new_tokens=20,
        pad_token_id=PAD,
    )  # fmt: skip
    ended = [row for row in responses if EOS in row]
    assert 0 < len(ended) < 80
    assert all((row == EOS).sum() == 1 and row[-1] == EOS for row in ended)
    assert all(len(row) == 20 for row in responses if EOS not in row)


def test_the_reference_responds_too(make_trainer: Callable[..., PPOTrainer]) -> None:
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.pretrained_model.transformer.wpe.weight.neg_()
    ours, theirs = trainer.generate(tensors(QUERIES), generate_ref_response=True, **GREEDY)
    again = trainer.ref_model.generate(input_ids=torch.tensor([QUERIES[2]]), **GREEDY)[0]
    assert torch.equal(theirs[2], again[: len(theirs[2])])
    assert any(not torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_a_length_sampler_sets_the_length(make_trainer: Callable[..., PPOTrainer]) -> None:
    options = GREEDY | {"eos_token_id": -1}
    responses = make_trainer().generate(
        tensors(QUERIES), LengthSampler(3, 4), return_prompt=False, batch_size=2, **options
    )
    assert all(len(row) == 3 or row[-1] == EOS for row in responses)


# A step


def by_hand(trainer: PPOTrainer, queries: Any, responses: Any) -> Completions:
    """The records of a batch, written down row by row."""
    seq2seq = trainer.is_encoder_decoder
    prompt_width, response_width = max(map(len, queries)), max(map(len, responses))
    rows: dict[str, list[list[int]]] = {"prompt_ids": [], "prompt_mask": [], "response_ids": [], "response_mask": []}
    for query, response in zip(queries, responses, strict=True):
        gap, rest = [0] * (prompt_width - len(query)), [0] * (response_width - len(response))
        real = [1] * len(query)
        rows["prompt_ids"].append(query + gap if seq2seq else gap + query)
        rows["prompt_mask"].append(real + gap if seq2seq else gap + real)
        rows["response_ids"].append(response + rest)
        rows["response_mask"].append([1] * len(response) + rest)
    masks = {name: torch.tensor(rows[name]).bool() for name in ("prompt_mask", "response_mask")}
    ids = {name: torch.tensor(rows[name]) for name in ("prompt_ids", "response_ids")}
    empty = torch.zeros(masks["response_mask"].shape)
    return Completions(
        prompts=[""] * len(queries),
        responses=[""] * len(queries),
        **ids,
        **masks,
        sampler_logprobs=empty,
        entropy=empty,
        finished=torch.tensor([row[-1] == EOS for row in responses]),
        group=torch.arange(len(queries)),
    )


@pytest.mark.parametrize("kind", slow_but(["gpt2", "t5"], ["gpt2", "llama", "t5", "lora"]))
@pytest.mark.parametrize("settings", [{}, {"kl_penalty": "full", "whiten_rewards": True, "max_grad_norm": 0.5}])
def test_a_step_is_an_update_of_our_ppo(
    make_trainer: Callable[..., PPOTrainer], tokenizer: Any, kind: str, settings: dict[str, Any]
) -> None:
    trainer = make_trainer(kind, **settings)
    twin = copy.deepcopy(trainer.model)
    untrained = twin.v_head.summary.weight.detach().clone()
    policy = Policy(twin.pretrained_model)
    learner = PPO(
        trainer.config.native(1), policy, Runtime(), updates=9, scorer=None, tokenizer=tokenizer,
        critic=Critic(twin.v_head.summary),
    )  # fmt: skip
    rollout = collect(
        by_hand(trainer, QUERIES, RESPONSES), policy, Reference(policy), torch.tensor(SCORES).unsqueeze(1),
        torch.tensor(SCORES), temperature=1.0, kl_penalty=trainer.config.kl_penalty, critic=learner.critic, max_rows=2,
    )  # fmt: skip
    expected = learner.learn(rollout, kl_coef=0.2, update=0)

    given = [[PAD, *row] for row in RESPONSES] if kind == "t5" else RESPONSES  # after its start token
    stats = trainer.step(tensors(QUERIES), tensors(given), tensors(SCORES))

    for name, weight in twin.named_parameters():
        torch.testing.assert_close(trainer.model.get_parameter(name), weight, atol=1e-6, rtol=1e-6)
    for theirs, ours in {
        "ppo/loss/policy": "policy_loss",
        "ppo/loss/value": "value_loss",
        "ppo/loss/total": "loss",
        "ppo/policy/approxkl": "approx_kl",
        "ppo/policy/clipfrac": "policy_clip_fraction",
        "ppo/val/clipfrac": "value_clip_fraction",
        "ppo/val/vpred": "value_mean",
        "ppo/val/var_explained": "explained_variance",
        "ppo/learning_rate": "learning_rate",
    }.items():
        assert stats[theirs] == pytest.approx(expected[ours], abs=1e-6), theirs
    assert not torch.equal(trainer.model.v_head.summary.weight, untrained)


def test_the_figures_of_a_step(make_trainer: Callable[..., PPOTrainer], wrapped: Callable[..., Any]) -> None:
    trainer = make_trainer(ref_model=wrapped(seed=5), init_kl_coef=0.3)
    queries, responses = tensors(QUERIES), tensors(RESPONSES)

    def logprobs(model: Any) -> list[torch.Tensor]:
        rows = []
        for query, response in zip(queries, responses, strict=True):
            ids = torch.cat([query, response])
            steps = model(ids.unsqueeze(0))[0][0].log_softmax(-1)[len(query) - 1 : -1]
            rows.append(steps.gather(1, response.unsqueeze(1)).squeeze(1))
        return rows

    with torch.no_grad():
        own, reference = logprobs(trainer.model), logprobs(trainer.ref_model)
        values = torch.cat(
            [
                trainer.model(torch.cat([query, response]).unsqueeze(0))[2][0][len(query) - 1 : -1]
                for query, response in zip(queries, responses, strict=True)
            ]
        )
    kl = torch.stack([(mine - theirs).sum() for mine, theirs in zip(own, reference, strict=True)])
    tokens = sum(map(len, RESPONSES))
    stats = trainer.step(queries, responses, tensors(SCORES))
    for name, value in {
        "objective/kl": kl.mean(),
        "objective/kl_coef": 0.3,
        "objective/entropy": -torch.stack([row.sum() for row in own]).mean(),
        "ppo/mean_non_score_reward": -0.3 * kl.sum() / tokens,
        "ppo/mean_scores": 0.6875,
        "ppo/std_scores": torch.tensor(SCORES).std(),
        "ppo/val/vpred": values.mean(),
        "ppo/val/var": values.var(),
        "ppo/val/var_explained": 1 - stats["ppo/val/error"] / stats["ppo/returns/var"],
        "tokens/queries_len_mean": 2.5,
        "tokens/queries_len_std": torch.tensor([3.0, 1.0, 4.0, 2.0]).std(),
        "tokens/responses_len_mean": 2.5,
    }.items():
        assert stats[name] == pytest.approx(float(value), abs=1e-4 if "explained" not in name else 1), name
        assert f"{stats[name]:.3f}"
    assert stats["objective/kl_dist"].tolist() == pytest.approx(kl.tolist(), abs=1e-4)
    assert stats["tokens/responses_dist"].tolist() == [3, 4, 2, 1]
    assert stats["ppo/policy/advantages"].shape == (tokens,)
    assert 0 < stats["ppo/policy/entropy"] < 5
    assert stats["time/ppo/total"] >= stats["time/ppo/optimize_step"] > 0
    assert trainer.kl_ctl.value != 0.3  # it adapted


def test_padding_after_the_end_changes_nothing(make_trainer: Callable[..., PPOTrainer]) -> None:
    plain, filled, masked = make_trainer(), make_trainer(), make_trainer()
    fill = [[*row, EOS, PAD, PAD] if row[-1] == EOS else row for row in RESPONSES]
    first = plain.step(tensors(QUERIES), tensors(RESPONSES), tensors(SCORES))
    second = filled.step(tensors(QUERIES), tensors(fill), tensors(SCORES))
    longer = [[*row, 30, 31] for row in RESPONSES]
    masks = [[1] * len(row) + [0, 0] for row in RESPONSES]
    third = masked.step(tensors(QUERIES), tensors(longer), tensors(SCORES), tensors(masks))
    assert first["ppo/loss/total"] == second["ppo/loss/total"] == third["ppo/loss/total"]
    assert second["tokens/responses_dist"].tolist() == third["tokens/responses_dist"].tolist() == [3, 4, 2, 1]


def test_tokens_after_an_eos_count_where_they_are_text(make_trainer: Callable[..., PPOTrainer]) -> None:
    stats = make_trainer().step(tensors(QUERIES), tensors([[20, EOS, 21], *RESPONSES[1:]]), tensors(SCORES))
    assert stats["tokens/responses_dist"].tolist() == [3, 4, 2, 1]


def test_scores_are_scaled_by_all_seen_so_far(make_trainer: Callable[..., PPOTrainer]) -> None:
    trainer = make_trainer(use_score_scaling=True, use_score_norm=True, score_clip=0.5)
    batch = (tensors(QUERIES), tensors(RESPONSES))
    trainer.step(*batch, tensors([0.0, 0.0, 0.0, 4.0]))
    stats = trainer.step(*batch, tensors([4.0, 4.0, 4.0, 0.0]))
    # all eight have mean 2 and unbiased standard deviation √(8 · 4 / 7) = 2.14: ± 0.94, clipped to ± 0.5
    assert stats["ppo/mean_scores"] == pytest.approx(0.25, abs=1e-6)
    assert stats["ppo/std_scores"] == pytest.approx(0.5, abs=1e-6)


def test_checkpointing_activations_changes_nothing(make_trainer: Callable[..., PPOTrainer]) -> None:
    plain, checkpointed = make_trainer(), make_trainer(gradient_checkpointing=True)
    batch = (tensors(QUERIES), tensors(RESPONSES), tensors(SCORES))
    assert plain.step(*batch)["ppo/loss/total"] == pytest.approx(checkpointed.step(*batch)["ppo/loss/total"], abs=1e-6)
    for mine, theirs in zip(
        plain.generate(tensors(QUERIES), **GREEDY), checkpointed.generate(tensors(QUERIES), **GREEDY), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_a_reward_of_nan_never_reaches_the_weights(make_trainer: Callable[..., PPOTrainer]) -> None:
    trainer = make_trainer()
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(RewardError, match="reward of sample 1 is nan"):
        trainer.step(tensors(QUERIES), tensors(RESPONSES), tensors([0.0, float("nan"), 0.0, 1.0]))
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())


def test_a_reference_with_adapters_keeps_them(
    make_trainer: Callable[..., PPOTrainer], wrapped: Callable[..., Any]
) -> None:
    reference = wrapped("lora")
    ids = torch.tensor([QUERIES[0] + RESPONSES[0]])
    with torch.no_grad():
        steps = reference(ids)[0][0].log_softmax(-1)[2:-1]
    expected = steps.gather(1, torch.tensor(RESPONSES[0]).unsqueeze(1)).squeeze(1)
    stats = make_trainer(ref_model=reference).step(tensors(QUERIES), tensors(RESPONSES), tensors(SCORES))
    assert stats["objective/ref_logprobs"][0, :3].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


# Wrong use


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"queries": tensors(QUERIES[:3])},
            r"Batch size \(4\) does not match number of examples - but got 3 for: queries",
        ),
        ({"queries": torch.ones(4, 3)}, "queries must be a list of tensors - got <class 'torch.Tensor'>"),
        ({"responses": RESPONSES}, "Elements in responses must be tensors - got <class 'list'>"),
        ({"responses": tensors([[20], [21], [], [22]])}, r"Elements in responses must be token ids .* in number 2"),
        ({"queries": tensors([[row] for row in QUERIES])}, r"Elements in queries must be token ids .* shape \(1, 3\)"),
        ({"scores": SCORES}, "Elements in scores must be tensors - got <class 'float'>"),
        ({"scores": tensors([[1.0, 2.0]] * 4)}, "Scores must be 1-dimensional, one number each"),
        ({"response_masks": tensors([[1, 0, 1], [1] * 4, [1, 1], [1]])}, "A response mask must be"),
        ({"response_masks": tensors([[0, 0, 0], [1] * 4, [1, 1], [1]])}, "A response mask must be"),
        ({"response_masks": tensors([[1, 1], [1] * 4, [1, 1], [1]])}, "A response mask must be"),
    ],
)
def test_a_step_says_what_is_wrong(
    make_trainer: Callable[..., PPOTrainer], change: dict[str, Any], sentence: str
) -> None:
    given: dict[str, Any] = {"queries": tensors(QUERIES), "responses": tensors(RESPONSES), "scores": tensors(SCORES)}
    with pytest.raises(ValueError, match=sentence):
        make_trainer().step(**(given | change))


def test_a_trainer_says_what_is_wrong(
    wrapped: Callable[..., Any], make_model: Callable[..., Any], tokenizer: Any
) -> None:
    config, model = PPOConfig(batch_size=4, mini_batch_size=4), wrapped()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    for arguments, sentence in [
        ((config.native(1), model, None, tokenizer), "config must be a PPOConfig"),
        ((config, model, None, None), "tokenizer must be a PreTrainedTokenizerBase"),
        ((config, model.pretrained_model, None, tokenizer), "model must be an AutoModelFor…WithValueHead"),
        ((config, model, model.pretrained_model, tokenizer), "ref_model must be an AutoModelFor…WithValueHead or None"),
        ((config, model, model, tokenizer), "ref_model shares weights with the model"),
        ((config, model, None, tokenizer, None, None, None, None, scheduler), "give the trainer this optimizer, too"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            PPOTrainer(*arguments)
    with pytest.raises(ValueError, match=r"query_tensor.* token ids"):
        PPOTrainer(config, model, None, tokenizer).generate(torch.ones(2, 3, dtype=torch.int64), **GREEDY)


def test_a_scripts_own_adam_steps_a_model_in_bf16(wrapped: Callable[..., Any], tokenizer: Any) -> None:
    model = wrapped()
    model.pretrained_model.to(torch.bfloat16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    config = PPOConfig(batch_size=4, mini_batch_size=2)
    trainer = PPOTrainer(config, model, None, tokenizer, optimizer=optimizer)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer.step(tensors(QUERIES), tensors(RESPONSES), tensors(SCORES))
    assert trainer.optimizer is optimizer
    assert not all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert {parameter.dtype for parameter in model.pretrained_model.parameters()} == {torch.bfloat16}


def test_prompt_tuning_is_refused(make_model: Callable[..., Any], tokenizer: Any) -> None:
    from peft import PromptTuningConfig

    tuned = AutoModelForCausalLMWithValueHead.from_pretrained(
        make_model("gpt2"), peft_config=PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    with pytest.raises(ValueError, match="Prompt and prefix tuning"):
        PPOTrainer(PPOConfig(), tuned, None, tokenizer)


# Around a step


def test_the_dataloader_gives_whole_batches_of_the_columns_in_use(wrapped: Callable[..., Any], tokenizer: Any) -> None:
    rows = {"input_ids": [[5, 6]] * 10, "query": ["a"] * 10, "review": ["b"] * 10}

    def collator(data: list[dict[str, Any]]) -> dict[str, list[Any]]:
        return {key: [row[key] for row in data] for key in data[0]}

    for keep, columns in ((True, {"input_ids", "query"}), (False, {"input_ids", "query", "review"})):
        config = PPOConfig(batch_size=4, mini_batch_size=4, remove_unused_columns=keep)
        data = Dataset.from_dict(rows).with_format("torch")
        trainer = PPOTrainer(config, wrapped(), None, tokenizer, dataset=data, data_collator=collator)
        batches = list(trainer.dataloader)
        assert [len(batch["query"]) for batch in batches] == [4, 4]
        assert set(batches[0]) == columns
        assert torch.equal(batches[0]["input_ids"][0], torch.tensor([5, 6]))


def test_the_trainer_fills_in_the_configuration(make_trainer: Callable[..., PPOTrainer]) -> None:
    trainer = make_trainer("t5", gradient_accumulation_steps=2)
    config = trainer.config
    assert (config.world_size, config.is_encoder_decoder, config.is_peft_model) == (1, True, False)
    assert (config.global_batch_size, config.global_backward_batch_size) == (4, 4)
    assert trainer.accelerator.unwrap_model(trainer.model) is trainer.model
    assert trainer.current_device == trainer.accelerator.device
    assert not trainer.is_distributed
    assert trainer.dataloader is None


class Recorder(GeneralTracker):
    """Keeps what it is told."""

    name, requires_logging_directory, tracker = "recorder", False, None

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[dict[str, Any], int | None]] = []

    def store_init_configuration(self, values: dict[str, Any]) -> None: ...

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        self.logged.append((values, step))


def test_statistics_reach_the_tracker(make_trainer: Callable[..., PPOTrainer]) -> None:
    trainer, recorder = make_trainer(), Recorder()
    trainer.accelerator.trackers = [recorder]
    stats = trainer.step(tensors(QUERIES), tensors(RESPONSES), tensors(SCORES))
    batch = {"query": list("abcd"), "response": list("efgh"), "ref_rewards": tensors(SCORES)}
    trainer.log_stats(stats, batch, tensors(SCORES))
    logs, step = recorder.logged[0]
    assert step == 1
    assert logs["objective/kl"] == stats["objective/kl"]
    assert logs["env/reward_mean"] == pytest.approx(0.6875)
    assert logs["env/reward_std"] == pytest.approx(float(torch.tensor(SCORES).std()))
    assert logs["env/reward_dist"].tolist() == SCORES
    pytest.importorskip("wandb")
    trainer.config.log_with = "wandb"
    trainer.log_stats(stats, batch, torch.tensor(SCORES), columns_to_log=["query", "response", "ref_rewards"])
    table = recorder.logged[1][0]["game_log"]
    assert table.columns == ["query", "response", "ref_rewards", "reward"]
    assert table.data[1] == ["b", "f", -0.5, -0.5]
    with pytest.raises(ValueError, match=r"\['ref_response'\].* not present"):
        trainer.log_stats(stats, batch, tensors(SCORES), columns_to_log=["query", "ref_response"])


def test_the_best_policy_so_far_is_pushed(
    make_trainer: Callable[..., PPOTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[tuple[set[str], dict[str, Any]]] = []

    def push(folder: str, **options: Any) -> None:
        pushed.append(({path.name for path in Path(folder).iterdir()}, options))

    monkeypatch.setattr("deep_rlhf.compat.trl.models.push_folder", push)
    trainer = make_trainer(push_to_hub_if_best_kwargs={"repo_id": "me/best"})
    for score in (1.0, 0.5, 2.0):
        trainer.step(tensors(QUERIES), tensors(RESPONSES), tensors([score] * 4))
    assert len(pushed) == 2
    assert {"model.safetensors", "v_head.safetensors", "tokenizer.json"} <= pushed[0][0]
    assert pushed[0][1] == {"repo_id": "me/best"}
    trainer.model.push_to_hub("me/model", private=True)
    assert pushed[2][1] == {"repo_id": "me/model", "private": True}
    with pytest.raises(ConfigError, match=r"Hub.*\bcolour\b"):
        make_trainer(push_to_hub_if_best_kwargs={"repo_id": "me/best", "colour": "red"})


def test_adapters_on_a_model_that_is_open_already(make_model: Callable[..., Any], tokenizer: Any) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        make_model("gpt2"), peft_config=LoraConfig(r=2, task_type="CAUSAL_LM", fan_in_fan_out=True)
    )
    assert model.is_peft_model
    trainer = PPOTrainer(PPOConfig(batch_size=4, mini_batch_size=4, learning_rate=0.1), model, None, tokenizer)
    assert trainer.step(tensors(QUERIES), tensors(RESPONSES), tensors(SCORES))["objective/kl"] == 0
    assert abs(trainer.step(tensors(QUERIES), tensors(RESPONSES), tensors(SCORES))["objective/kl"]) > 1e-3
    _, theirs = trainer.generate(tensors(QUERIES), generate_ref_response=True, **GREEDY)
    with model.pretrained_model.disable_adapter():
        again = trainer.generate(tensors(QUERIES), **GREEDY)
    assert all(torch.equal(*pair) for pair in zip(theirs, again, strict=True))


def test_every_import_of_the_guide_works() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "from-trl.md").read_text(encoding="utf-8")
    lines = re.findall(r"`(from deep_rlhf\.compat\.trl[^`…]*)`", guide)
    assert len(lines) == guide.count("| `from trl")
    for line in lines:
        exec(line, {})
