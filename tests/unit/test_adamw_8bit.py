"""8-bit AdamW: near the 32-bit one, a quarter of its state, and resumed to the last bit."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deep_rlhf.errors import ResourceError
from deep_rlhf.runtime.checkpoint import latest_checkpoint, save_checkpoint
from deep_rlhf.runtime.optimisers.adamw import make_adamw
from deep_rlhf.runtime.optimisers.master import MasterOptimizer

adamw_8bit = pytest.importorskip(
    "deep_rlhf.runtime.optimisers.adamw_8bit", reason="no bitsandbytes", exc_type=ImportError
)

SHAPES = [
    (adamw_8bit.VALUES_PER_TENSOR // 512 + 3, 512),
    (64, 96),
    (40,),
]  # in two parts, in one, and too small for 8 bits
OPTIONS = {"lr": 1e-2, "eps": 1e-5, "weight_decay": 0.0}


def weights(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def take_steps(optimizer: MasterOptimizer, parameters: list[nn.Parameter], steps: range) -> None:
    """Towards a target of each weight, along gradients with noise."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        loss = sum(((p.float() - torch.randn(p.shape, generator=generator) - 3) ** 2).sum() for p in parameters)
        loss.backward()
        optimizer.step()


def state_bytes(optimizer: MasterOptimizer) -> int:
    tensors = {id(t): t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)}
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_close_to_32_bit_adamw_with_a_quarter_of_its_state(dtype: torch.dtype) -> None:
    ends, sizes = [], []
    for name in ("adamw", "adamw_8bit"):
        parameters = weights(dtype)
        optimizer = make_adamw(name, parameters, **OPTIONS)
        take_steps(optimizer, parameters, range(20))
        ends.append(torch.cat([parameter.detach().float().flatten() for parameter in parameters]))
        sizes.append(state_bytes(optimizer))
    start = torch.cat([parameter.detach().float().flatten() for parameter in weights(dtype)])
    moved, apart = (ends[0] - start).norm(), (ends[0] - ends[1]).norm()
    assert 0 < apart < 0.05 * moved
    assert sizes[1] < 0.27 * sizes[0]


def test_tensors_in_parts_are_all_stepped_and_the_gradients_freed() -> None:
    parameters = weights(torch.float32)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = make_adamw("adamw_8bit", parameters, **OPTIONS)
    take_steps(optimizer, parameters, range(1))
    for parameter, old in zip(parameters, before, strict=True):
        torch.testing.assert_close((parameter - old).abs(), torch.full_like(old, OPTIONS["lr"]), rtol=1e-3, atol=1e-4)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in parameters)
    assert all(part.grad is None for group in optimizer.param_groups for part in group["params"])


def test_a_parameter_without_a_gradient_stays() -> None:
    parameters = weights(torch.float32)
    optimizer = make_adamw("adamw_8bit", parameters, **OPTIONS)
    before = parameters[0].detach().clone()
    take_steps(optimizer, parameters[1:], range(2))
    assert torch.equal(parameters[0], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_resumed_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    parameters = weights(dtype)
    optimizer = make_adamw("adamw_8bit", parameters, **OPTIONS)
    take_steps(optimizer, parameters, range(3))
    saved: dict[str, Any] = {"weights": [p.detach() for p in parameters], "adam": optimizer.state_dict()}
    save_checkpoint(tmp_path, 3, saved)
    take_steps(optimizer, parameters, range(3, 6))

    found = latest_checkpoint(tmp_path)
    assert found is not None
    resumed = weights(dtype)
    optimizer = make_adamw("adamw_8bit", resumed, **OPTIONS)
    with torch.no_grad():
        for parameter, weight in zip(resumed, found.state["weights"], strict=True):
            parameter.copy_(weight)
    optimizer.load_state_dict(found.state["adam"])
    take_steps(optimizer, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(parameters, resumed, strict=True))


def test_without_bitsandbytes_it_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "deep_rlhf.runtime.optimisers.adamw_8bit")  # imports it anew
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ResourceError, match=r"optimizer=adamw_8bit\b.*\bbitsandbytes\b.*'deep-rlhf\[8bit\]'"):
        make_adamw("adamw_8bit", weights(torch.float32))
