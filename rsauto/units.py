"""Numbers as people read them. Inside, everything is bytes, seconds and plain floats."""

from __future__ import annotations

import math

ABSENT = "-"
"""Shown where a record has no value."""

METHOD_NAMES = {
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "adalora": "AdaLoRA",
    "rsadalora": "rsAdaLoRA",
}

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def byte_unit(num_bytes: float) -> tuple[float, str]:
    """Divisor and name of the unit in which a size reads best: 1.5 * 2**30 gives (2**30, GiB)."""
    size = abs(num_bytes)
    power = 0 if size < 1024 else min(int(math.log2(size) // 10), len(_BYTE_UNITS) - 1)
    return float(2 ** (10 * power)), _BYTE_UNITS[power]


def bytes_text(num_bytes: float | None) -> str:
    """'21.3 MiB', with three digits or more."""
    if num_bytes is None:
        return ABSENT
    divisor, unit = byte_unit(num_bytes)
    if divisor == 1.0:
        return f"{num_bytes:.0f} B"
    value = num_bytes / divisor
    decimals = 2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
    return f"{value:.{decimals}f} {unit}"


def value_text(value: float | None) -> str:
    """An objective with four significant digits, trailing zeros kept: '1.230'."""
    if value is None:
        return ABSENT
    return f"{value:#.4g}".removesuffix(".")


def rate_text(rate: float | None) -> str:
    """A learning rate as written in papers: '1.2e-3', '5e-5'."""
    if rate is None:
        return ABSENT
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def count_text(count: float | None) -> str:
    """'9.18 M', '1.84e15': a short number of parameters, tokens or operations."""
    if count is None:
        return ABSENT
    for limit, divisor, suffix in ((1e4, 1.0, ""), (1e6, 1e3, " k"), (1e9, 1e6, " M")):
        if abs(count) < limit:
            return f"{count:.0f}" if not suffix else f"{count / divisor:.3g}{suffix}"
    return f"{count / 1e9:.3g} G" if abs(count) < 1e12 else f"{count:.2e}".replace("e+", "e")


def seconds_text(seconds: float | None) -> str:
    """'42.0 s', '12 min 5 s', '3 h 20 min'."""
    if seconds is None:
        return ABSENT
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def percent_text(share: float) -> str:
    """0.0891 as '8.9 %', 0.01 as '1 %'."""
    return f"{100 * share:.2g} %" if abs(share) < 0.1 else f"{100 * share:.0f} %"


def difference_text(difference: float, half_width: float | None) -> str:
    """'0.120 ± 0.031': as many decimals as give the interval two significant digits."""
    if half_width is None or half_width <= 0:
        return f"{difference:.3g}"
    decimals = max(0, 1 - math.floor(math.log10(half_width)))
    return f"{difference:.{decimals}f} ± {half_width:.{decimals}f}"


def mean_text(value: float, half_width: float | None) -> str:
    """'1.2273 ± 0.0051'; an objective without an interval as ``value_text``."""
    return difference_text(value, half_width) if half_width else value_text(value)


def objective_text(objective: str) -> str:
    """'eval_loss' as 'eval loss'."""
    return objective.replace("_", " ")


def method_text(method: str, *, is_refit: bool = False) -> str:
    """'rslora' as 'rsLoRA', and with the ranks that AdaLoRA found as 'rsLoRA refit'."""
    name = METHOD_NAMES.get(method, method)
    return f"{name} refit" if is_refit else name


def rank_text(rank: int, init_rank: int | None) -> str:
    """'32', and for AdaLoRA, which starts with more than it keeps, '32 (from 48)'."""
    return str(rank) if init_rank is None else f"{rank} (from {init_rank})"
