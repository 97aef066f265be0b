"""The verdict in sentences that stand on their own, honest where the records say little."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rsauto.records import TrialRecord
from rsauto.report.kinds import kind_of, refit_text
from rsauto.report.table import is_refit
from rsauto.units import (
    bytes_text,
    difference_text,
    mean_text,
    method_text,
    objective_text,
    percent_text,
    rate_text,
)

if TYPE_CHECKING:
    from rsauto.report.standing import Gain, Standing
    from rsauto.report.verdict import TooLarge, Verdict


def sentences(verdict: Verdict) -> tuple[str, ...]:
    """Which rank to take and why, what it gains over the tuned default, and what did not fit."""
    recommended = verdict.standings.get("recommended")
    if recommended is None:
        return (_nothing_to_take(verdict), *_too_large(verdict))
    return (
        _take(verdict, recommended, verdict.standings["best"]),
        *_ties(verdict),
        _gain(verdict, recommended),
        *_noise(verdict),
        *_room(recommended.record),
        *_too_large(verdict),
    )


def settings_text(record: TrialRecord) -> str:
    """'rank 32 (alpha 16, learning rate 1.2e-3, rsLoRA)', and what else it takes to train it.

    The rank of AdaLoRA, and of a refit of its ranks, is the mean over the modules.
    """
    inside = [f"alpha {record.alpha}", f"learning rate {rate_text(record.learning_rate)}"]
    if record.lr_ratio != 1.0:
        inside.append(f"lr_ratio {record.lr_ratio:g}")
    if record.lambda_lr_ratio is not None:
        inside.append(f"lambda_lr_ratio {record.lambda_lr_ratio:g}")
    if record.scaling_exponent is not None:
        inside.append(f"gamma alpha r^{record.scaling_exponent:g}")
    if record.init_scale is not None:
        inside.append(f"A drawn {record.init_scale:.3g} times as wide")
    inside.append(_method(record))
    mean = "" if record.rank_pattern is None else " on average"
    return f"rank {record.rank}{mean} ({', '.join(inside)})"


def needs_room(record: TrialRecord) -> bool:
    """Whether some module has a rank above the trial's own, which is then their mean."""
    return record.r_max is not None and record.r_max > record.rank


def _method(record: TrialRecord) -> str:
    name = method_text(record.method)
    if record.scaling_exponent is not None:
        return "LoRA"  # its scaling is neither rule's
    if is_refit(record):
        return f"{name} with the ranks that AdaLoRA found"
    return name if record.init_rank is None else f"{name} from rank {record.init_rank}"


def _room(record: TrialRecord) -> tuple[str, ...]:
    if not needs_room(record):
        return ()
    return (
        f"Its modules differ in rank, the largest is {record.r_max}: "
        "whatever serves the adapter must allow that rank.",
    )


def _take(verdict: Verdict, chosen: Standing, best: Standing) -> str:
    name = objective_text(verdict.objective)
    value = f"its {name} {_mean(chosen)}{_seeds(chosen.num_seeds)}"
    tuned = verdict.standings.get("default_tuned")
    is_default = tuned is not None and tuned.record.number == chosen.record.number
    start = f"Take {'the tuned default, ' if is_default else ''}{settings_text(chosen.record)}: "
    if chosen.record.number == best.record.number:
        found = "best mean found" if chosen.num_seeds > 1 else "best found"
        return f"{start}{value} is the {found}{_needs(chosen)}."
    rival = f"rank {best.record.rank}"
    if tuned is not None and tuned.record.number == best.record.number:
        rival = f"the tuned default, {rival}"
    elif best.record.rank == chosen.record.rank or kind_of(best.record) != kind_of(chosen.record):
        rival = settings_text(best.record)
    # That the cheapest of the ties is cheaper is told of the ties.
    is_told = bool(verdict.ties) and verdict.ties[0].record.number == chosen.record.number
    return (
        f"{start}{value} {_closeness(verdict, chosen, best)} the best "
        f"({rival}, {_mean(best)}){_needs(chosen, None if is_told else best)}."
    )


def _closeness(verdict: Verdict, chosen: Standing, best: Standing) -> str:
    distance = abs(chosen.objective - best.objective)
    # The same slack as in the choice, so that a row on the limit is worded as inside it.
    is_close = distance <= verdict.within * abs(best.objective) * (1 + 1e-9)
    if is_close or verdict.noise is None:
        return f"is within {percent_text(verdict.within)} of"
    return f"is within one standard error ({verdict.noise.standard_error(best.num_seeds):.2g}) of"


def _mean(standing: Standing) -> str:
    return mean_text(standing.objective, standing.half_width)


def _ties(verdict: Verdict) -> tuple[str, ...]:
    """Which ranks the noise leaves equal, and what the cheapest of them saves."""
    if not verdict.ties:
        return ()
    kinds = {(kind_of(s.record), is_refit(s.record)) for s in verdict.ties}
    names = list(dict.fromkeys(_tie_name(s, is_only=len(kinds) == 1) for s in verdict.ties))
    cheap, dear = verdict.ties[0], verdict.ties[-1]
    if len(names) == 1:
        return (f"{len(verdict.ties)} settings of {names[0]} cannot be told apart at this noise.",)
    half_width = verdict.tie_half_width
    if len(verdict.ties) == 2:
        difference = difference_text(abs(cheap.objective - dear.objective), half_width)
        start = f"{_joined(names)} cannot be told apart at this noise: they differ by {difference}"
    else:
        start = (
            f"Of {_joined(names)} none can be told apart from the best at this noise, "
            f"± {half_width:.2g} on each difference"
        )
    return (f"{start[0].upper()}{start[1:]}{_saving(cheap, dear, names)}.",)


def _tie_name(standing: Standing, *, is_only: bool) -> str:
    record = standing.record
    rank = f"rank {record.rank}"
    return rank if is_only else f"{refit_text(kind_of(record), is_refit(record))} {rank}"


def _saving(cheap: Standing, dear: Standing, names: Sequence[str]) -> str:
    if cheap.need_bytes is None or dear.need_bytes is None or cheap.need_bytes == dear.need_bytes:
        return ""
    saved = f"; {names[0]} needs {bytes_text(dear.need_bytes - cheap.need_bytes)} less"
    return saved if len(names) == 2 else f"{saved} than {names[-1]}"


def _noise(verdict: Verdict) -> tuple[str, ...]:
    """What the verdict rests on where the configurations it compares ran once."""
    if verdict.noise is None:
        return (
            "No configuration ran on several seeds, so nothing is known about the noise: "
            "which rank is best may be luck.",
        )
    if verdict.candidate_seeds > 1:
        return ()
    return (
        "The ranks ran on one seed each, so which is best may be luck; two runs of what was "
        f"repeated differ by up to {verdict.noise.half_width(1, 1):.2g} (95 %).",
    )


def noise_remark(verdict: Verdict) -> str:
    """How far apart two single runs, as tables and figures show them, must be to differ."""
    if verdict.noise is None:
        return "Nothing is known about the noise: no configuration ran on several seeds."
    return (
        f"Two single runs less than {verdict.noise.half_width(1, 1):.2g} apart (95 %) cannot be "
        "told apart."
    )


def _needs(chosen: Standing, best: Standing | None = None) -> str:
    if chosen.need_bytes is None:
        return ""
    text = f" and it needs {bytes_text(chosen.need_bytes)}"
    if best is None or best.need_bytes is None or best.need_bytes <= chosen.need_bytes:
        return text
    return f"{text}, {bytes_text(best.need_bytes - chosen.need_bytes)} less"


def _seeds(num_seeds: int) -> str:
    return f" (mean of {num_seeds} seeds)" if num_seeds > 1 else ""


def _gain(verdict: Verdict, chosen: Standing) -> str:
    tuned = verdict.standings.get("default_tuned")
    if tuned is None:
        return (
            "No run of the tuned default finished, or the study has none: there is no gain to "
            "state."
        )
    gain = verdict.gain
    if gain is None:
        is_best = verdict.best is not None and verdict.best.number == chosen.record.number
        margin = "" if is_best else " by more than that"
        return f"That is the default adapter itself: nothing tried is better{margin}."
    rival = _default_text(tuned)
    amount = _amount(gain)
    if gain.half_width is not None and not gain.is_certain:
        return (
            f"It cannot be told apart from {rival}: the difference, "
            f"{difference_text(gain.difference, gain.half_width)}{_fresh(gain)}, may be zero."
        )
    if gain.difference < 0:
        worse = f"It is worse than {rival} by {amount}{_fresh(gain)}"
        return f"{worse}{_saves(chosen, tuned)}."
    if gain.difference == 0:
        return f"It is as good as {rival}{_saves(chosen, tuned)}."
    return f"It beats {rival} by {amount}{_fresh(gain)}."


def _fresh(gain: Gain) -> str:
    if not gain.num_fresh_seeds:
        return ""
    seeds = "seed" if gain.num_fresh_seeds == 1 else f"{gain.num_fresh_seeds} seeds"
    return f" on the {seeds} that chose neither"


def _default_text(tuned: Standing) -> str:
    record = tuned.record
    name = "the default as it is" if record.role == "default" else "the tuned default"
    return (
        f"{name} ({method_text(record.method)}, rank {record.rank}, "
        f"learning rate {rate_text(record.learning_rate)}; {_mean(tuned)})"
    )


def _amount(gain: Gain) -> str:
    text = difference_text(abs(gain.difference), gain.half_width)
    return text if gain.relative is None else f"{text} ({percent_text(abs(gain.relative))})"


def _saves(chosen: Standing, other: Standing) -> str:
    if chosen.need_bytes is None or other.need_bytes is None:
        return ""
    saved = other.need_bytes - chosen.need_bytes
    return f" and needs {bytes_text(saved)} less" if saved > 0 else ""


def _nothing_to_take(verdict: Verdict) -> str:
    if verdict.num_trials == 0:
        return "The study has no trials yet: run rsauto study to start it."
    if verdict.num_complete:
        return (
            "Nothing that finished fits the memory budget of "
            f"{bytes_text(verdict.memory_budget_bytes)}, so no rank can be recommended."
        )
    return (
        f"None of {verdict.num_trials} trials finished at full length, "
        "so no rank can be recommended yet."
    )


def _too_large(verdict: Verdict) -> tuple[str, ...]:
    """One sentence for ranks over the budget, one for ranks that ran out unexpectedly."""
    budget = verdict.memory_budget_bytes
    over = [
        t for t in verdict.too_large
        if t.need_bytes is not None and budget is not None and t.need_bytes > budget
    ]  # fmt: skip
    ran_out = [t for t in verdict.too_large if t not in over and t.ran_out]
    found = []
    if over:
        needs = _joined([f"{bytes_text(t.need_bytes)}" for t in over])
        verb = "needs" if len(over) == 1 else "need"
        found.append(
            f"{_ranks(over)} {'does' if len(over) == 1 else 'do'} not fit the memory budget of "
            f"{bytes_text(budget)}: {'it' if len(over) == 1 else 'they'} {verb} {needs}."
        )
    if ran_out:
        found.append(f"{_ranks(ran_out)} ran out of memory.")
    return tuple(found)


def _ranks(items: Sequence[TooLarge]) -> str:
    names = [f"{t.rank} of AdaLoRA" if t.is_allocated else str(t.rank) for t in items]
    return f"Rank{'s' if len(items) > 1 else ''} {_joined(names)}"


def _joined(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
