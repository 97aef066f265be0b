"""Studies over ranks: losses, and the norms of gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean

from rsauto.records import TrialRecord
from rsauto.units import rate_text

from .drawing import against_rank, curves, losses_by_rank, norms, train_losses
from .reading import (
    Arms,
    Cells,
    Drawing,
    Mean,
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

ONSET = 5
"""Steps that count as the onset of training."""
ORDER_OF_MAGNITUDE = 10.0
ALIKE = 1.5
"""Norms within this factor count as the same at every rank."""

FALLS = (
    "Reproduced where rsLoRA's loss falls from the lowest to the top rank (its 95 % interval over "
    "seeds is above zero) and LoRA's changes by less than a third of that either way; partly where "
    "it falls so and by more than LoRA's; open with too few seeds."
)


def rank_sweep(arms: Arms) -> Reading:
    """Figure 2."""
    study = arms[""]
    cells = by_rank(study)
    verdict, measured = _what_rank_buys(cells)
    return Reading(
        claim="LoRA ends at a similar loss whatever its rank, some larger ranks even a little "
        "worse; rsLoRA's loss falls as its rank rises (figure 2).",
        verdict=verdict,
        measured=measured,
        criterion=FALLS,
        tables=[loss_table(cells, _LOSS_TITLE)],
        drawings=[
            Drawing(
                file="curves.svg",
                alt="Training loss over steps by rank, LoRA and rsLoRA",
                figure=curves(study, train_losses, "training loss"),
            ),
            Drawing(
                file="ranks.svg",
                alt="Validation loss against rank",
                figure=losses_by_rank(cells),
            ),
        ],
    )


_LOSS_TITLE = "Validation loss after the last step, mean over seeds and 95 % interval."


def gains(cells: Cells, name: str) -> Mean:
    """By how much the loss falls from the lowest to the top rank, paired by seed."""
    low, *_, top = ranks_of(cells)
    return paired(cells[name, low], cells[name, top])


def _what_rank_buys(cells: Cells) -> tuple[Verdict, str]:
    low, *_, top = ranks_of(cells)
    rslora, lora = gains(cells, "rsLoRA"), gains(cells, "LoRA")
    measured = (
        f"From rank {low} to {top} rsLoRA's loss falls by {rslora.text()}, LoRA's by "
        f"{lora.text()} ({rslora.num} seed{'s' * (rslora.num > 1)})."
    )
    verdict: Verdict = "not reproduced"
    if rslora.low > 0 and abs(lora.mean) < rslora.mean / 3:
        verdict = "reproduced"
    elif rslora.low > 0 and rslora.mean > lora.mean:
        verdict = "partly"
    return unless_open(verdict, rslora), measured


def rank_sweep_tuned(arms: Arms) -> Reading:
    """The fair version of figure 2: there is a question, and no claim."""
    cells = joined(by_rank(study) for study in arms.values())
    first = arms[""].config.training.seed
    best = {key: _at_its_best_rate(records, first) for key, records in cells.items()}
    ranks = ranks_of(cells)
    rows = []
    for rank in ranks:
        lora, rslora = best["LoRA", rank], best["rsLoRA", rank]
        rows.append(
            [
                f"rank {rank}",
                f"{mean_of(_others(lora, first)).text()} at {rate_text(lora[0].learning_rate)}",
                f"{mean_of(_others(rslora, first)).text()} at {rate_text(rslora[0].learning_rate)}",
                paired(_not_first(rslora, first), _not_first(lora, first)).text(),
            ]
        )
    top = ranks[-1]
    left = paired(_not_first(best["rsLoRA", top], first), _not_first(best["LoRA", top], first))
    told = "an advantage is left." if left.high < 0 else "no advantage can be told from the spread."
    fair = {key: _not_first(records, first) for key, records in best.items()}
    return Reading(
        claim="None: the paper compares the rules at one learning rate.",
        # Of two seeds the interval is so wide that no advantage in it says nothing.
        verdict="open" if left.num < 3 and left.high >= 0 else unless_open("answered", left),
        measured=f"With each rule and rank at its own learning rate rsLoRA's loss less LoRA's is "
        f"{left.text()} at rank {top} ({left.num} seeds, paired): "
        + ("one seed has no interval." if left.num == 1 else told)
        + f" From rank {ranks[0]} to {top} the loss falls by {gains(fair, 'rsLoRA').text()} with "
        f"rsLoRA and {gains(fair, 'LoRA').text()} with LoRA.{_at_an_edge(cells, best, first)}",
        criterion="An advantage is left where the 95 % interval of the paired difference at the "
        "top rank is below zero. Rates are chosen on the first seed, which is left out of the "
        "comparison.",
        tables=[
            Table(
                title="Validation loss at the best learning rate, without the seed it was chosen "
                "on; the last column is rsLoRA's less LoRA's, paired by seed.",
                headers=["", "LoRA", "rsLoRA", "difference"],
                rows=rows,
            ),
            _rates_table(cells, first),
        ],
        drawings=[
            Drawing(
                file="ranks.svg",
                alt="Validation loss against rank, each rule and rank at its own learning rate",
                figure=losses_by_rank(fair),
            )
        ],
    )


def _not_first(records: Sequence[TrialRecord], first: int) -> Sequence[TrialRecord]:
    """All but the seed on which the rate was chosen, where there are others."""
    return [r for r in records if r.seed != first] or records


def _others(records: Sequence[TrialRecord], first: int) -> list[float]:
    return [final_loss(r) for r in _not_first(records, first)]


def _at_its_best_rate(records: Sequence[TrialRecord], first: int) -> list[TrialRecord]:
    rate = min((r for r in records if r.seed == first), key=final_loss).learning_rate
    return [r for r in records if r.learning_rate == rate]


def joined(parts: Iterable[Cells]) -> Cells:
    """The records of several arms, cell by cell."""
    found: dict[tuple[str, int], list[TrialRecord]] = {}
    for cells in parts:
        for key, records in cells.items():
            found.setdefault(key, []).extend(records)
    return found


def _at_an_edge(cells: Cells, best: Cells, first: int) -> str:
    """Where the best rate is the lowest or highest tried, so that a better one may lie beyond."""
    found = []
    for (name, rank), records in cells.items():
        tried = sorted({r.learning_rate for r in records if r.seed == first})
        if best[name, rank][0].learning_rate in (tried[0], tried[-1]):
            found.append(f"{name} at rank {rank}")
    return f" Best at the edge of the rates tried: {', '.join(found)}." if found else ""


def _rates_table(cells: Cells, first: int) -> Table:
    rates = sorted({r.learning_rate for records in cells.values() for r in records})
    rows = []
    for (name, rank), records in cells.items():
        of_rate = {r.learning_rate: final_loss(r) for r in records if r.seed == first}
        values = [mean_of([of_rate[rate]]).text() if rate in of_rate else "-" for rate in rates]
        rows.append([f"{name}, rank {rank}", *values])
    return Table(
        title="Validation loss at every learning rate, first seed.",
        headers=["", *map(rate_text, rates)],
        rows=rows,
    )


# ---------------------------------------------------------------------- norms


def norm_at(record: TrialRecord, first: int, last: int) -> float:
    """Mean gradient norm of the steps from first to last; NaN where it did not get there."""
    found = [p.grad_norm for p in record.log if first <= p.step <= last]
    return fmean(found) if found else math.nan


def norm_spread(cells: Cells, name: str, first: int, last: int) -> float:
    """The largest norm of any rank over the smallest, each a mean over seeds."""
    means = [
        fmean(norm_at(record, first, last) for record in cells[name, rank])
        for rank in ranks_of(cells)
    ]
    return math.nan if any(map(math.isnan, means)) else max(means) / min(means)


def norms_table(cells: Cells, last: int) -> Table:
    rows = []
    for name, theory in (("rsLoRA", "0"), ("LoRA", "-1/2")):
        points = {
            when: [
                (rank, norm_at(record, *steps))
                for rank in ranks_of(cells)
                for record in cells[name, rank]
            ]
            for when, steps in {"onset": (1, ONSET), "end": (last - ONSET + 1, last)}.items()
        }
        rows.append(
            [
                name,
                theory,
                power_text(power_of_rank(points["onset"])),
                f"{norm_spread(cells, name, 1, ONSET):.2f}",
                power_text(power_of_rank(points["end"])),
                f"{norm_spread(cells, name, last - ONSET + 1, last):.2f}",
            ]
        )
    return Table(
        title=f"Mean Frobenius norm of the gradients: its power of rank (95 % interval), and the "
        f"largest rank's norm over the smallest. Onset: steps 1 to {ONSET}; end: the last {ONSET}.",
        headers=["", "theory, first step", "onset", "max/min", "end", "max/min"],
        rows=rows,
    )


def gradient_norms(arms: Arms) -> Reading:
    """Figure 3."""
    study = arms[""]
    cells = by_rank(study)
    last = study.config.training.steps or 0
    onset, end = (
        {name: norm_spread(cells, name, *steps) for name in ("rsLoRA", "LoRA")}
        for steps in ((1, ONSET), (last - ONSET + 1, last))
    )
    slope = _slope(cells, "LoRA")
    alike, falls = onset["rsLoRA"] <= ALIKE, slope < -0.25
    stays = end["rsLoRA"] <= ORDER_OF_MAGNITUDE
    passed = sum((alike, falls, stays))
    verdicts: tuple[Verdict, ...] = ("not reproduced", "partly", "partly", "reproduced")
    verdict = verdicts[passed]
    return Reading(
        claim="LoRA's gradient norms collapse with rank; rsLoRA's are the same for every rank at "
        "the onset and stay within an order of magnitude (figure 3).",
        verdict=verdict,
        measured=f"At the onset rsLoRA's norms of all ranks are within a factor of "
        f"{onset['rsLoRA']:.2f}, LoRA's within {onset['LoRA']:.2f}, falling as r^{slope:.2f}; at "
        f"the end {end['rsLoRA']:.2f} and {end['LoRA']:.2f}.",
        criterion=f"Reproduced where rsLoRA's are within a factor of {ALIKE} at the onset and of "
        f"{ORDER_OF_MAGNITUDE:g} at the end, and LoRA's fall faster than r^-1/4; partly where some "
        "of that holds.",
        tables=[norms_table(cells, last)],
        drawings=[_norm_curves(arms)],
    )


def _slope(cells: Cells, name: str) -> float:
    law = power_of_rank(
        [
            (rank, norm_at(record, 1, ONSET))
            for rank in ranks_of(cells)
            for record in cells[name, rank]
        ]
    )
    return math.nan if law is None else law.exponent


def _norm_curves(arms: Arms) -> Drawing:
    return Drawing(
        file="norms.svg",
        alt="Mean gradient norm over steps by rank, LoRA and rsLoRA",
        figure=curves(arms[""], norms, "mean gradient norm", log=True),
    )


def sgd_stability(arms: Arms) -> Reading:
    """Appendix B.1."""
    found = gradient_norms(arms)
    cells = by_rank(arms[""])
    last = arms[""].config.training.steps or 0
    end = norm_spread(cells, "rsLoRA", last - ONSET + 1, last)
    return Reading(
        claim="Under SGD LoRA's norms collapse with rank; rsLoRA's stay nearly the same for about "
        "100 steps, closer than under AdamW (appendix B.1).",
        verdict="partly" if found.verdict == "reproduced" and end > ALIKE else found.verdict,
        measured=found.measured,
        criterion=f"{found.criterion} At most partly where rsLoRA's norms at the end are further "
        f"apart than a factor of {ALIKE}: here nearly the same is asked of the whole run, which "
        f"has {last} steps.",
        tables=[*found.tables, loss_table(cells, _LOSS_TITLE)],
        drawings=found.drawings,
        remarks=["Compare the last column with that of gradient-norms, which is under AdamW."],
    )


def losses_and_norms(arms: Arms, claim: str) -> Reading:
    """Appendices B.2 and B.5: both figures at once."""
    study = arms[""]
    cells = by_rank(study)
    verdict, measured = _what_rank_buys(cells)
    every = study.config.training.logging_steps or 1
    last = study.config.training.steps or 0
    last -= last % every
    onset = {name: norm_spread(cells, name, 1, ONSET) for name in ("rsLoRA", "LoRA")}
    slope = _slope(cells, "LoRA")
    if verdict == "reproduced" and not slope < -0.25:
        verdict = "partly"
    return Reading(
        claim=claim,
        verdict=verdict,
        measured=f"{measured} Norms over the first {ONSET} steps: within a factor of "
        f"{onset['rsLoRA']:.2f} over the ranks for rsLoRA, {onset['LoRA']:.2f} for LoRA, whose "
        f"fall as r^{slope:.2f}.",
        criterion=f"{FALLS} At most partly where LoRA's norms do not fall faster than r^-1/4.",
        tables=[loss_table(cells, _LOSS_TITLE), norms_table(cells, last)],
        drawings=[
            Drawing(
                file="curves.svg",
                alt="Training loss over steps by rank, LoRA and rsLoRA",
                figure=curves(study, train_losses, "training loss"),
            ),
            _norm_curves(arms),
        ],
    )


def other_optimizer(arms: Arms) -> Reading:
    return losses_and_norms(
        arms,
        "With another model, dataset and optimizer (GPT-J, GSM8K, Adafactor) the same pattern: "
        "LoRA's curves of all ranks lie on one another, rsLoRA's loss falls with rank; norms are "
        "alike for rsLoRA and of different orders for LoRA (appendix B.2).",
    )


def attention_only(arms: Arms) -> Reading:
    return losses_and_norms(
        arms,
        "With adapters in the attention layers only larger ranks train better with rsLoRA and not "
        "with LoRA, whose gradients collapse with rank (appendix B.5).",
    )


def low_rank_lr(arms: Arms) -> Reading:
    """Appendix B.4."""
    sweep, top = by_rank(arms[""]), by_rank(arms["top"])
    (low_key, low), (top_key, high) = next(iter(sweep.items())), next(iter(top.items()))
    first = arms[""].config.training.seed
    best = _at_its_best_rate(low, first)
    gain = paired(best, high)
    of_low, of_high = mean_of([final_loss(r) for r in best]), mean_of(list(map(final_loss, high)))
    verdict = unless_open("reproduced" if gain.low > 0 else "not reproduced", gain)
    return Reading(
        claim="No learning rate makes rank 4 as good as rsLoRA at rank 2048 and the default rate: "
        "perplexity 1.863 against 1.836 (appendix B.4).",
        verdict=verdict,
        measured=f"LoRA at rank {low_key[1]} is best at {rate_text(best[0].learning_rate)}: "
        f"loss {of_low.text()} (perplexity {math.exp(of_low.mean):.3f}); rsLoRA at rank "
        f"{top_key[1]} and {rate_text(high[0].learning_rate)} has {of_high.text()} "
        f"({math.exp(of_high.mean):.3f}): {gain.text()} less, paired over {gain.num} seeds.",
        criterion="Reproduced where the 95 % interval of the paired difference is above zero. The "
        "seed on which the low rank's rate was chosen counts, which favours the low rank.",
        tables=[_rates_table(sweep, first)],
        drawings=[
            Drawing(
                file="ranks.svg",
                alt="Validation loss of the low rank at its best rate, and of the top rank",
                figure=against_rank(
                    {"LoRA": {low_key[1]: [final_loss(r) for r in best]},
                     "rsLoRA": {top_key[1]: [final_loss(r) for r in high]}},
                    "validation loss",
                ),
            )
        ],
    )  # fmt: skip
