"""Quantiles of Student's t distribution, for every interval that rsauto states."""

from __future__ import annotations

import math

_T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""0.975 quantiles of Student's t for 1 to 30 degrees of freedom (NIST/SEMATECH e-Handbook of
Statistical Methods, section 1.3.6.7.2)."""

_Z_975 = 1.959964


def t_quantile(degrees_of_freedom: int, num_comparisons: int = 1) -> float:
    """0.975 quantile of Student's t; beyond the table z + (z^3 + z) / (4 nu), the first term of
    Abramowitz and Stegun 26.7.5, which is right to three decimals there.

    With several comparisons the quantile at 1 - 0.025 / num_comparisons, by bisection: intervals
    of which all hold together with 95 % or more (Bonferroni's inequality).
    """
    if degrees_of_freedom < 1:
        raise ValueError(f"degrees_of_freedom must be at least 1, got {degrees_of_freedom}")
    if num_comparisons < 1:
        raise ValueError(f"num_comparisons must be at least 1, got {num_comparisons}")
    if num_comparisons > 1:
        return _by_bisection(degrees_of_freedom, 1 - 0.05 / num_comparisons)
    if degrees_of_freedom <= len(_T_975):
        return _T_975[degrees_of_freedom - 1]
    return _Z_975 + (_Z_975**3 + _Z_975) / (4 * degrees_of_freedom)


def _by_bisection(freedom: int, inside: float) -> float:
    """The t with P(|T| < t) = ``inside``, over its angle arctan(t / sqrt(nu))."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _share_inside(middle, freedom) < inside else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


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
