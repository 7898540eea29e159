"""Which number format a run computes in, and optimisers that keep float32 master weights behind bfloat16 ones."""

import copy
import importlib.util
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deep_rlhf.errors import UserError

M = TypeVar("M", bound=nn.Module)

Precision = Literal["auto", "fp32", "bf16"]
OptimizerName = Literal["adamw", "adamw_8bit"]

WIDE_ENOUGH = 256  # hidden width from which bf16 was measured to be faster; a narrow model spends its time elsewhere


def compute_dtype(precision: Precision, has_bf16: bool, width: int) -> torch.dtype:
    """The format that models of hidden size `width` compute in; "auto" is bf16 where the hardware multiplies it."""
    if precision == "auto":
        precision = "bf16" if has_bf16 and width >= WIDE_ENOUGH else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def hidden_width(model: Any) -> int:
    """The hidden size of a transformers model or a peft.PeftModel around one; 0 if its configuration names none."""
    return getattr(model.config, "hidden_size", 0)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has matrix instructions for bfloat16, rather than emulating them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def cast_weights(module: nn.Module, dtype: torch.dtype, *, frozen_only: bool = False) -> None:
    """Casts the parameters in place; buffers stay, since rotary frequencies in bfloat16 would misplace far tokens.

    Quantised parameters, which are integers, stay too.
    """
    for parameter in module.parameters():
        if parameter.is_floating_point() and not (frozen_only and parameter.requires_grad):
            parameter.data = parameter.data.to(dtype)


def cast_around_table(model: Any, dtype: torch.dtype) -> list[RemovableHandle]:
    """Casts a model's weights in place, but for the table of token embeddings where that is trained.

    Its gradient sums over every occurrence of a token. What is read from it is cast, until the handles are removed.
    """
    weight = model.get_input_embeddings().weight
    table = weight.data
    cast_weights(model, dtype)
    if dtype == torch.float32 or not weight.requires_grad:
        return []
    weight.data = table.clone()  # the original may keep a mapped file of all weights in memory
    readers = [module for module in model.modules() if isinstance(module, nn.Embedding) and module.weight is weight]
    return [reader.register_forward_hook(lambda _, __, embedded: embedded.to(dtype)) for reader in readers]


def frozen_copy(module: M, dtype: torch.dtype, device: torch.device) -> M:
    """A copy without gradients on `device`, its parameters in `dtype`; no second copy of the originals is made."""
    memo = {
        id(parameter): nn.Parameter(parameter.detach().to(device, dtype, copy=True), requires_grad=False)
        for parameter in module.parameters()
    }
    return copy.deepcopy(module, memo).to(device)


def require_bitsandbytes(option: str) -> None:
    """Raises UserError if the library that `option` needs is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{option} needs bitsandbytes, which is not installed: pip install bitsandbytes.")


def make_adamw(name: OptimizerName, params: Iterable[Any], **options: Any) -> "MasterOptimizer":
    """AdamW with moments in float32, or in 8 bits; `options` are torch's. Raises UserError without bitsandbytes."""
    if name == "adamw":
        return MasterAdamW(params, **options)
    require_bitsandbytes(f"optimizer={name}")
    from deep_rlhf.runtime.optimisers.adamw_8bit import MasterAdamW8bit

    return MasterAdamW8bit(params, **options)


class _Lent(NamedTuple):
    """A parameter that is stepped through others."""

    parameter: nn.Parameter
    master: nn.Parameter  # float32; the parameter itself if that is float32
    parts: list[nn.Parameter]  # of the master's storage, in order: what the optimiser knows


class MasterOptimizer(torch.optim.Optimizer):
    """Before an optimiser in the order of bases: it steps float32 masters of parameters that may be bfloat16.

    A bf16 parameter collects its gradient in float32 and becomes its master, rounded, after each step (Micikevicius et
    al. 2018). A float32 parameter is its own master. The masters are part of `state_dict`.
    """

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(params, **options)
        self._lent: list[_Lent] = []
        for group in self.param_groups:
            group["params"] = [part for parameter in group["params"] for part in self._stepped(parameter)]
        self.register_step_pre_hook(self._lend_gradients)
        self.register_step_post_hook(self._round)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients of the model's parameters."""
        super().zero_grad(set_to_none)
        for lent in self._lent:
            lent.parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """As the optimiser's own, with the masters of the bf16 parameters in order."""
        return {**super().state_dict(), "masters": [master.detach() for _, master in self.masters()]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; the parameters become their masters, rounded."""
        saved: list[Tensor] = state_dict["masters"]
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "masters"})
        for (parameter, master), tensor in zip(self.masters(), saved, strict=True):
            master.copy_(tensor)
            parameter.copy_(master)

    def masters(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Every parameter that is not float32, with its master."""
        return [(lent.parameter, lent.master) for lent in self._lent if lent.master is not lent.parameter]

    def _parts(self, master: nn.Parameter) -> list[nn.Parameter]:
        """What is stepped as one tensor each; together they are the master's storage."""
        return [master]

    def _stepped(self, parameter: nn.Parameter) -> list[nn.Parameter]:
        master = parameter
        if parameter.dtype != torch.float32:
            parameter.grad_dtype = torch.float32
            master = nn.Parameter(parameter.detach().float())
        parts = self._parts(master)
        if parts[0] is not parameter:
            self._lent.append(_Lent(parameter, master, parts))
        return parts

    def _lend_gradients(self, *_: Any) -> None:
        for lent in self._lent:
            if lent.parameter.grad is not None:
                gradients = lent.parameter.grad.reshape(-1).split([part.numel() for part in lent.parts])
                for part, gradient in zip(lent.parts, gradients, strict=True):
                    part.grad = gradient.view_as(part)

    @torch.no_grad()
    def _round(self, *_: Any) -> None:
        for lent in self._lent:
            for part in lent.parts:
                part.grad = None
            if lent.master is not lent.parameter:
                lent.parameter.copy_(lent.master)


class MasterAdamW(MasterOptimizer, torch.optim.AdamW):
    """Fused AdamW on the float32 masters of the parameters."""

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(params, fused=True, **options)
