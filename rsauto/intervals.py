"""Quantiles of Student's t distribution, for every interval that rsauto states."""

from __future__ import annotations

_T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""0.975 quantiles of Student's t for 1 to 30 degrees of freedom (NIST/SEMATECH e-Handbook of
Statistical Methods, section 1.3.6.7.2)."""

_Z_975 = 1.959964


def t_quantile(degrees_of_freedom: int) -> float:
    """0.975 quantile of Student's t; beyond the table z + (z^3 + z) / (4 nu) +
    (5 z^5 + 16 z^3 + 3 z) / (96 nu^2), the first terms of Abramowitz and Stegun 26.7.5, which are
    right to three decimals there."""
    if degrees_of_freedom < 1:
        raise ValueError(f"degrees_of_freedom must be at least 1, got {degrees_of_freedom}")
    if degrees_of_freedom <= len(_T_975):
        return _T_975[degrees_of_freedom - 1]
    z, nu = _Z_975, degrees_of_freedom
    return z + (z**3 + z) / (4 * nu) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * nu**2)
