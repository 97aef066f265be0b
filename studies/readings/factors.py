"""Studies of the factor itself: at initialisation only, other powers of rank, what it does to
activations, and theorem 3.2."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, linear_regression

from rsauto.rate_law import RateLaw
from rsauto.records import TrialRecord
from rsauto.report.table import Study

from .drawing import against_rank, curves, norms, train_losses
from .ranks import ALIKE, norm_at
from .reading import (
    Arms,
    Drawing,
    Reading,
    Table,
    Verdict,
    by_rank,
    final_loss,
    loss_table,
    mean_of,
    paired,
    power_of_rank,
    power_text,
    ranks_of,
    unless_open,
)

NO_GAIN = 0.02
"""A gain of rank below this share of the loss is none."""

UNSTABLE = 1.05
"""A loss that ends this much above its own least is one that training could not keep."""


def is_unstable(record: TrialRecord) -> bool:
    """Whether it diverged, or its validation loss rose again by a twentieth of its least."""
    if record.outcome == "diverged":
        return True
    losses = [point.eval_loss for point in record.curve]
    return losses[-1] > UNSTABLE * min(losses)


def _share_unstable(records: Sequence[TrialRecord]) -> str:
    return f"{sum(map(is_unstable, records))} of {len(records)}"


def init_only(arms: Arms) -> Reading:
    """Appendix B.3."""
    study = arms[""]
    cells = by_rank(study)
    low, top = ranks_of(cells)[0], ranks_of(cells)[-1]
    free, divided = "alpha, A scaled", "alpha r^-1, A scaled"
    first = {
        rank: fmean(
            norm_at(r, 1, study.config.training.logging_steps or 1) for r in cells[free, rank]
        )
        for rank in (low, top)
    }
    spread = max(first.values()) / min(first.values())
    breaks = all(map(is_unstable, cells[free, top])) and not any(map(is_unstable, cells[free, low]))
    gain = paired(cells[divided, low], cells[divided, top])
    limit = NO_GAIN * mean_of([final_loss(r) for r in cells[divided, low]]).mean
    no_gain = gain.high < limit
    parts = (spread <= ALIKE, breaks, no_gain)
    verdict = unless_open(
        "reproduced" if all(parts) else "partly" if breaks or no_gain else "not reproduced", gain
    )
    return Reading(
        claim="With A scaled by 1/sqrt(r) and no factor the norms are equal at first, and training "
        "becomes unstable at the top rank; with 1/r as well the high rank learns no better "
        "(appendix B.3).",
        verdict=verdict,
        measured=f"Without a factor the first norms of ranks {low} and {top} differ by "
        f"{spread:.2f}; unstable are {_share_unstable(cells[free, low])} trials at rank {low}, "
        f"{_share_unstable(cells[free, top])} at rank {top}. With 1/r rank {top} is better than "
        f"rank {low} by {gain.text()}.",
        criterion=f"Reproduced where the first norms are within {ALIKE}, every trial without a "
        f"factor is unstable at the top rank and none at the low one (diverged, or the loss ends "
        f"{UNSTABLE - 1:.0%} above its least), and the gain of rank with 1/r is below "
        f"{NO_GAIN:.0%} of the loss, its 95 % interval included; partly where one of the last two "
        "holds; open with too few seeds.",
        tables=[loss_table(cells, "Validation loss after the last step.")],
        drawings=[
            Drawing(
                file="curves.svg",
                alt="Training loss over steps without a factor and with 1/r",
                figure=curves(study, train_losses, "training loss"),
            )
        ],
    )


def other_factors(arms: Arms) -> Reading:
    """Appendix B.6."""
    study = arms[""]
    cells = by_rank(study)
    rank = ranks_of(cells)[0]

    def of(power: float) -> Sequence[TrialRecord]:
        return cells[f"alpha r^{power:g}", rank]

    larger, smaller = paired(of(-0.25), of(-0.5)), paired(of(-2.0), of(-1.0))
    breaks = any(map(is_unstable, of(-0.25))) or larger.low > 0
    parts = (breaks, smaller.low > 0)
    verdict = unless_open(
        "reproduced" if all(parts) else "partly" if any(parts) else "not reproduced",
        larger,
        smaller,
    )
    rows = [
        [
            f"r^{power:g}",
            f"{of(power)[0].gamma_r:.3g}",
            mean_of([final_loss(r) for r in of(power)]).text(),
            _share_unstable(of(power)),
        ]
        for power in sorted({r.scaling_exponent or 0.0 for r in study.records}, reverse=True)
    ]
    return Reading(
        claim="At the top rank r^-1/4 is unstable, and r^-2 slows learning below LoRA's, to a "
        "collapse (appendix B.6).",
        verdict=verdict,
        measured=f"At rank {rank} r^-1/4 ends {larger.text()} above r^-1/2, unstable "
        f"{_share_unstable(of(-0.25))}; r^-2 ends {smaller.text()} above r^-1 (paired over "
        f"{smaller.num} seed{'s' * (smaller.num > 1)}).",
        criterion="Reproduced where r^-1/4 is unstable in some trial or worse than r^-1/2 beyond "
        "its interval, and r^-2 worse than r^-1 beyond its interval; partly where one of both; "
        "open with too few seeds.",
        tables=[
            Table(
                title=f"Rank {rank}.",
                headers=["factor", "gamma", "validation loss", "unstable"],
                rows=rows,
            )
        ],
        drawings=[
            Drawing(
                file="curves.svg",
                alt="Training loss over steps by factor",
                figure=curves(study, train_losses, "training loss"),
            ),
            Drawing(
                file="norms.svg",
                alt="Mean gradient norm over steps by factor",
                figure=curves(study, norms, "mean gradient norm", log=True),
            ),
        ],
    )


def _second(record: TrialRecord) -> dict[int, float]:
    return {m.step: m.output_second for m in record.activation_moments}


def _first(record: TrialRecord) -> dict[int, float]:
    return {m.step: m.output_mean for m in record.activation_moments}


def activations(arms: Arms) -> Reading:
    """Appendix B.7."""
    study = arms[""]
    cells = by_rank(study)
    rows, late = [], {}
    for (name, rank), records in cells.items():
        record = records[0]
        if not record.activation_moments:
            continue  # it diverged before the first measurement
        seconds = list(_second(record).values())
        third = len(seconds) // 3 or 1
        late[name, rank] = _growth(seconds[-third - 1 :]) - _growth(seconds[: third + 1])
        rows.append(
            [
                f"{name}, rank {rank}",
                f"{_first(record)[min(_first(record))]:+.4f}",
                f"{list(_first(record).values())[-1]:+.4f}",
                f"{seconds[0]:.4f}",
                f"{seconds[-1]:.4f}",
                f"{late[name, rank]:+.3f}",
            ]
        )
    ends = {key: list(_second(r[0]).values())[-1] for key, r in cells.items() if key in late}
    spread = max(ends.values()) / min(ends.values())
    top = ranks_of(cells)[-1]
    levels = late["rsLoRA", top] < 0
    others = [value for (name, rank), value in late.items() if (name, rank) != ("rsLoRA", top)]
    benign, more = spread < 10, levels and late["rsLoRA", top] < min(others)
    verdict: Verdict = "reproduced" if benign and more else "partly" if benign else "not reproduced"
    return Reading(
        claim="Average moments of activations look benign and small with both rules; for rsLoRA at "
        "the highest ranks their growth levels off later in training (appendix B.7).",
        verdict=verdict,
        measured=f"Second moments end within a factor of {spread:.2f} over all rules and ranks. "
        f"At rank {top} rsLoRA's grows by {late['rsLoRA', top]:+.3f} (in logarithms) between the "
        f"first and the last third of training, the others by {min(others):+.3f} to "
        f"{max(others):+.3f}.",
        criterion="Reproduced where all second moments end within a factor of 10, and that of "
        "rsLoRA at the top rank slows down most from the first to the last third; partly where "
        "only the first holds.",
        tables=[
            Table(
                title="Moments of the adapted layers' outputs at the first and the last "
                "measurement, and the change of the second moment's logarithmic growth.",
                headers=["", "mean, first", "last", "second, first", "last", "growth, change"],
                rows=rows,
            )
        ],
        drawings=[
            Drawing(
                file="second.svg",
                alt="Second moment of activations over steps by rank",
                figure=curves(study, _second, "second moment"),
            ),
            Drawing(
                file="first.svg",
                alt="First moment of activations over steps by rank",
                figure=curves(study, _first, "first moment"),
            ),
        ],
        remarks=["One seed."] if len({r.seed for r in study.records}) == 1 else [],
    )


def _growth(values: Sequence[float]) -> float:
    return math.log(values[-1] / values[0])


# ---------------------------------------------------------------------- theorem 3.2

_GAINS = ("forward_gain", "backward_gain")

NEAR = 0.15
"""How far from the theory a power of rank may lie."""

BASE, NUM_INPUTS = "studies/base-10m", (*[384] * 6, 1024)
"""The study's model, and the inputs of the linear layers of one of its blocks."""


Laws = Mapping[tuple[str, int, float], RateLaw | None]
"""Gain, step and power of r in gamma_r to the fitted power of rank."""


def _gains_at(study: Study, step: int, name: str) -> dict[float, list[tuple[int, float]]]:
    """Power of r in gamma_r to (rank, gain) of every trial that got that far."""
    found: dict[float, list[tuple[int, float]]] = {}
    for record in study.records:
        for moments in record.activation_moments:
            if moments.step == step:
                power = record.scaling_exponent
                assert power is not None, "the study sets it"
                found.setdefault(power, []).append((record.rank, float(getattr(moments, name))))
    return dict(sorted(found.items()))


def _steps_of(study: Study) -> list[int]:
    steps = {m.step for record in study.records for m in record.activation_moments}
    return sorted(steps)


def stability_law(arms: Arms) -> Reading:
    """Definition 3.1 and theorem 3.2."""
    sgd = arms[""]
    steps = _steps_of(sgd)
    last = steps[-1]
    num_trials = Counter(record.scaling_exponent for record in sgd.records)
    kinds = [(name, step) for name in _GAINS for step in dict.fromkeys((steps[0], last))]
    laws = {
        (name, step, power): power_of_rank(points)
        for name, step in kinds
        for power, points in _gains_at(sgd, step, name).items()
    }
    complete = all(
        law is not None and law.num_trials == num_trials[power]
        for (_, _, power), law in laws.items()
    )
    misses = [
        abs(law.exponent - (2 * power + 1))
        for (_, _, power), law in laws.items()
        if law is not None
    ]
    stable = [law for (_, _, power), law in laws.items() if power == -0.5 and law is not None]
    is_flat = len(stable) == len(kinds) and all(abs(law.exponent) <= NEAR for law in stable)
    parts = (complete and max(misses, default=math.inf) <= NEAR, is_flat)
    verdict: Verdict = "reproduced" if all(parts) else "partly" if is_flat else "not reproduced"
    under = {"SGD": arms[""], **({"AdamW": arms["adamw"]} if "adamw" in arms else {})}
    return Reading(
        claim="An adapter keeps moments and gradients at the size of its inputs' at every rank "
        "if and only if gamma_r goes with r^-1/2; under SGD they go with gamma_r^2 r, so with "
        "r^(2p + 1) (definition 3.1, theorem 3.2, equations 10 and 11).",
        verdict=verdict,
        measured=f"Under SGD the fitted powers differ from 2p + 1 by at most {max(misses):.2f} "
        f"after {steps[0]} to {last} steps; for p = -1/2 they are "
        + ", ".join(
            f"{law.exponent:+.2f} ({name.removesuffix('_gain')} after {step})"
            for (name, step, power), law in laws.items()
            if power == -0.5 and law is not None
        )
        + "."
        + (_adamw_words(under["AdamW"]) if "AdamW" in under else ""),
        criterion=f"Reproduced where every power under SGD is within {NEAR} of 2p + 1, and that of "
        f"p = -1/2 within {NEAR} of 0, with no trial lost to divergence; partly where only the "
        "latter.",
        tables=[_law_table(name, study) for name, study in under.items()],
        drawings=[
            Drawing(
                file=f"{name.lower()}.svg",
                alt=f"Forward gain against rank after the last step under {name}",
                figure=against_rank(_lines(study), "forward gain", log=True),
            )
            for name, study in under.items()
        ],
        remarks=[
            "The theorem is about SGD; AdamW's steps have the size of its learning rate whatever "
            "the gradient, so its powers follow another law.",
            _of_the_factor(sgd, laws),
            *_of_a_finite_width(sgd, laws),
        ],
    )


def backward_power(ranks: Sequence[int], num_inputs: int) -> float:
    """Power of rank with which A^T A x goes over these ranks, of x with ``num_inputs`` entries.

    E |A^T A x|^2 = s^4 r (r + n + 1) |x|^2 where the entries of A are independent and normal with
    variance s^2, by the second moment of a Wishart matrix; that of uniform ones is as close as
    1/n. It is r^2 only for ranks far above n.
    """
    logs = [math.log(rank) for rank in ranks]
    norms = [math.log(rank * (rank + num_inputs + 1)) / 2 for rank in ranks]
    return linear_regression(logs, norms).slope


def _without_factor(laws: Laws, gain: str) -> list[float]:
    """Fitted powers less 2p, which is what gamma_r^2 gives."""
    return [
        law.exponent - 2 * power
        for (name, _, power), law in laws.items()
        if name == gain and law is not None
    ]


def _of_the_factor(study: Study, laws: Laws) -> str:
    found = [_without_factor(laws, name) for name in _GAINS]
    apart = max((max(powers) - min(powers) for powers in found if powers), default=math.nan)
    largest = max(
        gain
        for name in _GAINS
        for points in _gains_at(study, _steps_of(study)[-1], name).values()
        for _, gain in points
    )
    return (
        f"The powers less 2p are within {apart:.2f} of each other for every p and step: gamma_r "
        "enters as its square, as the theorem says, and the lines of the table are one measurement "
        f"and not several. The adapter is small beside its layer throughout (gains up to "
        f"{largest:.1g})."
    )


def _of_a_finite_width(study: Study, laws: Laws) -> list[str]:
    """Where the backward powers come from, if not from the theorem's limit."""
    found = _without_factor(laws, "backward_gain")
    if study.config.model.name != BASE or not found:
        return []
    ranks = sorted({record.rank for record in study.records})
    expected = fmean(backward_power(ranks, inputs) for inputs in NUM_INPUTS)
    return [
        "The theorem is a limit of large r. After a step of SGD a gradient comes back through "
        "A^T A, which takes x to a vector whose mean square goes with r (r + n + 1), n the inputs "
        "of the layer: with r^2 only where r is far above n. Over "
        f"ranks {ranks[0]} to {ranks[-1]} the root of that goes with r^{expected:.2f} (mean over "
        f"the layers of {BASE}, n = 384 and 1024), so 2p + {expected:.2f} is to be expected "
        f"backward; measured is 2p + {fmean(found):.2f}. Forward it depends on the inputs as well: "
        "2p + 1 where they are alike, 2p + 1/2 where they are at right angles to each other; "
        f"measured is 2p + {fmean(_without_factor(laws, 'forward_gain')):.2f}."
    ]


def _adamw_words(study: Study) -> str:
    last = _steps_of(study)[-1]
    law = power_of_rank(_gains_at(study, last, "forward_gain")[-0.5])
    return f" Under AdamW p = -1/2 gives {power_text(law)} after {last} steps."


def _lines(study: Study) -> dict[str, dict[int, list[float]]]:
    lines: dict[str, dict[int, list[float]]] = {}
    for power, points in _gains_at(study, _steps_of(study)[-1], "forward_gain").items():
        line = lines.setdefault(f"p = {power:g}", {})
        for rank, value in sorted(points):
            line.setdefault(rank, []).append(value)
    return lines


def _law_table(optimizer: str, study: Study) -> Table:
    steps = _steps_of(study)
    rows = []
    for power in _gains_at(study, steps[0], "forward_gain"):
        cells = [
            power_text(power_of_rank(_gains_at(study, step, name).get(power, [])))
            for name in ("forward_gain", "backward_gain")
            for step in dict.fromkeys((steps[0], steps[-1]))
        ]
        theory = f"{2 * power + 1:+.2f}" if optimizer == "SGD" else "-"
        rows.append([f"p = {power:g}", theory, *cells])
    when = [f"after {step}" for step in dict.fromkeys((steps[0], steps[-1]))]
    return Table(
        title=f"{optimizer}: power of rank with which the adapter's gain goes (95 % interval), "
        "forward and backward.",
        headers=[
            "gamma_r = alpha r^p",
            "theory",
            *(f"forward, {one}" for one in when),
            *(f"backward, {one}" for one in when),
        ],
        rows=rows,
    )
