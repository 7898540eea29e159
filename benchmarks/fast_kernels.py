"""Times each of this project's CPU kernels: `python benchmarks/fast_kernels.py` (a minute on two cores).

The sizes are those of the PPO job of docs/speed.md. Each figure is the fastest of several calls, in milliseconds; for
training, a call is a forward and a backward pass.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.activations import NewGELUActivation

from deep_rlhf.accel.cpu.attention import FastAttention
from deep_rlhf.accel.cpu.kernels import use_fast_kernels
from deep_rlhf.accel.cpu.packed import packed_weights
from deep_rlhf.ops.logprobs import chunked_token_logprobs, token_logprobs
from deep_rlhf.runtime.precision import multiplies_bf16

THREADS, CALLS = 2, 9
HEADS, HEAD_WIDTH = 6, 64
WIDTH = HEADS * HEAD_WIDTH
TOKENS = 334  # with logits of 64 MiB in float32

Row = tuple[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="try the script with small sizes")
    vocabulary = 500 if parser.parse_args().quick else 50_258
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    formats = [torch.float32] + [torch.bfloat16] * multiplies_bf16(torch.device("cpu"))
    columns = [list(cases(dtype, vocabulary)) for dtype in formats]
    names = [f"{name}, {way}" for name in ("fp32", "bf16")[: len(formats)] for way in ("plain", "here")]
    write = sys.stdout.write
    write(f"| milliseconds | {' | '.join(names)} |\n|{'---|' * (1 + len(names))}\n")
    for rows in zip(*columns, strict=True):
        figures = [figure for _, pair in rows for figure in pair]
        write(f"| {rows[0][0]} | {' | '.join(f'{figure:.1f}' for figure in figures)} |\n")


def cases(dtype: torch.dtype, vocabulary: int) -> Iterator[Row]:
    """The name of each case, with the milliseconds of plain PyTorch and of this project."""
    plain = nn.Linear(WIDTH, vocabulary, bias=False).to(dtype)
    fast = nn.Sequential(copy.deepcopy(plain))
    use_fast_kernels(fast)
    for rows in (16, 32, 64):
        few = torch.randn(rows, WIDTH, dtype=dtype)
        with torch.no_grad():
            unpacked = milliseconds(lambda few=few: plain(few))
            with packed_weights(fast):
                yield f"sampling: head, {rows} rows", [unpacked, milliseconds(lambda few=few: fast(few))]
    yield from _attention(dtype, "sampling: attention, 32 × 1 token to 190", (32, 1, 190), trains=False)

    states = torch.randn(TOKENS, WIDTH, dtype=dtype).requires_grad_()
    along = torch.randn(TOKENS, vocabulary, dtype=dtype)
    fast[0].adds_gradients = True
    for layer in (plain, fast[0]):
        layer.weight.grad_dtype = torch.float32
    figures = [trained(lambda layer=layer: layer(states), along) for layer in (plain, fast)]
    yield f"training: head, {TOKENS} tokens", figures
    yield from _attention(dtype, "training: attention, 5 × 147 tokens", (5, 147, 147), trains=True)

    logits, ids = torch.randn(TOKENS, vocabulary, dtype=dtype), torch.randint(vocabulary, (TOKENS,))
    gradient = torch.randn(TOKENS)
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda leaf: token_logprobs(leaf, ids, 0.7),
        lambda leaf: chunked_token_logprobs(leaf, nn.Identity(), ids, temperature=0.7, chunk_size=TOKENS),
    ]
    figures = [trained(lambda way=way: way(logits.detach().requires_grad_()), gradient) for way in ways]
    yield f"training: log-probabilities of {TOKENS} tokens", figures

    hidden, onwards = (torch.randn(1024, 4 * WIDTH, dtype=dtype) for _ in range(2))
    gelus = [NewGELUActivation(), nn.GELU(approximate="tanh")]
    figures = [trained(lambda gelu=gelu: gelu(hidden.detach().requires_grad_()), onwards) for gelu in gelus]
    yield "training: GELU, 1024 tokens", figures


def _attention(dtype: torch.dtype, name: str, sizes: tuple[int, int, int], *, trains: bool) -> Iterator[Row]:
    rows, queries, keys = sizes
    shape = (rows, HEADS, queries, HEAD_WIDTH)
    query, along = (torch.randn(shape, dtype=dtype) for _ in range(2))
    key, value = (torch.randn(rows, HEADS, keys, HEAD_WIDTH, dtype=dtype) for _ in range(2))
    mask = torch.ones(rows, 1, queries, keys, dtype=torch.bool).tril(keys - queries)

    def attend() -> Tensor:
        given: list[Any] = [tensor.detach().requires_grad_(trains) for tensor in (query, key, value)]
        return scaled_dot_product_attention(*given, attn_mask=mask)

    figures = []
    for context in (nullcontext(), FastAttention()):
        with context:
            figures.append(trained(attend, along) if trains else milliseconds(attend))
    yield name, figures


def trained(forward: Callable[[], Tensor], along: Tensor) -> float:
    """Milliseconds of a forward and a backward pass."""
    return milliseconds(lambda: forward().backward(along))


def milliseconds(call: Callable[[], Any]) -> float:
    """Of the fastest of some calls."""
    call()
    fastest = float("inf")
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - start)
    return 1000 * fastest


if __name__ == "__main__":
    main()
