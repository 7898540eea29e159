"""Takes rows of a record, and joins records, keeping to the paddings that `types` promises."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from deep_rlhf.types import Completions, Experience, Rollout

Record = TypeVar("Record", bound=Completions)


def select(record: Record, rows: Tensor) -> Record:
    """The samples `rows` [n] of a record, without the columns that are padding for all of them."""
    columns = {
        "prompt": record.prompt_mask[rows].any(0),
        "response": record.response_mask[rows].any(0),
    }
    chosen: dict[str, Any] = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, list):
            chosen[field.name] = [value[row] for row in rows.tolist()]
        elif value.dim() == 2:
            side = "prompt" if field.name.startswith("prompt_") else "response"
            chosen[field.name] = value[rows][:, columns[side]]
        else:
            chosen[field.name] = value[rows]
    return dataclasses.replace(record, **chosen)


def concatenate(records: Sequence[Record], *, left: bool = True) -> Record:
    """All samples of several records as one, padded to the longest: prompts on the left or right, responses right.

    `left` is False for an encoder-decoder, as in `collect.prompt_batch`: absolute positions of its prompts start there.
    """
    joined: dict[str, Any] = {}
    for field in dataclasses.fields(records[0]):
        values = [getattr(record, field.name) for record in records]
        if isinstance(values[0], list):
            joined[field.name] = [item for value in values for item in value]
            continue
        if values[0].dim() == 2:
            width = max(value.shape[1] for value in values)
            on_the_left = left and field.name.startswith("prompt_")
            values = [_padded(value, width, left=on_the_left) for value in values]
        joined[field.name] = torch.cat(values)
    return dataclasses.replace(records[0], **joined)


def experience_from(rollout: Rollout, **targets: Tensor) -> Experience:
    """The rollout with its rewards, advantages and returns [N, R], set to 0 outside the mask."""
    fields: dict[str, Any] = {field.name: getattr(rollout, field.name) for field in dataclasses.fields(Rollout)}
    for name, values in targets.items():
        fields[name] = torch.where(rollout.response_mask, values, torch.zeros_like(rollout.kl))
    return Experience(**fields)


def moved(record: Record, device: torch.device) -> Record:
    """The record with every tensor on `device`."""
    tensors: dict[str, Any] = {
        field.name: value.to(device)
        for field in dataclasses.fields(record)
        if isinstance(value := getattr(record, field.name), Tensor)
    }
    return dataclasses.replace(record, **tensors)


def _padded(values: Tensor, width: int, *, left: bool) -> Tensor:
    missing = width - values.shape[1]
    return pad(values, (missing, 0) if left else (0, missing))
