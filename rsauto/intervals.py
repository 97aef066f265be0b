"""Quantiles of Student's t distribution, for every interval that rsauto states."""

from __future__ import annotations

import math
from functools import cache


@cache
def t_quantile(degrees_of_freedom: int, num_comparisons: int = 1) -> float:
    """0.975 quantile of Student's t, by bisection.

    With several comparisons the quantile at 1 - 0.025 / num_comparisons: intervals of which all
    hold together with 95 % or more (Bonferroni's inequality).
    """
    if degrees_of_freedom < 1:
        raise ValueError(f"degrees_of_freedom must be at least 1, got {degrees_of_freedom}")
    if num_comparisons < 1:
        raise ValueError(f"num_comparisons must be at least 1, got {num_comparisons}")
    inside = 1 - 0.05 / num_comparisons
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        is_below = _share_inside(middle, degrees_of_freedom) < inside
        low, high = (middle, high) if is_below else (low, middle)
    return math.sqrt(degrees_of_freedom) * math.tan(low)


def _share_inside(angle: float, freedom: int) -> float:
    """P(|T| < sqrt(nu) tan(angle)), a finite sum for whole nu (Abramowitz and Stegun 26.7.3-4)."""
    cosine, is_odd = math.cos(angle), freedom % 2
    term, total = (cosine, 0.0) if is_odd else (1.0, 0.0)
    for k in range(1 + is_odd, freedom, 2):
        total += term
        term *= k / (k + 1) * cosine**2
    if is_odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
