"""How much memory a run will take: parts and phases in bytes, and what there is to hold them.

Most of it is counted. What a pass over a model takes for a moment is found by doing the pass without data: PyTorch's
meta tensors have shapes and formats but no memory, and `LiveBytes` adds up those that are alive.
"""

import os
import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deep_rlhf.errors import UserError
from deep_rlhf.runtime.precision import OptimizerName, Precision, compute_dtype, hidden_width, multiplies_bf16

GIB = 2**30
GRADIENT_BYTES = 4  # per trained weight: gradients are float32 whatever the weight is
MOMENT_BYTES = {"adamw": 8, "adamw_8bit": 2}  # Adam's two
aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Machine:
    """What a run computes on: `memory` in bytes as programs get to see it, and whether it multiplies bfloat16."""

    name: str
    memory: int
    has_bf16: bool
    is_gpu: bool = True

    def dtype(self, precision: Precision, model: Any) -> torch.dtype:
        """What `model` computes in on this machine."""
        return compute_dtype(precision, self.has_bf16, hidden_width(model))


GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        Machine("T4", int(14.6 * GIB), has_bf16=False),
        Machine("L4", int(22.0 * GIB), has_bf16=True),
        Machine("A100", int(39.4 * GIB), has_bf16=True),  # that of 40 GB; the other is --gpu=79GiB
        Machine("H200", int(139.7 * GIB), has_bf16=True),
    )
}


@dataclass(frozen=True, slots=True)
class Phase:
    """A time of a run, and what takes memory in it: {part: bytes}."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The phases of a run; the largest says how much memory it takes."""

    phases: tuple[Phase, ...]

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        return self.largest.total

    @property
    def parts(self) -> list[str]:
        """The names of all parts that take anything, in the order in which they were given."""
        names = dict.fromkeys(name for phase in self.phases for name in phase.parts)
        return [name for name in names if any(phase.parts.get(name) for phase in self.phases)]


def gpu_of(text: str) -> Machine:
    """The GPU that a user means: a known card, or its memory, such as 24GiB or 80GB. Raises UserError."""
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB)", text, flags=re.IGNORECASE)
    if size is None or float(size[1]) == 0:
        known = ", ".join(gpu.name for gpu in GPUS.values())
        raise UserError(f"--gpu must be one of {known}, or a size such as 24GiB or 80GB, not '{text}'.")
    unit = GIB if size[2].lower() == "gib" else 10**9
    return Machine(f"a GPU with {text}", int(float(size[1]) * unit), has_bf16=True)


def this_machine() -> Machine:
    """The CPU and main memory of this machine, or the part of it that a container may use."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as file:
                memory = min(memory, int(file.read()))
        except (OSError, ValueError):  # no such group, or no limit
            continue
    return Machine("the main memory of this machine", memory, multiplies_bf16(torch.device("cpu")), is_gpu=False)


def bytes_of(modules: Iterable[nn.Module]) -> int:
    """What parameters and buffers take, each storage once."""
    storages = [tensor.untyped_storage() for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def optimizer_bytes(parameters: Iterable[nn.Parameter], name: OptimizerName = "adamw") -> int:
    """Adam's moments, and the float32 masters of bfloat16 parameters."""
    return sum(
        (MOMENT_BYTES[name] + (0 if parameter.dtype == torch.float32 else 4)) * parameter.numel()
        for parameter in parameters
    )


def meta_model(auto: Any, config: Any, **options: Any) -> Any:
    """The float32 model that the transformers class `auto` makes from a configuration, without weights."""
    with torch.device("meta"):
        return auto.from_config(config, dtype=torch.float32, **options)


def forward_bytes(classifier: nn.Module, rows: int, length: int) -> int:
    """What a classifier takes for a moment to judge `rows` texts of `length` tokens, without gradients."""
    ids = torch.zeros(rows, length, dtype=torch.int64, device="meta")

    @torch.no_grad()
    def forward() -> None:
        classifier(input_ids=ids, attention_mask=torch.ones_like(ids))

    return momentary_bytes(forward)


def training_bytes(backward: Callable[[], None], parameters: Iterable[nn.Parameter]) -> int:
    """What a forward and backward pass takes for a moment, beside the gradients of the `parameters`."""
    for parameter in parameters:
        if parameter.dtype != torch.float32:
            parameter.grad_dtype = torch.float32
        parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)  # from the pass before
    return momentary_bytes(backward)


def momentary_bytes(work: Callable[[], Any]) -> int:
    """The most that the tensors which `work` makes on the meta device take at one time."""
    with torch.library._scoped_library("aten", "IMPL") as library, LiveBytes() as live:
        library.impl("scaled_dot_product_attention", _fused_attention, "AutogradMeta")
        work()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Adds up the tensors that are made within and still alive: `now`, and the most at one time, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ANSWERS:
            return _ANSWERS[func](*args)
        self._known.update(_storages((args, kwargs)))  # what was there before, which `func` may return
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _forget(self, nbytes: int) -> None:
        self.now -= nbytes


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Keeps its inputs, its output and a number per row, as on a CPU or a GPU; for meta tensors PyTorch does not."""
    if enable_gqa:
        key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (key, value))
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype)
        if attn_mask.requires_grad:  # positions that are learned, as T5's: no fused kernel takes them
            spelt_out = aten._scaled_dot_product_attention_math
            return spelt_out(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)[0]
    fused = aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


# Questions that tensors without data cannot answer: a check passes, all of a mask is real, and no two rows are equal.
_ANSWERS: dict[Any, Callable[..., Any]] = {
    aten.allclose.default: lambda *_: True,
    aten._local_scalar_dense.default: lambda _: True,
    aten.unique_dim.default: lambda rows, *_: (rows, torch.arange(len(rows), device=rows.device), rows[:0]),
}
