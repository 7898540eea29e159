import torch
from torch.testing import assert_close

from deep_rlhf.ops.advantages import gae, group_mean_std, leave_one_out, token_rewards

NAN = float("nan")


def test_token_rewards_put_the_score_on_the_last_real_token() -> None:
    scores = torch.tensor([10.0, 20.0, 30.0, 40.0])
    kl = torch.tensor([[1.0, 2.0, -3.0], [1.0, NAN, NAN], [NAN, 2.0, 3.0], [NAN, NAN, NAN]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 1], [0, 0, 0]]).bool()
    # −β·KL with β = 0.1; a negative KL estimate is rewarded; a response without tokens gets nothing at all
    expected = torch.tensor([[-0.1, -0.2, 0.3 + 10], [-0.1 + 20, 0, 0], [0, -0.2, -0.3 + 30], [0, 0, 0]])
    assert_close(token_rewards(scores, kl, mask, 0.1), expected)


def test_token_rewards_with_a_gap() -> None:
    mask = torch.tensor([[True, False, True, False]])
    rewards = token_rewards(torch.tensor([-1.0]), torch.tensor([[1.0, 5.0, 2.0, 5.0]]), mask, 0.5)
    assert_close(rewards, torch.tensor([[-0.5, 0.0, -2.0, 0.0]]))


REWARDS = torch.tensor([[1.0, 2.0, 4.0]])
VALUES = torch.tensor([[0.5, 1.0, 3.0]])
# γ = 0.9, λ = 0.5, so γλ = 0.45:
#   δ_3 = 4 + 0.9·0 − 3   = 1      A_3 = 1
#   δ_2 = 2 + 0.9·3 − 1   = 3.7    A_2 = 3.7 + 0.45·1     = 4.15
#   δ_1 = 1 + 0.9·1 − 0.5 = 1.4    A_1 = 1.4 + 0.45·4.15  = 3.2675
ADVANTAGES = torch.tensor([[3.2675, 4.15, 1.0]])
RETURNS = torch.tensor([[3.7675, 5.15, 4.0]])


def test_gae_by_hand() -> None:
    advantages, returns = gae(REWARDS, VALUES, torch.ones(1, 3).bool(), gamma=0.9, lam=0.5)
    assert_close(advantages, ADVANTAGES)
    assert_close(returns, RETURNS)


def test_gae_skips_padding_and_gaps_anywhere() -> None:
    mask = torch.tensor([[0, 1, 0, 0, 1, 1, 0]]).bool()
    rewards, values = torch.full((1, 7), NAN), torch.full((1, 7), NAN)
    rewards[mask], values[mask] = REWARDS[0], VALUES[0]
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.5)
    assert_close(advantages[mask], ADVANTAGES[0])
    assert_close(returns[mask], RETURNS[0])
    assert_close(advantages[~mask], torch.zeros(4))
    assert_close(returns[~mask], torch.zeros(4))


def test_gae_computes_each_response_separately() -> None:
    # the second response has one token: δ = 7 − 2 = 5; the third has none
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    rewards = torch.cat([REWARDS, torch.tensor([[7.0, 9.0, 9.0], [9.0, 9.0, 9.0]])])
    values = torch.cat([VALUES, torch.tensor([[2.0, 9.0, 9.0], [9.0, 9.0, 9.0]])])
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.5)
    assert_close(advantages, torch.cat([ADVANTAGES, torch.tensor([[5.0, 0.0, 0.0], [0.0, 0.0, 0.0]])]))
    assert_close(returns, torch.cat([RETURNS, torch.tensor([[7.0, 0.0, 0.0], [0.0, 0.0, 0.0]])]))


def test_with_lambda_one_the_returns_are_the_discounted_rewards_to_go() -> None:
    # 1 + 0.9·2 + 0.81·4 = 6.04, 2 + 0.9·4 = 5.6, 4, whatever the critic says
    _, returns = gae(REWARDS, VALUES, torch.ones(1, 3).bool(), gamma=0.9, lam=1.0)
    assert_close(returns, torch.tensor([[6.04, 5.6, 4.0]]))


def test_with_lambda_zero_the_advantages_are_the_one_step_errors() -> None:
    advantages, _ = gae(REWARDS, VALUES, torch.ones(1, 3).bool(), gamma=0.9, lam=0.0)
    assert_close(advantages, torch.tensor([[1.4, 3.7, 1.0]]))


def test_gae_of_a_final_score_alone() -> None:
    # λ = 0, γ = 1: V₂ − V₁ = 1, V₃ − V₂ = 1, 5 − V₃ = 2
    mask = torch.ones(1, 3).bool()
    rewards = token_rewards(torch.tensor([5.0]), torch.zeros(1, 3), mask, kl_coef=0.1)
    advantages, _ = gae(rewards, torch.tensor([[1.0, 2.0, 3.0]]), mask, gamma=1.0, lam=0.0)
    assert_close(advantages, torch.tensor([[1.0, 1.0, 2.0]]))


def test_leave_one_out_by_hand() -> None:
    # group 7: 1, 2, 6; group 3: 4, 10; group 5: 8 alone; the members of a group need not be neighbours
    rewards = torch.tensor([1.0, 4.0, 2.0, 8.0, 10.0, 6.0])
    group = torch.tensor([7, 3, 7, 5, 3, 7])
    # (2+6)/2 = 4; the other one: 10; (1+6)/2 = 3.5; nobody: 0; 4; (1+2)/2 = 1.5
    assert_close(leave_one_out(rewards, group), torch.tensor([4.0, 10.0, 3.5, 0.0, 4.0, 1.5]))


def test_leave_one_out_with_three_others() -> None:
    # the others of the 9 are 1, 2, 6, with mean 3
    baseline = leave_one_out(torch.tensor([9.0, 1.0, 2.0, 6.0]), torch.zeros(4, dtype=torch.long))
    assert_close(baseline[0], torch.tensor(3.0))


def test_group_mean_and_std_include_the_sample_itself() -> None:
    # group 7: 1, 2, 6, mean 3, squared distances 4 + 1 + 9 = 14; group 3: 4, 10; group 5: 8 alone
    rewards = torch.tensor([1.0, 4.0, 2.0, 8.0, 10.0, 6.0])
    group = torch.tensor([7, 3, 7, 5, 3, 7])
    mean, std = group_mean_std(rewards, group)
    assert_close(mean, torch.tensor([3.0, 7.0, 3.0, 8.0, 7.0, 3.0]))
    # √(14/2), √(18/1), 0
    assert_close(std, torch.tensor([2.6457513, 4.2426407, 2.6457513, 0.0, 4.2426407, 2.6457513]))
