"""Conjugate gradients and the backtracking line search of TRPO (Schulman et al. 2015)."""

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], target: Tensor, *, iterations: int, tolerance: float
) -> Tensor:
    """Solves F x = g for a symmetric positive definite F, using only products F v (appendix C.1).

    product maps v [D] -> F v [D]; target g [D] -> x [D]. Stops after `iterations` products, or when the norm of the
    residual is at most `tolerance` times that of the target. x is exact after D products, up to rounding.
    """
    solution, residual, direction = torch.zeros_like(target), target, target
    squared = residual @ residual
    limit = tolerance * target.norm()
    for _ in range(iterations):
        if squared.sqrt() <= limit:
            break
        image = product(direction)
        length = squared / (direction @ image)
        solution = solution + length * direction
        residual = residual - length * image
        before, squared = squared, residual @ residual
        direction = residual + squared / before * direction
    return solution


def backtracking(evaluate: Callable[[float], tuple[float, float]], *, max_kl: float, attempts: int) -> float:
    """The largest acceptable step fraction out of 1, ½, ¼, … (`attempts` of them), or 0.0 (appendix C).

    evaluate(fraction) moves the parameters by that fraction of the full step from their old values and returns
    (improvement of the surrogate, KL from the old policy in nats). A step is acceptable if improvement > 0 and KL ≤
    max_kl, so never with NaN. If 0.0 is returned, the caller must restore the old parameters; otherwise `evaluate` has
    already moved them to the accepted step.
    """
    for attempt in range(attempts):
        fraction = 0.5**attempt
        improvement, kl = evaluate(fraction)
        if improvement > 0 and kl <= max_kl:
            return fraction
    return 0.0
