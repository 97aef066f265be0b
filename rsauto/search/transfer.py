"""The strategy `transfer`: one learning-rate ladder at a low rank instead of one at every rank.

1. Ladder: at one low rank, learning rates over the whole range; a cohort, most of which ends at its
   first rungs.
2. Summit: the highest rank at the ladder's best rate, moved by the law of the scaling rule, and at
   rates on both sides of it; a cohort, too.
3. Coverage: every other rank, the highest first, at the rate that the law gives it, so that each
   has a trial of full length.

What follows is sampled in a narrow band around the law, see `narrowed`. Everything is decided from
settled trials: summit and coverage wait for the ladder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from rsauto.choices import RateRange
from rsauto.rate_law import RateLaw, fit_trials, vertex, whole_search_trials
from rsauto.records import Method, TrialRecord, TrialSpec
from rsauto.search.band import Band
from rsauto.search.history import Begun, History, Settled
from rsauto.search.space import Space

T = TypeVar("T", int, float)
Objective = Callable[[TrialRecord], float | None]
Turn = TrialSpec | Literal["wait"] | None
"""The next trial; wait for one that is running; or None when a part has nothing more."""

LEAST_LADDER, MOST_LADDER = 3, 9
"""Rates of a ladder."""

SUMMIT_OCTAVES, LAWLESS_OCTAVES = 0.6, 1.0
"""Distance of the summit's outer learning rates from the middle one, with a law that is trusted and
without."""

BAND_OCTAVES, WIDE_BAND_OCTAVES = 1.0, 2.0
"""Half width of what is sampled around the law, and where trials contradict it."""

EDGE = 0.8
"""Share of the band's half width beyond which the best trial asks for a wider band."""


def transfer_trial(space: Space, history: History, objective: Objective, num_searched: int) -> Turn:
    """The next trial of the three parts. ``num_searched`` trials may be searched in all."""
    begun = [trial for trial in history.trials if trial.spec.role == "search"]
    methods = space.config.search.method
    ladders = [s for method in methods for s in ladder(space, method, num_searched, begun)]
    turn = _next_of(ladders, begun)
    if turn is not None:
        return turn
    summits: list[TrialSpec] = []
    coverage: list[TrialSpec] = []
    for method in methods:
        found = tuned(space, method, history.settled, objective)
        left = num_searched // len(methods) - len(ladder(space, method, num_searched, begun))
        ranks = _open_ranks(space, method, history.settled, left)
        has_room = left >= len(ranks) + 2  # for the outer rates of the summit
        if found is not None and ranks and ranks[0] > found.rank and has_room:
            summits += _summit(space, method, ranks[0], found)
            ranks = ranks[1:]
        coverage += [at_rank(space, method, rank, found) for rank in ranks]
    return _next_of([*summits, *coverage], begun)


def ladder(
    space: Space, method: Method, num_searched: int, begun: Sequence[Begun] = ()
) -> list[TrialSpec]:
    """Learning rates over the whole range at one low rank, the middle ones first.

    One that was ``begun`` stays as it is, whatever trials and ranks the study has now. Nothing
    where there are too few trials for it, or one learning rate.
    """
    number = _ladder_of(space, method)
    first = next(
        (t.spec for t in begun if t.spec.cohort == number and t.spec.rank in space.ranks), None
    )
    if first is not None:
        return _ladder(space, method, first.rank, first.cohort_size or 0)
    share = num_searched // len(space.config.search.method)
    most = min(MOST_LADDER, share // 2, max(LEAST_LADDER, share - len(space.ranks) + 1))
    if most < LEAST_LADDER:
        return []
    return _ladder(space, method, ladder_rank(space), most)


def _ladder(space: Space, method: Method, rank: int, most: int) -> list[TrialSpec]:
    middle = space.middle(rank, method)
    chosen = space.config.search.learning_rate
    if isinstance(chosen, RateRange):
        octaves = math.log2(chosen.high / chosen.low)
        rates = _spread(middle.learning_rate, octaves, min(most, round(octaves) + 1))
    else:
        rates = _thinned(sorted(chosen), most)
    if len(rates) < 2:
        return []
    rates.sort(key=lambda rate: (abs(math.log2(rate / middle.learning_rate)), rate))
    return _cohort([replace(middle, learning_rate=r) for r in rates], _ladder_of(space, method))


def ladder_rank(space: Space) -> int:
    """The feasible rank nearest to reference_rank, the lower of two."""
    wanted = math.log2(space.config.search.reference_rank)
    return min(space.ranks, key=lambda rank: (abs(math.log2(rank) - wanted), rank))


@dataclass(frozen=True, slots=True)
class Tuned:
    """The best learning rate at one rank."""

    rank: int
    rate: float


def tuned(space: Space, method: Method, settled: Settled, objective: Objective) -> Tuned | None:
    """What a method's ladder found: the rate of its best trial, moved towards its neighbours.

    None where no trial of it was completed.
    """
    ours = [
        (spec, record)
        for spec, record in settled
        if spec.cohort == _ladder_of(space, method) and spec.rank in space.ranks
    ]
    values = [
        (value, spec.learning_rate, spec.rank)
        for spec, record in ours
        if (value := objective(record)) is not None
    ]
    if not values:
        return None
    _, rate, rank = min(values)
    curves = {
        spec.learning_rate: {point.step: point.eval_loss for point in record.curve}
        for spec, record in ours
    }
    return Tuned(rank, _between_neighbours(rate, curves))


def _between_neighbours(rate: float, curves: Mapping[float, Mapping[int, float]]) -> float:
    """The vertex of the parabola in ln loss through a rate and its two neighbours, at the last step
    that all three have come to; half-way to a neighbour that was ahead there."""
    rates = sorted(curves)
    place = rates.index(rate)
    near = rates[max(0, place - 1) : place + 2]
    common = set.intersection(*(set(curves[one]) for one in near))
    if len(near) < 3 or not common:
        return rate
    losses = [curves[one][max(common)] for one in near]
    if not all(0 < loss < math.inf for loss in losses):
        return rate
    found = vertex([math.log2(one) for one in near], [math.log(loss) for loss in losses])
    if found is not None:
        return float(2.0**found)
    ahead = near[losses.index(min(losses))]
    return math.sqrt(rate * ahead)


def at_rank(space: Space, method: Method, rank: int, found: Tuned | None) -> TrialSpec:
    """The trial at a rank with the learning rate that the law gives it."""
    middle = space.middle(rank, method)
    if found is None:
        return middle
    rate = space.transferred(method, found.rate, found.rank, rank)
    return replace(middle, learning_rate=space.allowed_rate(rate))


def narrowed(space: Space, settled: Settled, objective: Objective) -> Space:
    """The space with every method's learning rates in a band around what its trials have shown.

    The law's prior holds until the trials contradict it: then their own exponent does, and the band
    is wider. It is wider, too, where the best trial lies at its edge.
    """
    if not isinstance(space.config.search.learning_rate, RateRange):
        return space
    bands: dict[Method, Band] = {}
    for method in space.config.search.method:
        found = tuned(space, method, settled, objective)
        if found is not None:
            bands[method] = _band(space, method, found, settled, objective)
    return replace(space, bands=bands)


def _band(
    space: Space, method: Method, found: Tuned, settled: Settled, objective: Objective
) -> Band:
    prior = space.rate_exponent(method)
    law = fitted(method, settled) if space.has_law(method) else None
    is_off = law is not None and law.contradicts(prior)
    exponent = law.exponent if law is not None and is_off else prior
    widest = space.half_octaves
    half = BAND_OCTAVES if space.trusts_law(method) and not is_off else WIDE_BAND_OCTAVES
    band = Band(found.rate, found.rank, exponent, min(half, widest))
    best = _best(settled, method, objective)
    if best is not None and abs(band.offset(best)) > EDGE * band.half_octaves:
        band = replace(band, half_octaves=min(WIDE_BAND_OCTAVES, widest))
    return band


def fitted(method: Method, settled: Settled) -> RateLaw | None:
    """The exponent of a method's law from its whole trials; None where they are too few."""
    return fit_trials(whole_search_trials((record for _, record in settled), method))


def _best(settled: Settled, method: Method, objective: Objective) -> TrialSpec | None:
    values = [
        (value, record.number, spec)
        for spec, record in settled
        if spec.role == "search"
        and spec.method == method
        and (value := objective(record)) is not None
    ]
    return min(values)[2] if values else None


def _open_ranks(space: Space, method: Method, settled: Settled, most: int) -> list[int]:
    """Ranks to cover, highest first: all but the ladder's own, where that has a whole trial.

    At most that many, evenly chosen.
    """
    done = {
        spec.rank
        for spec, record in settled
        if spec.cohort == _ladder_of(space, method) and record.outcome == "complete"
    }
    return _thinned([rank for rank in reversed(space.ranks) if rank not in done], max(1, most))


def _summit(space: Space, method: Method, rank: int, found: Tuned) -> list[TrialSpec]:
    """A rank at the rate that the law gives it, and on both sides, the middle one first."""
    middle = at_rank(space, method, rank, found)
    width = SUMMIT_OCTAVES if space.trusts_law(method) else LAWLESS_OCTAVES
    rates = [space.allowed_rate(middle.learning_rate * 2**x) for x in (0.0, -width, width)]
    specs = [replace(middle, learning_rate=rate) for rate in dict.fromkeys(rates)]
    return _cohort(specs, _ladder_of(space, method) + 1)


def _ladder_of(space: Space, method: Method) -> int:
    """Number of the cohort that is a method's ladder; its summit's is the next."""
    return 2 * space.config.search.method.index(method)


def _cohort(specs: Sequence[TrialSpec], number: int) -> list[TrialSpec]:
    return [replace(spec, cohort=number, cohort_size=len(specs)) for spec in specs]


def _next_of(wanted: Iterable[TrialSpec], begun: Sequence[Begun]) -> Turn:
    """The first of the wanted trials that was not begun, else whether one of them is unsettled."""
    of = {trial.spec.configuration(): trial for trial in begun}
    found = [(spec, of.get(spec.configuration())) for spec in wanted]
    new = next((spec for spec, trial in found if trial is None), None)
    if new is not None:
        return new
    return "wait" if any(t is not None and t.record is None for _, t in found) else None


def _spread(middle: float, octaves: float, count: int) -> list[float]:
    """``count`` rates evenly over ``octaves`` around ``middle``, on a log scale."""
    step = octaves / (count - 1) if count > 1 else 0.0
    return [float(f"{middle * 2 ** (n * step - octaves / 2):.4g}") for n in range(count)]


def _thinned(values: Sequence[T], most: int) -> list[T]:
    """At most that many, evenly chosen, the ends among them."""
    if len(values) <= most:
        return list(values)
    if most == 1:
        return [values[0]]
    return [values[round(n * (len(values) - 1) / (most - 1))] for n in range(most)]
