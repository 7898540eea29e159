"""Best-of-n: what it chooses, how far that is from where it chooses, and that its soft form samples the optimum."""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grids import slow_but
from optimum import BOUNDS, PROMPT, SCALES, SEEDS, WORDS, Optimum, reference_model, reward_for
from torch import Tensor

from deep_rlhf.algorithms.best_of_n import BestOfN, selection_probabilities
from deep_rlhf.errors import ConfigError, RewardError
from deep_rlhf.models.function_scorer import FunctionScorer

DRAWS = {1: 1000, 3: 60}
CANDIDATES = {1: 16, 3: 256}


def by_text(texts: list[str], probabilities: Tensor) -> dict[str, float]:
    """Probabilities of texts, of which several responses may have the same (special tokens are silent)."""
    total: Counter[str] = Counter()
    for text, probability in zip(texts, probabilities.tolist(), strict=True):
        total[text.strip()] += probability
    return dict(total)


def kl_from_counts(drawn: list[str], reference: dict[str, float]) -> float:
    """KL(drawn ‖ reference) by the plug-in estimate less its bias to first order, (cells − 1)/2N (Miller 1955)."""
    counts = Counter(text.strip() for text in drawn)
    plug_in = sum(c / len(drawn) * math.log(c / len(drawn) / reference[text]) for text, c in counts.items())
    return plug_in - (len(reference) - 1) / (2 * len(drawn))


@pytest.fixture
def make_task(make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]) -> Callable[..., Any]:
    """(sampler, optimum, text of each response, its probability under the reference)."""

    def make(length: int, beta: float, seed: int, *, soft: bool, n: int) -> tuple[BestOfN, Optimum, list[str], Tensor]:
        model, tokenizer = reference_model(make_model, "gpt2", seed), make_tokenizer(WORDS)
        optimum = Optimum(model, tokenizer, length=length, beta=beta)
        scorer = FunctionScorer(reward_for(beta), "reward")
        sampler = BestOfN(model, tokenizer, scorer, n=n, beta=beta if soft else 0.0, max_new_tokens=length)
        texts = tokenizer.batch_decode(optimum.responses, skip_special_tokens=True)
        return sampler, optimum, texts, optimum.log_policy(model).exp()

    return make


@pytest.mark.parametrize(("beta", "seed"), slow_but([(0.5, 1)], itertools.product(SCALES, SEEDS)))
def test_soft_best_of_n_samples_the_optimum_of_one_token(beta: float, seed: int, make_task: Callable[..., Any]) -> None:
    sampler, optimum, texts, reference = make_task(1, beta, seed, soft=True, n=CANDIDATES[1])
    drawn = sampler.generate([PROMPT] * DRAWS[1], seed=seed).responses
    # responses of one text have one reward, so nothing of the KL is lost by joining them
    assert kl_from_counts(drawn, by_text(texts, optimum.log_optimum.exp())) <= BOUNDS[1]
    assert kl_from_counts(drawn, by_text(texts, reference)) > 2 * BOUNDS[1]


@pytest.mark.parametrize(("beta", "seed"), slow_but([(0.5, 1)], itertools.product(SCALES, SEEDS)))
def test_soft_best_of_n_samples_the_optimum_of_three_tokens(
    beta: float, seed: int, make_task: Callable[..., Any]
) -> None:
    """Counts of 3,616 responses would be far too few, so the chance of each is computed from what it competes with.

    P(y) = n π₀(y) E[selection probability of y beside n − 1 others]. Groups that were really drawn and scored stand in
    for the expectation: each response takes the place of the first candidate. They are the same for all y, so the
    estimate's error is mostly a common factor, which normalising takes away; what is left biases the KL upwards by at
    most CV²/2G, where CV² is the relative variance over the G groups of the summed weights: below 0.002 here.
    """
    n, groups = CANDIDATES[3], DRAWS[3]
    sampler, optimum, texts, reference = make_task(3, beta, seed, soft=True, n=n)
    others = sampler.generate([PROMPT] * groups, seed=seed).candidate_scores[:, 1:].double()
    weights = (others / beta).exp().sum(1)
    assert float(weights.var() / weights.mean() ** 2) / (2 * groups) < 0.002
    rewards = torch.tensor(reward_for(beta)([PROMPT] * len(texts), texts), dtype=torch.float64)
    distinct, place = rewards.unique(return_inverse=True)
    chance = torch.stack(
        [selection_probabilities(torch.cat([own.expand(groups, 1), others], 1), beta)[:, 0].mean() for own in distinct]
    )
    written = n * reference * chance[place]
    assert float(written.sum()) == pytest.approx(1, abs=0.1)
    written = written / written.sum()
    assert float((written * (written.log() - optimum.log_optimum)).sum()) <= BOUNDS[3]


def test_more_candidates_come_nearer(make_task: Callable[..., Any]) -> None:
    found = []
    for n in (1, 2, 16):
        sampler, optimum, texts, _ = make_task(1, 0.1, 1, soft=True, n=n)
        drawn = sampler.generate([PROMPT] * 1000).responses
        found.append(kl_from_counts(drawn, by_text(texts, optimum.log_optimum.exp())))
    assert found[0] > 2 * found[1] > 4 * found[2]


@pytest.mark.parametrize("n", [2, 4, 16])
def test_hard_best_of_n_stays_within_its_known_kl(n: int, make_task: Callable[..., Any]) -> None:
    sampler, _, texts, reference = make_task(1, 1.0, 1, soft=False, n=n)
    chosen = sampler.generate([PROMPT] * 1000)
    measured = kl_from_counts(chosen.responses, by_text(texts, reference))
    bound = math.log(n) - (n - 1) / n  # Gao et al. 2022; exact where no two responses have the same reward
    assert bound / 2 < measured <= bound
    assert torch.equal(chosen.scores, chosen.candidate_scores.amax(1))


def test_what_is_chosen_is_one_of_the_candidates_with_its_score(make_task: Callable[..., Any]) -> None:
    sampler, *_ = make_task(3, 0.5, 1, soft=True, n=4)
    chosen = sampler.generate([PROMPT, "wc", "wa wb wd"], seed=7)
    assert chosen.candidate_scores.shape == (3, 4)
    for response, score, candidates, scores in zip(
        chosen.responses, chosen.scores, chosen.candidates, chosen.candidate_scores, strict=True
    ):
        assert float(score) == float(scores[candidates.index(response)])
        torch.testing.assert_close(torch.tensor(reward_for(0.5)([""] * 4, candidates)), scores)
    again = sampler.generate([PROMPT, "wc", "wa wb wd"], seed=7)
    assert again.responses == chosen.responses
    assert sampler.generate([PROMPT, "wc", "wa wb wd"], seed=8).candidates != chosen.candidates


def test_selection_probabilities_by_hand() -> None:
    scores = torch.tensor([[0.0, math.log(3.0), 0.0], [2.0, 2.0, -1.0]])
    torch.testing.assert_close(selection_probabilities(scores, 1.0)[0], torch.tensor([0.2, 0.6, 0.2]))
    torch.testing.assert_close(selection_probabilities(scores, 0.5)[0], torch.tensor([1.0, 9.0, 1.0]) / 11)
    assert selection_probabilities(scores, 0.0).tolist() == [[0, 1, 0], [1, 0, 0]]  # the first of the best


@pytest.mark.parametrize("settings", [{"n": 0}, {"n": 2, "beta": -1.0}, {"n": 2, "temperature": 0.0}])
def test_settings_that_cannot_work_are_refused(
    settings: dict[str, Any], make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]
) -> None:
    scorer = FunctionScorer(reward_for(1.0), "reward")
    with pytest.raises(ConfigError):
        BestOfN(reference_model(make_model, "gpt2", 1), make_tokenizer(WORDS), scorer, **settings)


def test_the_reward_may_be_a_function(make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]) -> None:
    model, tokenizer = reference_model(make_model, "gpt2", 1), make_tokenizer(WORDS)
    sampler = BestOfN(model, tokenizer, lambda prompts, responses: [float(r == "b") for r in responses], n=8)
    best = sampler.generate([PROMPT])
    assert best.scores.item() == best.candidate_scores.max()
    with pytest.raises(ConfigError):
        sampler.generate([])
    with pytest.raises(RewardError):
        BestOfN(model, tokenizer, lambda texts: [], n=2)


def test_a_reward_of_nan_is_refused(make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]) -> None:
    scorer = FunctionScorer(lambda prompts, responses: [math.nan] * len(responses), "broken")
    sampler = BestOfN(reference_model(make_model, "gpt2", 1), make_tokenizer(WORDS), scorer, n=2, max_new_tokens=1)
    with pytest.raises(RewardError, match=r"\bnan\b.*compared"):
        sampler.generate([PROMPT])
