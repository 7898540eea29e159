"""Float32 master weights for an optimiser of bfloat16 parameters (Micikevicius et al. 2018)."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _MasterParam(NamedTuple):
    """A parameter and the float32 tensors that the optimiser steps in its place."""

    parameter: nn.Parameter
    master: nn.Parameter  # float32; the parameter itself if that is float32
    parts: list[nn.Parameter]  # consecutive slices of the master's storage: the optimiser's parameters


class MasterOptimizer(torch.optim.Optimizer):
    """Mix-in before an optimiser class: steps float32 masters of parameters that may be bfloat16.

    A bf16 parameter accumulates its gradient in float32 and is set to its rounded master after each step. A float32
    parameter is its own master. The masters are part of `state_dict`.
    """

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(params, **options)
        self._master_params: list[_MasterParam] = []
        for group in self.param_groups:
            group["params"] = [part for parameter in group["params"] for part in self._make_master(parameter)]
        self.register_step_pre_hook(self._copy_grads_to_masters)
        self.register_step_post_hook(self._round_masters)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of the model's parameters."""
        super().zero_grad(set_to_none)
        for entry in self._master_params:
            entry.parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's own state, and the masters of the bf16 parameters in order."""
        return {**super().state_dict(), "masters": [master.detach() for _, master in self.masters()]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, and sets the parameters to their rounded masters."""
        saved: list[Tensor] = state_dict["masters"]
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "masters"})
        for (parameter, master), tensor in zip(self.masters(), saved, strict=True):
            master.copy_(tensor)
            parameter.copy_(master)

    def masters(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Every parameter that is not float32, with its master."""
        return [(entry.parameter, entry.master) for entry in self._master_params if entry.master is not entry.parameter]

    def _split_master(self, master: nn.Parameter) -> list[nn.Parameter]:
        """Slices of the master's storage, each of which the optimiser steps as one tensor."""
        return [master]

    def _make_master(self, parameter: nn.Parameter) -> list[nn.Parameter]:
        """The float32 tensors that the optimiser steps for a parameter."""
        master = parameter
        if parameter.dtype != torch.float32:
            parameter.grad_dtype = torch.float32
            master = nn.Parameter(parameter.detach().float())
        parts = self._split_master(master)
        if parts[0] is not parameter:
            self._master_params.append(_MasterParam(parameter, master, parts))
        return parts

    def _copy_grads_to_masters(self, *_: Any) -> None:
        for entry in self._master_params:
            if entry.parameter.grad is not None:
                gradients = entry.parameter.grad.reshape(-1).split([part.numel() for part in entry.parts])
                for part, gradient in zip(entry.parts, gradients, strict=True):
                    part.grad = gradient.view_as(part)

    @torch.no_grad()
    def _round_masters(self, *_: Any) -> None:
        """Sets the parameters to their rounded masters and drops the masters' gradients."""
        for entry in self._master_params:
            for part in entry.parts:
                part.grad = None
            if entry.master is not entry.parameter:
                entry.parameter.copy_(entry.master)
