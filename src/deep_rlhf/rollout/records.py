"""Selects, concatenates and moves records of samples, keeping to the paddings that `types` promises."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from deep_rlhf.types import AXIS, Completions, Experience, Rollout

Record = TypeVar("Record", bound=Completions)


def select(record: Record, rows: Tensor) -> Record:
    """The samples `rows` [n] of a record, without the columns that are padding for all of them."""
    columns = {
        "prompt": record.prompt_mask[rows].any(0),
        "response": record.response_mask[rows].any(0),
    }
    selected: dict[str, Any] = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, list):
            selected[field.name] = [value[row] for row in rows.tolist()]
        elif AXIS in field.metadata:
            selected[field.name] = value[rows][:, columns[field.metadata[AXIS]]]
        else:
            selected[field.name] = value[rows]
    return dataclasses.replace(record, **selected)


def concatenate(records: Sequence[Record], *, left: bool = True) -> Record:
    """All samples of several records as one, padded to the longest: prompts on the left or right, responses right.

    `left` is False for an encoder-decoder, as in `collect.prompt_batch`.
    """
    concatenated: dict[str, Any] = {}
    for field in dataclasses.fields(records[0]):
        values = [getattr(record, field.name) for record in records]
        if isinstance(values[0], list):
            concatenated[field.name] = [item for value in values for item in value]
            continue
        if AXIS in field.metadata:
            width = max(value.shape[1] for value in values)
            on_the_left = left and field.metadata[AXIS] == "prompt"
            values = [_padded(value, width, left=on_the_left) for value in values]
        concatenated[field.name] = torch.cat(values)
    return dataclasses.replace(records[0], **concatenated)


def experience_from(rollout: Rollout, **targets: Tensor) -> Experience:
    """The rollout with its rewards, advantages and returns [N, R] or [N, 1], set to 0 outside the response mask."""
    fields: dict[str, Any] = {field.name: getattr(rollout, field.name) for field in dataclasses.fields(Rollout)}
    for name, values in targets.items():
        fields[name] = torch.where(rollout.response_mask, values, torch.zeros_like(rollout.kl))
    return Experience(**fields)


def to_device(record: Record, device: torch.device) -> Record:
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
