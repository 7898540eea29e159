"""Batches of like length under a budget of padded tokens, so that little is computed for padding."""

from collections.abc import Sequence


def token_budget_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of `lengths`, longest first, cut into batches with count × longest ≤ `budget` tokens (at least one each).

    Longest first, so that the batch that needs the most memory is met first.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
