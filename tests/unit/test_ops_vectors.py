"""Numbers that other projects publish in their own tests. The essential ones also stand in the hand-computed tables."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from deep_rlhf.ops.advantages import gae, leave_one_out, token_rewards
from deep_rlhf.ops.kl import adapted_kl_coef, kl_estimate, kl_full
from deep_rlhf.ops.losses import policy_loss
from deep_rlhf.ops.masked import masked_mean, masked_sum, masked_var, sequence_mean, whiten

FOLDER = Path(__file__).resolve().parents[1] / "vectors"
Case = dict[str, Any]

NOT_APPLICABLE = {
    **dict.fromkeys(
        [f"openai_lm_human_preferences/top_k_{k}" for k in range(1, 6)], "no top-k: the policy is sampled whole"
    ),
    **dict.fromkeys(
        [f"openai_lm_human_preferences/top_p_{p}" for p in ("0", "0.5", "0.6", "0.7", "1")],
        "no top-p: the policy is sampled whole, so that its log-probabilities are those of the samples",
    ),
    "nemo_rl/reinforce": "no algorithm uses the plain REINFORCE loss",
    "openai_lm_human_preferences/sample_sequence_deterministic": "sampling, which is no part of ops",
}


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _mask(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


def _check(actual: Tensor, expected: Any, case: Case) -> None:
    """To the case's own tolerance; float32's where it names none."""
    rtol, atol = case.get("rtol", 0.0), case.get("atol", 0.0)
    assert_close(actual, _tensor(expected), rtol=rtol, atol=max(atol, 1e-6))


def _policy_loss(case: Case) -> None:
    given, expected = case["inputs"], case["expected"]
    loss, _ = policy_loss(
        _tensor(given["logprobs"]),
        _tensor(given["old_logprobs"]),
        _tensor(given["advantages"]),
        cliprange=given["clip"],
        dual_clip=given.get("dual_clip_c"),
    )
    _check(loss, expected["per_token"], case)
    _check(loss.mean(), expected["mean"], case)


def _policy_loss_token_mean(case: Case) -> None:
    given = case["inputs"]
    logprobs, old_logprobs = _tensor(given["log_probs"]), _tensor(given["old_log_probs"])
    loss, _ = policy_loss(logprobs, old_logprobs, _tensor(given["advantages"]), cliprange=given["clip"])
    _check(masked_mean(loss, _mask(given["mask"])), case["expected"], case)


def _clamped(values: Tensor, bound: float | None) -> Tensor:
    return values if bound is None else values.clamp(-bound, bound)


def _kl_estimator(kind: str) -> Callable[[Case], None]:
    def check(case: Case) -> None:
        logprobs, ref_logprobs = _tensor(case["inputs"]["logprobs"]), _tensor(case["inputs"]["ref_logprobs"])
        _check(kl_estimate(logprobs, ref_logprobs, kind), case["expected"], case)
        if "clamp" in case:
            clamped = _clamped(logprobs - ref_logprobs, case["clamp"].get("input"))
            estimate = _clamped(kl_estimate(clamped, torch.zeros_like(clamped), kind), case["clamp"].get("output"))
            _check(estimate, case["expected_clamped"], case)

    return check


def _kl_in_loss(case: Case) -> None:
    given, expected = case["inputs"], case["expected"]
    kl = kl_estimate(_tensor(given["logprobs"]), _tensor(given["ref_logprobs"]), "k3")
    # the table is rounded to three places
    assert_close(kl, _tensor(expected["kl_per_token"]), rtol=case["rtol"], atol=5e-4)
    assert_close(kl.mean(), _tensor(expected["kl_mean"]), rtol=case["rtol"], atol=5e-4)
    assert_close(given["beta"] * kl.mean(), _tensor(expected["loss"]), rtol=case["rtol"], atol=5e-5)


def _kl_clamp_gradient(case: Case) -> None:
    """The weight is 1 in value and carries the gradient of the sampling probability; a clamped entry takes no part."""
    given, expected = case["inputs"], case["expected"]
    logprobs, ref_logprobs = _tensor(given["logprobs"]).requires_grad_(), _tensor(given["ref_logprobs"])
    difference = _clamped(logprobs - ref_logprobs, given["input_clamp"])
    kl = kl_estimate(difference, torch.zeros_like(difference), "k3")
    weights = torch.exp(logprobs - logprobs.detach())
    clamped = (logprobs - ref_logprobs).abs() > given["input_clamp"]
    (torch.where(clamped, weights.detach(), weights) * kl).sum().backward()
    _check(kl.detach(), expected["kl"], case)
    _check(logprobs.grad, expected["grad_wrt_logprobs"], case)


def _kl_full(case: Case) -> None:
    given = case["inputs"]
    _check(kl_full(_tensor(given["p"]).log(), _tensor(given["p_ref"]).log()), case["expected"], case)


def _adaptive_kl(case: Case) -> None:
    given = case["inputs"]
    coef, coefs = given["init_kl_coef"], []
    for kl in given["current_kl"]:
        coef = adapted_kl_coef(coef, kl, target=given["target"], horizon=given["horizon"], samples=given["n_steps"])
        coefs.append(coef)
    assert coefs == pytest.approx(case["expected"], rel=1e-12)


def _gae_terminal_reward(case: Case) -> None:
    given = case["inputs"]
    values, mask = _tensor(given["values"]), _mask(given["mask"])
    rewards = token_rewards(_tensor(given["rewards"]), torch.zeros_like(values), mask, kl_coef=0.0)
    advantages, _ = gae(rewards, values, mask, gamma=given["gamma"], lam=given["gae_lambda"])
    _check(advantages, case["expected_advantages"], case)


def _gae_gap(case: Case) -> None:
    given = case["inputs"]
    values, mask, scores = _tensor(given["values"]), _mask(given["mask"]), _tensor(given["rewards"])

    def advantages_of(values: Tensor, mask: Tensor) -> Tensor:
        rewards = token_rewards(scores, torch.zeros_like(values), mask, kl_coef=0.0)
        return gae(rewards, values, mask, gamma=given["gamma"], lam=given["gae_lambda"])[0]

    dense = values[mask].unsqueeze(0)
    advantages = advantages_of(values, mask)
    assert torch.equal(advantages[mask], advantages_of(dense, torch.ones_like(dense).bool())[0])
    assert advantages[~mask].tolist() == [0.0]


def _gae_outside_mask(case: Case) -> None:
    given = case["inputs"]
    rewards, mask = _tensor(given["rewards"]), _mask(given["response_mask"])
    generator = torch.Generator().manual_seed(0)
    results = []
    for _ in range(2):
        values = torch.rand(mask.shape, generator=generator) * 200 - 100
        values[mask] = _tensor(given["values_at_mask"])
        results.append(gae(rewards, values, mask, gamma=0.99, lam=0.95))
    (advantages, returns), (other_advantages, other_returns) = results
    assert torch.equal(advantages, other_advantages)
    assert torch.equal(returns[mask], other_returns[mask])
    assert advantages[mask].abs().min() > 0


def _leave_one_out(case: Case) -> None:
    given = case["inputs"]
    baseline = leave_one_out(_tensor(given["rewards"]), torch.tensor(given["prompt_group"]))
    _check(baseline, case["expected"]["baseline"], case)


def _token_mean(case: Case) -> None:
    given = case["inputs"]
    values = _tensor([float(value) for value in given["value"]]) if "value" in given else _tensor(given["loss"])
    _check(masked_mean(values, _mask(given["mask"])), case["expected"], case)


def _sequence_mean(case: Case) -> None:
    given = case["inputs"]
    _check(sequence_mean(_tensor(given["loss"]), _mask(given["mask"])), case["expected"], case)


def _token_mean_over_microbatches(case: Case) -> None:
    """Each micro-batch divides its sum by the number of tokens of the whole window."""
    pairs = list(zip(case["inputs"]["microbatches"], case["inputs"]["masks"], strict=True))
    tokens = sum(_mask(mask).sum() for _, mask in pairs)
    loss = sum((masked_sum(_tensor(values), _mask(mask)) / tokens for values, mask in pairs), torch.zeros(()))
    _check(loss, case["expected"], case)


def _masked_whiten(case: Case) -> None:
    mask = _mask(case["inputs"]["mask"])
    _check(whiten(_tensor(case["inputs"]["values"]), mask)[mask], case["expected_unmasked"], case)


def _mean_and_variance(case: Case) -> None:
    values, mask = _tensor(case["inputs"]["values"]), _mask(case["inputs"]["mask"])
    _check(masked_mean(values, mask), case["expected"]["mean"], case)
    _check(masked_var(values, mask), case["expected"]["var_unbiased"], case)


CHECKS: dict[str, Callable[[Case], None]] = {
    "nemo_rl/ppo_clip": _policy_loss,
    "nemo_rl/ppo_dual_clip": _policy_loss,
    "nemo_rl/kl_estimator_k1": _kl_estimator("kl"),
    "nemo_rl/kl_estimator_k2": _kl_estimator("mse"),
    "nemo_rl/kl_estimator_k3": _kl_estimator("k3"),
    "nemo_rl/kl_penalty_k3_in_loss": _kl_in_loss,
    "nemo_rl/gae_lambda0_terminal_reward": _gae_terminal_reward,
    "nemo_rl/gae_gap_invariance": _gae_gap,
    "nemo_rl/leave_one_out_baseline_std": _leave_one_out,
    "nemo_rl/leave_one_out_baseline_std_mixed": _leave_one_out,
    "nemo_rl/kl_k3_input_clamp_grad": _kl_clamp_gradient,
    "openai_lm_human_preferences/adaptive_kl_controller": _adaptive_kl,
    "openrlhf/token_mean": _token_mean,
    "openrlhf/seq_mean_token_mean": _sequence_mean,
    "openrlhf/fully_masked_sequence_excluded": _sequence_mean,
    "openrlhf/grad_accum_window_token_mean": _token_mean_over_microbatches,
    "openrlhf/ppo_policy_loss_token_mean": _policy_loss_token_mean,
    "trl_historic/kl_penalty_kl": _kl_estimator("kl"),
    "trl_historic/kl_penalty_abs": _kl_estimator("abs"),
    "trl_historic/kl_penalty_mse": _kl_estimator("mse"),
    "trl_historic/kl_penalty_full_1": _kl_full,
    "trl_historic/kl_penalty_full_2": _kl_full,
    "trl_historic/masked_whiten": _masked_whiten,
    "trl_historic/masked_mean_var": _mean_and_variance,
    "verl/masked_mean": _token_mean,
    "verl/masked_mean_nan_outside_mask": _token_mean,
    "verl/gae_ignores_values_outside_mask": _gae_outside_mask,
}


def _cases() -> dict[str, Case]:
    files = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
    return {f"{stem}/{case['name']}": case for stem, content in files.items() for case in content["cases"]}


@pytest.mark.parametrize("name", CHECKS)
def test_published_vector(name: str) -> None:
    CHECKS[name](_cases()[name])


def test_every_published_case_is_checked_or_excused() -> None:
    assert set(_cases()) == set(CHECKS) | set(NOT_APPLICABLE)
