"""DPO must find π₀ exp(r/β), its loss must be what the pairs say, and neither batches nor resuming may change a run."""

import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from grids import slow_but
from torch import Tensor

from deep_rlhf.algorithms.supervised.dpo import DPOConfig, ResponsePolicy, dpo_metrics, train_dpo
from deep_rlhf.errors import DataError, UserError
from deep_rlhf.runtime.checkpoint import read_checkpoint
from deep_rlhf.types import Preference, RowReport

RESPONSES = ["red", "green", "blue", "black sun", "white", "gold moon", "grey", "pink"]  # of one and two tokens
REWARDS = torch.tensor([1.0, -1.0, 0.5, 0.0, -0.5, 0.8, -0.2, 0.3], dtype=torch.float64)
BETA = 0.5
PROMPT = "the cat likes"


def config(folder: Path, **settings: Any) -> DPOConfig:
    common = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "template": "plain"}
    return DPOConfig(output_dir=str(folder), **({"eval_strategy": "no"} | common | settings))


def judged(count: int, seed: int) -> list[Preference]:
    """Pairs of RESPONSES, each judged once by a person of the Bradley–Terry kind."""
    rng = random.Random(seed)
    pairs = []
    for i in range(count):
        a, b = rng.sample(range(len(RESPONSES)), 2)
        a_wins = rng.random() < torch.sigmoid(REWARDS[a] - REWARDS[b]).item()
        pairs.append(Preference(prompt=PROMPT, a=RESPONSES[a], b=RESPONSES[b], mu=float(a_wins), id=str(i)))
    return pairs


def shares(count: int, seed: int) -> list[Preference]:
    """Every pair of RESPONSES with its exact probability, `count` times over."""
    return count * [
        Preference(prompt=PROMPT, a=RESPONSES[a], b=RESPONSES[b], mu=torch.sigmoid(REWARDS[a] - REWARDS[b]).item())
        for a, b in combinations(range(len(RESPONSES)), 2)
    ]


@torch.no_grad()
def whole_logprob(model: Any, tokenizer: Any, prompt: str, response: str) -> float:
    """log π(response EOS | prompt), by transformers' own forward on one unpadded sequence."""
    before, after = tokenizer(prompt).input_ids, [*tokenizer(response).input_ids, tokenizer.eos_token_id]
    if model.config.is_encoder_decoder:
        start = [model.config.decoder_start_token_id]
        ids = {"input_ids": torch.tensor([before]), "decoder_input_ids": torch.tensor([start + after[:-1]])}
        logprobs = model(**ids).logits[0].double().log_softmax(-1)
    else:
        logprobs = model(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1 : -1].double()
        logprobs = logprobs.log_softmax(-1)
    return sum(logprobs[place, token].item() for place, token in enumerate(after))


def among_responses(model: Any, tokenizer: Any) -> Tensor:
    """log π over RESPONSES alone: pairs say nothing of the mass beyond them."""
    values = [whole_logprob(model, tokenizer, PROMPT, response) for response in RESPONSES]
    return torch.tensor(values, dtype=torch.float64).log_softmax(0)


@pytest.mark.parametrize(
    ("kind", "data", "settings", "bound"),
    [
        ("gpt2", shares, {}, 0.01),
        # 1,120 single judgements leave sampling noise
        pytest.param("gpt2", judged, {}, 0.03, marks=pytest.mark.slow),
        pytest.param("gpt2", shares, {"use_peft": True, "learning_rate": 1e-2}, 0.01, marks=pytest.mark.slow),
        pytest.param("t5", shares, {"learning_rate": 1e-2}, 0.01, marks=pytest.mark.slow),
    ],
    ids=["gpt2", "gpt2, single judgements", "adapters", "t5"],
)
def test_the_optimum_is_the_reference_times_the_exponential_of_the_reward(
    kind: str,
    data: Callable[[int, int], list[Preference]],
    settings: dict[str, Any],
    bound: float,
    make_model: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    model = make_model(kind)
    start = among_responses(model, tokenizer)
    optimum = (start + REWARDS / BETA).log_softmax(0)
    flags = {"learning_rate": 3e-3, "num_train_epochs": 4, "per_device_train_batch_size": 112, "warmup_steps": 5}
    pairs = data(40 if data is shares else 1120, 0)
    result = train_dpo(config(tmp_path, beta=BETA, **(flags | settings)), model, tokenizer, pairs, shares(1, 0))
    reached = among_responses(result.model, tokenizer)

    def kl_to_optimum(logprobs: Tensor) -> float:
        return (logprobs.exp() * (logprobs - optimum)).sum().item()

    assert kl_to_optimum(start) > 0.5
    assert kl_to_optimum(reached) < bound


PAIRS = [  # of unlike lengths, with a tie, a share of votes, and one from somebody who errs
    Preference(prompt="the cat", a="sees two fish", b="red", mu=1.0, weight=2.0),
    Preference(prompt="a very old dog finds the house", a="and", b="not good not bad", mu=0.0),
    Preference(prompt="moon", a="sun", b="tree and house", mu=0.5),
    Preference(prompt="one bird eats", a="one", b="big black dog", mu=0.7, weight=0.5, label_noise=0.4),
    Preference(prompt="red", a="small", b="small cat", mu=0.0),
]


def by_hand(model: Any, reference: Any, tokenizer: Any, beta: float) -> dict[str, float]:
    """The figures of PAIRS, one unpadded sequence at a time."""
    losses, chosen, rejected = [], [], []
    for pair in PAIRS:
        reward = {
            side: beta
            * (
                whole_logprob(model, tokenizer, pair.prompt, text)
                - whole_logprob(reference, tokenizer, pair.prompt, text)
            )
            for side, text in (("a", pair.a), ("b", pair.b))
        }
        noise = pair.label_noise or 0.0
        p = (1 - noise) / (1 + math.exp(reward["b"] - reward["a"])) + noise / 2
        losses.append(-pair.mu * math.log(p) - (1 - pair.mu) * math.log(1 - p))
        if pair.mu != 0.5:
            better, worse = ("a", "b") if pair.mu > 0.5 else ("b", "a")
            chosen.append(reward[better])
            rejected.append(reward[worse])
    mean_chosen, mean_rejected = sum(chosen) / len(chosen), sum(rejected) / len(rejected)
    return {
        "loss": sum(losses) / len(losses),
        "accuracy": sum(c > r for c, r in zip(chosen, rejected, strict=True)) / len(chosen),
        "margin": mean_chosen - mean_rejected,
        "reward_chosen": mean_chosen,
        "reward_rejected": mean_rejected,
    }


FEW = {"max_steps": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 5, "beta": 0.3}


@pytest.mark.parametrize(
    ("kind", "use_peft"),
    slow_but([("gpt2", True), ("bart", False)], itertools.product(["gpt2", "bart", "llama"], [False, True])),
)
def test_the_figures_are_those_of_plain_forwards(
    kind: str, use_peft: bool, make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    flags = {"per_device_eval_batch_size": 2, "use_peft": use_peft, "learning_rate": 3e-3 if use_peft else 1e-3}
    result = train_dpo(config(tmp_path, **(FEW | flags)), make_model(kind), tokenizer, PAIRS, PAIRS)
    expected = by_hand(result.model, make_model(kind), tokenizer, 0.3)
    assert result.metrics == pytest.approx(expected, abs=1e-4)
    assert expected["margin"] > 0.02  # it has moved


def weights_after(
    model: Any, tokenizer: Any, folder: Path, pairs: Sequence[Preference] = PAIRS, **flags: Any
) -> tuple[Tensor, list[float]]:
    """All weights after training, and the logged losses."""
    settings = FEW | {"logging_steps": 1} | flags
    result = train_dpo(config(folder, **settings), model, tokenizer, pairs, pairs)
    losses = [row["loss"] for row in result.history if "loss" in row]
    return torch.cat([weight.detach().flatten() for weight in result.model.parameters()]), losses


def test_the_batch_size_changes_nothing(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    cuts = [
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    ]
    # SGD, since Adam makes any rounding of a small gradient a step of full length; updates of 4 and of 1 pair
    flags = {"max_steps": 4, "optim": "sgd", "learning_rate": 0.1}
    (whole, losses), *others = (weights_after(make_model("gpt2"), tokenizer, tmp_path, **flags, **cut) for cut in cuts)
    for weights, other_losses in others:
        torch.testing.assert_close(weights, whole, rtol=0, atol=1e-5)
        assert other_losses == pytest.approx(losses, abs=1e-4)


def test_pairs_that_tell_their_noise_are_learned_as_under_that_flag(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    told = [replace(pair, label_noise=0.6) for pair in PAIRS]
    untold = [replace(pair, label_noise=None) for pair in PAIRS]
    flags = {"optim": "sgd", "learning_rate": 0.1}
    by_pair, losses = weights_after(make_model("gpt2"), tokenizer, tmp_path, told, **flags)
    by_flag, other_losses = weights_after(make_model("gpt2"), tokenizer, tmp_path, untold, label_noise=0.6, **flags)
    plain, _ = weights_after(make_model("gpt2"), tokenizer, tmp_path, untold, **flags)
    torch.testing.assert_close(by_pair, by_flag, rtol=0, atol=1e-6)
    assert losses == pytest.approx(other_losses, abs=1e-6)
    assert (by_pair - plain).abs().max() > 1e-4


def test_the_first_loss_is_ln_2_times_the_mean_weight(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    _, losses = weights_after(make_model("gpt2"), tokenizer, tmp_path, max_steps=1)
    assert losses == [pytest.approx(5.5 / 5 * math.log(2), abs=1e-4)]


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_train_as_one(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    make_model("gpt2").save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = subprocess.run(
        [*launch, __file__, tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    of_two = json.loads((tmp_path / "found.json").read_text())
    assert of_two["processes"] == 2
    of_one = run_in(tmp_path, pairs_per_process=4)
    assert of_two["losses"] == pytest.approx(of_one["losses"], abs=1e-4)
    assert of_two["metrics"] == pytest.approx(of_one["metrics"], abs=1e-4)
    assert of_one["metrics"]["margin"] > 0.2


def run_in(folder: Path, *, pairs_per_process: int) -> dict[str, Any]:
    """What training the model in `folder` on four of PAIRS gives, all four in each update."""
    flags = {"per_device_train_batch_size": pairs_per_process, "optim": "sgd", "learning_rate": 0.1, "logging_steps": 1}
    settings = config(folder, **(FEW | flags))
    result = train_dpo(settings, str(folder / "gpt2"), None, PAIRS[:4], PAIRS)
    losses = [row["loss"] for row in result.history if "loss" in row]
    return {"processes": settings.world_size, "losses": losses, "metrics": result.metrics}


@pytest.mark.parametrize("use_peft", [False, True])
def test_a_resumed_run_ends_as_one_that_was_never_stopped(
    use_peft: bool, make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    flags = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None, "use_peft": use_peft}
    flags |= {"max_steps": 4, "per_device_train_batch_size": 2, "warmup_steps": 1}
    whole, losses = weights_after(make_model("gpt2"), tokenizer, tmp_path, **flags)
    checkpoint = tmp_path / "checkpoints" / "step-2"
    names = dict(ResponsePolicy(make_model("gpt2")).named_parameters())
    if not use_peft:
        assert read_checkpoint(checkpoint).state["weights"].keys() == names.keys()
    options = {"resume_from_checkpoint": str(checkpoint), **flags}
    resumed, resumed_losses = weights_after(make_model("gpt2"), tokenizer, tmp_path, **options)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    assert resumed_losses == losses


@pytest.mark.parametrize("use_peft", [False, True])
def test_the_best_evaluated_policy_can_be_kept(
    use_peft: bool, make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    wrong = [Preference(prompt=p.prompt, a=p.b, b=p.a, mu=p.mu, weight=p.weight) for p in PAIRS]
    flags = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "load_best_model_at_end": True}
    flags |= {"metric_for_best_model": "loss", "use_peft": use_peft, "learning_rate": 3e-3}
    result = train_dpo(config(tmp_path, **(FEW | flags)), make_model("gpt2"), tokenizer, PAIRS, wrong)
    evaluated = [row["eval_loss"] for row in result.history if "eval_loss" in row][:-1]
    assert evaluated == sorted(evaluated)  # the held-out pairs say the opposite, so every step does harm
    assert evaluated[-1] > evaluated[0] + 1e-3
    assert result.metrics["loss"] == pytest.approx(evaluated[0], abs=1e-5)


def test_pairs_that_cannot_be_used_are_counted(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    # with its EOS the longest side of PAIRS has 7 + 5 = 12 tokens, the next 2 + 4 = 6 and 3 + 4 = 7
    pairs = [*PAIRS, Preference(prompt="", a="red", b="blue")]
    result = train_dpo(config(tmp_path, **FEW, max_length=11), make_model("gpt2"), tokenizer, pairs, PAIRS)
    assert result.train_rows == RowReport(6, 4, {"too long": 1, "empty prompt": 1})
    assert result.eval_rows == RowReport(5, 4, {"too long": 1})
    result = train_dpo(config(tmp_path, **FEW, max_length=12), make_model("gpt2"), tokenizer, pairs, PAIRS)
    assert result.train_rows.kept == 5
    with pytest.raises(DataError, match="No held-out pair is left"):
        train_dpo(config(tmp_path, **FEW), make_model("gpt2"), tokenizer, PAIRS, [])
    with pytest.raises(DataError, match=r"[Nn]o training pair.*--max_length"):
        train_dpo(config(tmp_path, **FEW, max_length=3), make_model("gpt2"), tokenizer, PAIRS, PAIRS)


def test_the_model_the_caller_gave_keeps_its_cache(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    result = train_dpo(config(tmp_path, **FEW), make_model("gpt2"), tokenizer, PAIRS, PAIRS)
    assert result.model.config.use_cache


def test_metrics_of_ties_alone_and_of_equal_rewards() -> None:
    zero = torch.zeros(2, 2)
    tied = dpo_metrics(zero, zero, torch.tensor([0.5, 0.5]), beta=0.1)
    assert tied["loss"] == pytest.approx(math.log(2))
    assert math.isnan(tied["accuracy"])
    assert math.isnan(tied["margin"])
    assert dpo_metrics(zero, zero, torch.tensor([1.0, 0.5]), beta=0.1)["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"beta": 0.0}, "beta must be greater than 0.0, not 0.0"),
        ({"beta": math.nan}, "beta must be greater than 0"),
        ({"label_noise": 1.0}, "label_noise must be at least 0.0 and less than 1.0"),
        ({"label_smoothing_factor": 0.1}, "use --label_noise"),
        ({"max_length": 1}, "max_length must be at least 2, not 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
        ({"resume_from_checkpoint": "nowhere"}, "'nowhere' is not a checkpoint"),
        ({"template": "tulu"}, "no template 'tulu'"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"fsdp": "full_shard"}, "--fsdp=full_shard is not supported"),
        ({"train_sampling_strategy": "group_by_length"}, "must be one of random, sequential"),
    ],
)
def test_a_setting_that_cannot_work_is_one_sentence(flags: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        config(tmp_path, **flags)


if __name__ == "__main__":  # one of two processes
    found = run_in(Path(sys.argv[1]), pairs_per_process=2)
    if os.environ["RANK"] == "0":
        (Path(sys.argv[1]) / "found.json").write_text(json.dumps(found))
