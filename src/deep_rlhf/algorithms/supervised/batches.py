"""The order of the data: which examples each process reads in which batch."""

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

Batch = dict[str, Tensor]
Collate = Callable[[list[Any]], Batch]


def epoch_order(count: int, *, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """The rows 0 … count − 1 in the order of one epoch, the same in every process."""
    if not shuffle:
        return list(range(count))
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


def batches_of_process(
    order: Sequence[int], batch_size: int, *, rank: int = 0, processes: int = 1, drop_last: bool = False
) -> list[list[int]]:
    """The batches of process `rank`, which takes every `processes`-th one.

    With several processes all have the same number of full batches: rows from the beginning fill the last ones. One
    process has a shorter last batch. `drop_last` leaves out what does not fill a batch in every process.
    """
    together = batch_size * processes
    if drop_last:
        order = order[: len(order) // together * together]
    elif processes > 1:
        order = list(islice(cycle(order), -(-len(order) // together) * together))
    batches = [list(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]
    return batches[rank::processes]


def in_order_of_rows(parts: Sequence[Sequence[Tensor]], count: int) -> Tensor:
    """Joins the batches of all processes (`batches_of_process` of rows in order) to one tensor [count, …]."""
    return torch.cat([batch for batches in zip(*parts, strict=True) for batch in batches])[:count]


def read_batches(
    features: Sequence[Any], batches: list[list[int]], collate: Collate, device: torch.device
) -> Iterator[Batch]:
    """An iterator over the collated batches on `device`.

    Creating it draws one number from torch's generator, as every DataLoader does: dropout depends on it.
    """
    loader: Any = DataLoader(features, batch_sampler=batches, collate_fn=collate)  # type: ignore[arg-type]
    iterator = iter(loader)
    return ({name: values.to(device) for name, values in batch.items()} for batch in iterator)
