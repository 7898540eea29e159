"""Selected and concatenated records: values stay with their tokens, whatever the padding."""

import dataclasses

import pytest
import torch

from deep_rlhf.rollout.records import concatenate, select, to_device
from deep_rlhf.types import AXIS, Completions, Experience, Rollout


def completions(prompts: list[list[int]], responses: list[list[int]], *, left: bool = True) -> Completions:
    """Log-probabilities are −id/100 and entropies id/10, so that every number tells whose it is."""
    width, limit = max(map(len, prompts)), max(map(len, responses))
    rows = [[0] * (width - len(p)) + p if left else p + [0] * (width - len(p)) for p in prompts]
    prompt_ids = torch.tensor(rows)
    response_ids = torch.tensor([r + [0] * (limit - len(r)) for r in responses])
    return Completions(
        prompts=[str(p) for p in prompts],
        responses=[str(r) for r in responses],
        prompt_ids=prompt_ids,
        prompt_mask=prompt_ids > 0,
        response_ids=response_ids,
        response_mask=response_ids > 0,
        sampler_logprobs=-response_ids / 100,
        entropy=response_ids / 10,
        finished=response_ids.eq(1).any(1),
        group=prompt_ids.sum(1),
    )


FOUR = completions([[5], [6, 7], [8, 9, 10], [11]], [[2, 3, 1], [4], [5, 1], [6, 7, 8, 9]])


def test_select_drops_the_columns_that_are_padding_for_all() -> None:
    part = select(FOUR, torch.tensor([2, 1]))
    assert part.prompts == ["[8, 9, 10]", "[6, 7]"]
    assert part.responses == ["[5, 1]", "[4]"]
    assert part.prompt_ids.tolist() == [[8, 9, 10], [0, 6, 7]]
    assert part.prompt_mask.tolist() == [[True, True, True], [False, True, True]]
    assert part.response_ids.tolist() == [[5, 1], [4, 0]]
    assert part.response_mask.tolist() == [[True, True], [True, False]]
    assert torch.equal(part.sampler_logprobs, torch.tensor([[-0.05, -0.01], [-0.04, 0.0]]))
    assert part.finished.tolist() == [True, False]


def test_select_of_all_in_order_is_the_record_itself() -> None:
    assert_equal(select(FOUR, torch.arange(4)), FOUR)


def test_concatenate_undoes_select() -> None:
    parts = [select(FOUR, torch.tensor(rows)) for rows in ([0], [1, 2], [3])]
    assert_equal(concatenate(parts), FOUR)


def test_prompts_of_an_encoder_stay_where_they_start() -> None:
    prompts, responses = [[5], [6, 7], [8, 9, 10]], [[2, 1], [3], [4]]
    whole = completions(prompts, responses, left=False)
    parts = [completions(prompts[i : i + 1], responses[i : i + 1], left=False) for i in range(3)]
    assert_equal(concatenate(parts, left=False), whole)
    assert_equal(concatenate([select(whole, torch.tensor([i])) for i in range(3)], left=False), whole)


def test_to_device_moves_every_tensor() -> None:
    there = to_device(FOUR, torch.device("meta"))
    assert there.prompts == FOUR.prompts
    assert {
        getattr(there, name).device.type for name in Completions.__slots__ if name not in ("prompts", "responses")
    } == {"meta"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Judged(Completions):
    """A record with one field more: neither its name nor its second dimension makes it a field of prompt tokens."""

    prompt_scores: torch.Tensor  # [N, K]


def test_only_a_declared_token_axis_is_cut_or_padded() -> None:
    scores = torch.arange(12.0).view(4, 3)
    judged = Judged(**{name: getattr(FOUR, name) for name in Completions.__slots__}, prompt_scores=scores)
    parts = [select(judged, torch.tensor(rows)) for rows in ([1], [0, 3])]
    assert torch.equal(parts[0].prompt_scores, scores[[1]])
    assert torch.equal(concatenate(parts).prompt_scores, scores[[1, 0, 3]])


@pytest.mark.parametrize("record", [Completions, Rollout, Experience])
def test_every_field_of_tokens_declares_its_axis(record: type) -> None:
    """The names of the fields say it, too, but only the metadata is used."""
    axes = {field.name: field.metadata.get(AXIS) for field in dataclasses.fields(record)}
    per_sample = {"prompts", "responses", "finished", "group", "scores", "score_std", "shaped_scores"}
    of_prompt = {"prompt_ids", "prompt_mask"}
    for name, axis in axes.items():
        assert axis == (None if name in per_sample else "prompt" if name in of_prompt else "response"), name


def assert_equal(one: Completions, two: Completions) -> None:
    for name in Completions.__slots__:
        a, b = getattr(one, name), getattr(two, name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name
