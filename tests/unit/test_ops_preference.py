import hashlib
import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from deep_rlhf.ops.preference import bootstrap_weights, bradley_terry_loss, dpo_loss

LN3 = math.log(3)  # σ(ln 3) = ¾


@pytest.mark.parametrize(
    ("mu", "margin", "label_noise", "expected"),
    [
        (1.0, 0.0, 0.0, math.log(4 / 3)),  # r_a − r_b = ln 3: −ln ¾
        (0.0, 0.0, 0.0, math.log(4)),  # −ln ¼
        (0.5, 0.0, 0.0, (math.log(4 / 3) + math.log(4)) / 2),
        (0.8, 0.0, 0.0, 0.8 * math.log(4 / 3) + 0.2 * math.log(4)),  # 4 of 5 votes
        (1.0, LN3, 0.0, math.log(2)),  # the difference equals the margin: −ln σ(0)
        (0.0, LN3, 0.0, math.log(10)),  # −ln σ(−2 ln 3) = −ln (1/10)
        # p' = 0.9 p + 0.05: 0.9·0.75 + 0.05 = 0.725 and 0.9·0.25 + 0.05 = 0.275
        (1.0, 0.0, 0.1, -math.log(0.725)),
        (0.0, 0.0, 0.1, -math.log(0.275)),
        (0.5, 0.0, 0.1, -(math.log(0.725) + math.log(0.275)) / 2),
        # 0.8 p + 0.1, and with the margin p = ½ and 1/10: 0.5 and 0.18
        (1.0, LN3, 0.2, -math.log(0.5)),
        (0.0, LN3, 0.2, -math.log(0.18)),
    ],
)
def test_bradley_terry_loss(mu: float, margin: float, label_noise: float, expected: float) -> None:
    loss = bradley_terry_loss(
        torch.tensor([5.0 + LN3]), torch.tensor([5.0]), torch.tensor([mu]), margin=margin, label_noise=label_noise
    )
    assert_close(loss, torch.tensor([expected]))


def test_a_margin_per_pair() -> None:
    loss = bradley_terry_loss(torch.tensor([LN3, LN3]), torch.zeros(2), torch.ones(2), margin=torch.tensor([0.0, LN3]))
    assert_close(loss, torch.tensor([math.log(4 / 3), math.log(2)]))


def test_label_noise_per_pair() -> None:
    # ¾, 0.9 · ¾ + 0.05, 0.5 · ¾ + 0.25, ½; and of the other response ¼, 0.275, 0.375, ½
    noise = torch.tensor([0.0, 0.1, 0.5, 1.0])
    a, b = torch.full((4,), LN3, requires_grad=True), torch.zeros(4)
    right = bradley_terry_loss(a, b, torch.ones(4), label_noise=noise)
    wrong = bradley_terry_loss(a, b, torch.zeros(4), label_noise=noise)
    assert_close(right, -torch.tensor([0.75, 0.725, 0.625, 0.5]).log())
    assert_close(wrong, -torch.tensor([0.25, 0.275, 0.375, 0.5]).log())
    # of −ln p': −(1 − e) p (1 − p) / p'
    right.sum().backward()
    assert_close(a.grad, -torch.tensor([1.0, 0.9, 0.5, 0.0]) * 0.1875 / torch.tensor([0.75, 0.725, 0.625, 0.5]))


def test_label_noise_per_pair_stays_finite() -> None:
    a = torch.tensor([1000.0, -1000.0, 1000.0, -1000.0], requires_grad=True)
    loss = bradley_terry_loss(a, torch.zeros(4), torch.ones(4), label_noise=torch.tensor([0.0, 0.0, 1.0, 0.1]))
    assert_close(loss, torch.tensor([0.0, 1000.0, math.log(2), -math.log(0.05)]))
    loss.sum().backward()
    assert_close(a.grad, torch.tensor([0.0, -1.0, 0.0, 0.0]))


@pytest.mark.parametrize(("mu", "gradient"), [(1.0, -0.25), (0.0, 0.75), (0.5, 0.25)])
def test_the_gradient_is_the_predicted_minus_the_labelled_probability(mu: float, gradient: float) -> None:
    a, b = torch.tensor([LN3], requires_grad=True), torch.zeros(1, requires_grad=True)
    bradley_terry_loss(a, b, torch.tensor([mu])).sum().backward()
    assert_close(a.grad, torch.tensor([gradient]))  # ¾ − mu
    assert_close(b.grad, torch.tensor([-gradient]))


def test_extreme_rewards_stay_finite_in_value_and_gradient() -> None:
    a, b = torch.tensor([1000.0, 1000.0], requires_grad=True), torch.zeros(2)
    mu = torch.tensor([1.0, 0.0])
    assert_close(bradley_terry_loss(a, b, mu), torch.tensor([0.0, 1000.0]))
    # with noise, no response is worse than a random one: −ln 0.95 and −ln 0.05
    loss = bradley_terry_loss(a, b, mu, label_noise=0.1)
    assert_close(loss, torch.tensor([-math.log(0.95), -math.log(0.05)]))
    loss.sum().backward()
    assert_close(a.grad, torch.zeros(2))


IDS = [f"pair-{number}" for number in range(4000)]


def test_bootstrap_weights_have_a_fixed_value() -> None:
    # first 8 bytes of sha256("pair-0/0") over 2⁶⁴ = 0.8044, "pair-0/1" 0.0283, "pair-0/2" 0.9725;
    # "pair-1/…" 0.7254, 0.1164, 0.7763. Poisson(1) has P(≤ 0) = 0.3679, P(≤ 1) = 0.7358, P(≤ 2) = 0.9197,
    # P(≤ 3) = 0.9810.
    assert_close(bootstrap_weights(["pair-0", "pair-1"], 3), torch.tensor([[2.0, 0.0, 3.0], [1.0, 0.0, 2.0]]))


def test_bootstrap_weights_depend_on_the_pair_alone() -> None:
    weights = bootstrap_weights(IDS, 3)
    assert torch.equal(weights, bootstrap_weights(IDS, 3))
    assert torch.equal(weights.flip(0), bootstrap_weights(IDS[::-1], 3))
    assert torch.equal(weights[100:200], bootstrap_weights(IDS[100:200], 3))
    assert torch.equal(weights, bootstrap_weights(IDS, 5)[:, :3])


def test_bootstrap_weights_are_poisson_counts() -> None:
    weights = bootstrap_weights(IDS, 3)
    # standard errors over 12,000 draws: 0.009 for the mean, 0.0044 for a share of 1/e, 0.016 for the variance
    assert weights.mean().item() == pytest.approx(1.0, abs=0.03)
    assert weights.var().item() == pytest.approx(1.0, abs=0.06)
    assert (weights == 0).float().mean().item() == pytest.approx(math.exp(-1), abs=0.015)
    assert (weights == 1).float().mean().item() == pytest.approx(math.exp(-1), abs=0.015)
    assert (weights == 2).float().mean().item() == pytest.approx(math.exp(-1) / 2, abs=0.015)


def test_members_have_different_bootstrap_samples() -> None:
    # a pair is out of both bags with probability 1/e² = 0.135 if they are independent
    out = bootstrap_weights(IDS, 2) == 0
    assert out.all(1).float().mean().item() == pytest.approx(math.exp(-2), abs=0.025)


def test_a_single_member_sees_every_pair_once() -> None:
    assert torch.equal(bootstrap_weights(["a", "b"], 1), torch.ones(2, 1))


@pytest.mark.parametrize("members", [1, 3])
def test_no_pairs(members: int) -> None:
    assert bootstrap_weights([], members).shape == (0, members)


# P(≤ 0) = 1/e = 0.3679 and P(≤ 3) = 16/6 · 1/e = 0.9810; a draw on the bound belongs to the next count.
@pytest.mark.parametrize(("uniform", "count"), [(0.0, 0.0), (0.367, 0.0), (math.exp(-1), 1.0), (0.98, 3.0)])
def test_the_count_of_a_given_draw(monkeypatch: pytest.MonkeyPatch, uniform: float, count: float) -> None:
    digest = int(uniform * 2**64).to_bytes(8)
    monkeypatch.setattr(hashlib, "sha256", lambda _: SimpleNamespace(digest=lambda: digest))
    assert bootstrap_weights(["any"], 2).tolist() == [[count, count]]


# β = ½. Answer a: log π/π_ref = −1 − (−1 − 2 ln 3) = 2 ln 3, so its reward is ln 3; b: −4 − (−4) = 0.
RESPONSES = (torch.tensor([-1.0]), torch.tensor([-4.0]), torch.tensor([-1.0 - 2 * LN3]), torch.tensor([-4.0]))


@pytest.mark.parametrize(
    ("mu", "expected"),
    [
        (1.0, math.log(4 / 3)),  # σ(ln 3) = ¾
        (0.0, math.log(4)),
        (0.5, (math.log(4 / 3) + math.log(4)) / 2),
    ],
)
def test_dpo_loss_by_hand(mu: float, expected: float) -> None:
    loss, rewards_a, rewards_b = dpo_loss(*RESPONSES, torch.tensor([mu]), beta=0.5)
    assert_close(loss, torch.tensor([expected]))
    assert_close(rewards_a, torch.tensor([LN3]))
    assert_close(rewards_b, torch.zeros(1))


def test_dpo_loss_of_the_reference_itself_is_ln_2() -> None:
    logprobs = torch.tensor([-3.0, -50.0])
    loss, _, _ = dpo_loss(logprobs, 2 * logprobs, logprobs, 2 * logprobs, torch.tensor([1.0, 0.0]), beta=0.1)
    assert_close(loss, torch.full((2,), math.log(2)))


def test_dpo_rewards_of_b_count_against_its_reference() -> None:
    # the mirror image of RESPONSES: b has the reward ln 3
    a, b, ref_a, ref_b = RESPONSES
    loss, rewards_a, rewards_b = dpo_loss(b, a, ref_b, ref_a, torch.tensor([1.0]), beta=0.5)
    assert_close(loss, torch.tensor([math.log(4)]))
    assert_close(rewards_a, torch.zeros(1))
    assert_close(rewards_b, torch.tensor([LN3]))


def test_dpo_gradient() -> None:
    # by the chosen response's log-probability: −β (1 − σ(ln 3)) = −½ · ¼; the rejected one's is its mirror image
    a, b, ref_a, ref_b = RESPONSES
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    dpo_loss(a, b, ref_a, ref_b, torch.ones(1), beta=0.5)[0].sum().backward()
    assert_close(a.grad, torch.tensor([-0.125]))
    assert_close(b.grad, torch.tensor([0.125]))


def test_dpo_label_noise() -> None:
    # 0.9 · ¾ + 0.05 = 0.725
    loss, _, _ = dpo_loss(*RESPONSES, torch.ones(1), beta=0.5, label_noise=0.1)
    assert_close(loss, torch.tensor([-math.log(0.725)]))
