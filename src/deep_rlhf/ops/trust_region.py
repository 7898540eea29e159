"""TRPO's two numerical tools: a step along F⁻¹g without ever forming F, and how far to go (Schulman et al. 2015)."""

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], target: Tensor, *, iterations: int, tolerance: float
) -> Tensor:
    """Solves F x = g for a symmetric positive definite F that is known by its products alone (appendix C.1).

    product maps v [D] -> F v [D]; target g [D] -> x [D]. Ends after `iterations` products, or when the residual's norm
    is at most `tolerance` times that of the target. x is exact after D products, up to rounding.
    """
    solution, residual, direction = torch.zeros_like(target), target, target
    squared = residual @ residual
    enough = tolerance * target.norm()
    for _ in range(iterations):
        if squared.sqrt() <= enough:
            break
        image = product(direction)
        length = squared / (direction @ image)
        solution = solution + length * direction
        residual = residual - length * image
        before, squared = squared, residual @ residual
        direction = residual + squared / before * direction
    return solution


def backtracking(evaluate: Callable[[float], tuple[float, float]], *, max_kl: float, attempts: int) -> float:
    """The largest of the step fractions 1, ½, ¼, … (`attempts` of them) that is acceptable (appendix C).

    evaluate(fraction) takes that share of the full step from the old parameters and returns (improvement of the
    surrogate, KL from the old policy in nats); acceptable is improvement > 0 and KL ≤ max_kl, so NaN never is. After a
    fraction > 0 was returned, the parameters are where the last call of `evaluate` left them. 0.0 means that none was
    acceptable: the caller must restore the old parameters.
    """
    for attempt in range(attempts):
        fraction = 0.5**attempt
        improvement, kl = evaluate(fraction)
        if improvement > 0 and kl <= max_kl:
            return fraction
    return 0.0
