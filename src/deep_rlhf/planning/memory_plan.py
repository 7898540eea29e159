"""A memory plan: the machine, the phases of a run in bytes, and how the bytes are counted.

Weights, gradients and optimiser state are counted directly. The temporary memory of a pass is measured by running the
pass on PyTorch's meta tensors, which have shapes and dtypes but no data: `LiveBytes` sums those that are alive.
"""

import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deep_rlhf.errors import ConfigError
from deep_rlhf.models.validation import opening
from deep_rlhf.runtime.memory import usable_memory
from deep_rlhf.runtime.optimisers.adamw import OptimizerName
from deep_rlhf.runtime.precision import Precision, compute_dtype, hidden_width, multiplies_bf16

GIB = 2**30
GRADIENT_BYTES = 4  # per trained weight: gradients are float32 whatever the weight's dtype
MOMENT_BYTES = {"adamw": 8, "adamw_8bit": 2}  # per trained weight: both of Adam's moments
aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Machine:
    """A GPU or CPU: usable `memory` in bytes, and whether it has matrix instructions for bfloat16."""

    name: str
    memory: int
    has_bf16: bool
    is_gpu: bool = True

    def dtype(self, precision: Precision, model: Any) -> torch.dtype:
        """The dtype that `model` computes in on this machine."""
        return compute_dtype(precision, self.has_bf16, hidden_width(model))


GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        Machine("T4", int(14.6 * GIB), has_bf16=False),
        Machine("L4", int(22.0 * GIB), has_bf16=True),
        Machine("A100", int(39.4 * GIB), has_bf16=True),  # the one with 40 GB; for 80 GB give --gpu=79GiB
        Machine("H200", int(139.7 * GIB), has_bf16=True),
    )
}


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of a run, and the memory of each part in it: {part: bytes}."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The phases of a run; the largest one decides how much memory the run needs."""

    phases: tuple[Phase, ...]

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        return self.largest.total

    @property
    def parts(self) -> list[str]:
        """The names of all parts that take memory, in the order in which they were given."""
        names = dict.fromkeys(name for phase in self.phases for name in phase.parts)
        return [name for name in names if any(phase.parts.get(name) for phase in self.phases)]


def gpu_of(text: str) -> Machine:
    """The GPU for a name of a known card or a size such as 24GiB or 80GB. Raises ConfigError for anything else."""
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB)", text, flags=re.IGNORECASE)
    if size is None or float(size[1]) == 0:
        known = ", ".join(gpu.name for gpu in GPUS.values())
        raise ConfigError(f"--gpu must be one of {known}, or a size such as 24GiB or 80GB, not '{text}'.")
    unit = GIB if size[2].lower() == "gib" else 10**9
    return Machine(f"a GPU with {text}", int(float(size[1]) * unit), has_bf16=True)


def this_machine() -> Machine:
    """The CPU and main memory of this machine, or the part of it that a container may use."""
    has_bf16 = multiplies_bf16(torch.device("cpu"))
    return Machine("the main memory of this machine", usable_memory(), has_bf16, is_gpu=False)


def bytes_of(modules: Iterable[nn.Module]) -> int:
    """The bytes of parameters and buffers; shared storages count once."""
    storages = [tensor.untyped_storage() for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def optimizer_bytes(parameters: Iterable[nn.Parameter], name: OptimizerName = "adamw") -> int:
    """The bytes of Adam's moments, and of the float32 masters of bfloat16 parameters."""
    return sum(
        (MOMENT_BYTES[name] + (0 if parameter.dtype == torch.float32 else 4)) * parameter.numel()
        for parameter in parameters
    )


def meta_model(auto: Any, config: Any, **options: Any) -> Any:
    """The float32 model that the transformers class `auto` makes from a configuration, on the meta device.

    Raises ModelError if there is none.
    """
    with opening("model", config.name_or_path), torch.device("meta"):
        return auto.from_config(config, dtype=torch.float32, **options)


def forward_bytes(classifier: nn.Module, rows: int, length: int) -> int:
    """The temporary bytes of a classifier for `rows` texts of `length` tokens, without gradients."""
    ids = torch.zeros(rows, length, dtype=torch.int64, device="meta")

    @torch.no_grad()
    def forward() -> None:
        classifier(input_ids=ids, attention_mask=torch.ones_like(ids))

    return temporary_bytes(forward)


def training_bytes(backward: Callable[[], None], parameters: Iterable[nn.Parameter]) -> int:
    """The temporary bytes of a forward and backward pass, without the gradients of the `parameters`."""
    for parameter in parameters:
        if parameter.dtype != torch.float32:
            parameter.grad_dtype = torch.float32
        parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)  # they exist before the pass
    return temporary_bytes(backward)


def temporary_bytes(work: Callable[[], Any]) -> int:
    """The peak of the bytes of all tensors that `work` creates on the meta device."""
    with torch.library._scoped_library("aten", "IMPL") as library, LiveBytes() as live:
        library.impl("scaled_dot_product_attention", _fused_attention, "AutogradMeta")
        work()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors created in this context and still alive: `now`, and its maximum, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WITHOUT_DATA:
            return _WITHOUT_DATA[func](*args)
        self._known.update(_storages((args, kwargs)))  # tensors from before, which `func` may return
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
    """Attention that keeps its inputs, its output and a number per row for the backward pass, as on a CPU or GPU.

    PyTorch's own attention for meta tensors keeps more.
    """
    if enable_gqa:
        key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (key, value))
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype)
        if attn_mask.requires_grad:  # learned positions, as in T5: no fused kernel supports them
            unfused = aten._scaled_dot_product_attention_math
            return unfused(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)[0]
    fused = aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


# Operators that need data: a check passes, a mask is all True, and no two rows are equal.
_WITHOUT_DATA: dict[Any, Callable[..., Any]] = {
    aten.allclose.default: lambda *_: True,
    aten._local_scalar_dense.default: lambda _: True,
    aten.unique_dim.default: lambda rows, *_: (rows, torch.arange(len(rows), device=rows.device), rows[:0]),
}
