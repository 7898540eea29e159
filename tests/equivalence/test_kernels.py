"""Fast kernels and in-place gradients compared with plain transformers and autograd."""

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from deep_rlhf.accel.cpu.attention import FastAttention
from deep_rlhf.accel.cpu.gradients import gradients_in_place
from deep_rlhf.accel.cpu.kernels import use_fast_kernels
from deep_rlhf.runtime.precision import multiplies_bf16

needs_bf16 = pytest.mark.skipif(not multiplies_bf16(torch.device("cpu")), reason="this CPU does not multiply bfloat16")
FORMATS = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(24, 40), nn.Linear(24, 40, bias=False), Conv1D(40, 24)]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("which", range(3))
def test_a_linear_layer_and_its_gradients(which: int, dtype: torch.dtype) -> None:
    plain = layers()[which].to(dtype)
    fast = nn.Sequential(copy.deepcopy(plain))
    use_fast_kernels(fast)
    assert type(fast[0]) is not type(plain)
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(given) for layer, given in zip((plain, fast), inputs, strict=True)]
    along = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(2)).to(dtype)
    for output in outputs:
        output.backward(along)
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(outputs[1], outputs[0], **close)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **close)
    for mine, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, **close)


def test_gelu_computed_in_python() -> None:
    fast = nn.Sequential(NewGELUActivation())
    use_fast_kernels(fast)
    x = torch.linspace(-4, 4, 101)
    assert isinstance(fast[0], nn.GELU)
    torch.testing.assert_close(fast(x), NewGELUActivation()(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5"])
def test_gradients_added_in_place_are_those_of_autograd(
    make_model: Callable[..., Any], architecture: str, dtype: torch.dtype
) -> None:
    """In two passes, so that the second one adds to existing gradients; the embeddings are tied to the head."""
    model = make_model(architecture).eval()
    use_fast_kernels(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.grad_dtype = torch.float32

    def gradients(passes: Callable[[Tensor], None]) -> dict[str, Tensor]:
        model.zero_grad()
        for seed in (1, 2):
            passes(torch.randint(5, 40, (3, 7), generator=torch.Generator().manual_seed(seed)))
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    def backward(ids: Tensor) -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    def in_place(ids: Tensor) -> None:
        with gradients_in_place(model):
            backward(ids)

    expected, found = gradients(backward), gradients(in_place)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        scale = expected[name].abs().max().clamp(min=1e-3)
        torch.testing.assert_close(gradient / scale, expected[name] / scale, atol=TOLERANCE[dtype], rtol=0)
    assert not any(getattr(module, "adds_gradients", False) for module in model.modules())  # autograd has it back


def test_embedding_gradients_are_added_at_the_end_unless_a_pass_failed() -> None:
    table = nn.Embedding(40, 3)
    model = nn.Sequential(table)
    model.get_input_embeddings = lambda: table  # type: ignore[assignment]
    with gradients_in_place(model):
        model(torch.tensor([1, 2, 2])).sum().backward()
        assert table.weight.grad is None
        model(torch.tensor([2, 39])).sum().backward()
    expected = torch.zeros(40, 3)
    expected[1], expected[2], expected[39] = 1, 3, 1
    assert torch.equal(table.weight.grad, expected)
    table.weight.grad = None
    with suppress(MemoryError), gradients_in_place(model):
        model(torch.tensor([5])).sum().backward()
        raise MemoryError
    assert table.weight.grad is None


@pytest.mark.parametrize("hooked", [0, 1])
def test_a_hook_on_a_weight_gets_its_gradient(hooked: int) -> None:
    model = nn.Sequential(nn.Embedding(5, 24), nn.Linear(24, 40))
    model.get_input_embeddings = lambda: model[0]  # type: ignore[assignment]
    use_fast_kernels(model)
    seen: list[Tensor] = []
    model[hooked].weight.register_hook(seen.append)
    with gradients_in_place(model):
        model(torch.tensor([1, 2])).sum().backward()
    torch.testing.assert_close(seen[0], model[hooked].weight.grad)


@needs_bf16
@pytest.mark.parametrize("masked", ["causal", "bool", "float", "none"])
@pytest.mark.parametrize("queries", [1, 9])
def test_attention_by_matrix_products(queries: int, masked: str) -> None:
    """Forward and backward in bfloat16, compared with the fused kernel in float32."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, 3, size, 16, generator=generator) for size in (queries, 9, 9)]
    along = torch.randn(2, 3, queries, 16, generator=generator)
    options: dict[str, Any] = {"is_causal": masked == "causal", "scale": 0.3}
    if masked in ("bool", "float"):
        seen = torch.rand(2, 1, queries, 9, generator=generator) < 0.5
        seen[..., 0] = True
        options["attn_mask"] = seen if masked == "bool" else torch.where(seen, 0.0, torch.finfo(torch.bfloat16).min)

    def attend(dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(torch.bfloat16).to(dtype).requires_grad_() for tensor in given]
        mask = options.get("attn_mask")
        mask = mask.to(dtype) if mask is not None and mask.dtype != torch.bool else mask
        out = scaled_dot_product_attention(*leaves, **options | {"attn_mask": mask})
        out.backward(along.to(dtype))
        with torch.no_grad():
            alone = scaled_dot_product_attention(*leaves, **options | {"attn_mask": mask})
        return [tensor.float() for tensor in (out.detach(), alone, *(leaf.grad for leaf in leaves))]

    expected = attend(torch.float32)
    with FastAttention():
        found = attend(torch.bfloat16)
    assert not all(torch.equal(ours, fused) for ours, fused in zip(found, attend(torch.bfloat16), strict=True))
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, exact, atol=3e-2, rtol=3e-2)


@needs_bf16
def test_a_learned_mask_gets_its_gradient() -> None:
    query, key, value = (torch.randn(1, 2, 4, 8).bfloat16().requires_grad_() for _ in range(3))
    bias = torch.zeros(1, 2, 4, 4).bfloat16().requires_grad_()
    with FastAttention():
        scaled_dot_product_attention(query, key, value, attn_mask=bias).float().square().sum().backward()
    assert bias.grad is not None
    assert bias.grad.any()
