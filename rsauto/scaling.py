"""How the low-rank product is scaled, and how the best learning rate moves with rank.

Notation
    r         rank, the shared inner dimension of B (d_out x r) and A (r x d_in)
    alpha     the user's scaling constant, an integer in configurations
    gamma_r   the number that multiplies the product: W x + gamma_r B A x
    eta       learning rate; eta*(r) the best one at rank r

Pure mathematics: nothing of rsauto is imported here.
"""

from __future__ import annotations

import math
from typing import Literal

ScalingRule = Literal["rslora", "lora"]
OptimizerName = Literal["adamw", "sgd", "adafactor"]

SCALING_EXPONENTS: dict[ScalingRule, float] = {"rslora": -0.5, "lora": -1.0}


def gamma_r(rule: ScalingRule, alpha: float, rank: int, exponent: float | None = None) -> float:
    """Multiplier on the low-rank product, gamma_r in  W x + gamma_r B A x.

    lora    gamma_r = alpha / r        (Hu et al. 2021, arXiv:2106.09685, section 4.1)
    rslora  gamma_r = alpha / sqrt(r)  (Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2)

    ``exponent`` overrides the rule's own power of r: gamma_r = alpha * r**exponent, for the
    paper's ablations (appendix B.6: r^-1/4 and r^-2).

    Raises ValueError when rank is below 1 or the rule is unknown.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, but got {rank=}. Drop it from search.rank.")
    if rule not in SCALING_EXPONENTS:
        raise ValueError(f"scaling_rule must be one of {sorted(SCALING_EXPONENTS)}, got {rule!r}.")
    power = SCALING_EXPONENTS[rule] if exponent is None else exponent
    return float(alpha * math.pow(rank, power))


def initial_rank(target_rank: int, init_ratio: float) -> int:
    """Rank of every module when AdaLoRA begins: the ratio times the target rank, rounded up."""
    return math.ceil(init_ratio * target_rank)


def init_scale(rank: int, exponent: float) -> float | None:
    """By how much A is drawn wider than PEFT draws it, rank**exponent; None where it is not.

    For the paper's ablation of a correction at initialisation only (arXiv:2312.03732, appendix B.3,
    which takes exponent -1/2).
    """
    return float(math.pow(rank, exponent)) if exponent else None


def learning_rate_exponent(
    rule: ScalingRule, optimizer: OptimizerName, exponent: float | None = None
) -> float:
    """Prior for x in  eta*(r) = eta*(r_0) (r / r_0)^x  at fixed alpha, with B = 0 at the start.

    With gamma_r proportional to r^p:

    adamw      x = -(1 + p) / 2   -1/4 for rslora, 0 for lora, -1/2 for a constant multiplier
               (Learning Rate Scaling across LoRA Ranks, arXiv:2602.06204; a conjectured prior)
    sgd        x = -(1 + 2 p)     0 for rslora, +1 for lora, -1 for a constant multiplier: the
               product gamma_r^2 r eta stays fixed (arXiv:2312.03732, appendix A)
    adafactor  x = 0              no law is assumed; search the full band
    """
    p = SCALING_EXPONENTS[rule] if exponent is None else exponent
    if optimizer == "adamw":
        return -(1.0 + p) / 2.0
    if optimizer == "sgd":
        return -(1.0 + 2.0 * p)
    return 0.0


def transferred_learning_rate(
    reference_rate: float, reference_rank: int, rank: int, rate_exponent: float
) -> float:
    """eta*(r) from eta*(r_0): ``reference_rate * (rank / reference_rank) ** rate_exponent``."""
    return float(reference_rate * math.pow(rank / reference_rank, rate_exponent))
