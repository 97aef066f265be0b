"""What ends a search beside its trials: tokens, time, device hours."""

from __future__ import annotations

import pytest
from landscape import TOKENS_PER_STEP, Bowl, Landscape
from test_agenda import Records
from test_transfer import space_of

from rsauto.search.history import history_of
from rsauto.search.limits import leaves_no_room, limit_reached, num_tokens

WHOLE = 80 * TOKENS_PER_STEP
"""Tokens of a trial of full length."""


@pytest.mark.parametrize("size", [1, 4])
def test_tokens_are_left_for_the_defaults_and_the_seeds(
    size: int, record_of: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    plenty = Landscape(space_of(min_improvement=0), record_of, Bowl())
    plenty.run_packed(monkeypatch, size)
    limit = num_tokens(plenty.ledger.settled()) - 4 * WHOLE
    run = Landscape(space_of(min_improvement=0, max_tokens=limit), record_of, Bowl())
    run.run_packed(monkeypatch, size)
    settled = run.ledger.settled()
    ends = [spec for spec, _ in settled if spec.role != "search"]
    assert [s.role for s in ends] == [
        s.role for s, _ in plenty.ledger.settled() if s.role != "search"
    ]
    assert len(run.searched) < len(plenty.searched)
    # As near the limit as one trial more would not have been.
    assert limit - 2 * WHOLE < num_tokens(settled) <= limit + WHOLE


def test_room_is_counted_for_what_runs_and_for_what_is_reserved(record_of: Records) -> None:
    space = space_of(max_tokens=10 * WHOLE)
    spec = space.middle(8)
    done = [
        (n, space.middle(rank), record_of(space.middle(rank), n, 1.0, tokens=WHOLE))
        for n, rank in enumerate((2, 4))
    ]
    history = history_of([*done, (2, spec, None)])
    # Two done, one runs, one more: six may be reserved.
    assert not leaves_no_room(space.config, history, 6)
    assert leaves_no_room(space.config, history, 7)
    assert not leaves_no_room(space.config, history_of([]), 99), "nothing is known of a trial yet"
    assert not leaves_no_room(space_of().config, history, 99)


def test_the_limit_that_is_reached_is_named(record_of: Records) -> None:
    spec = space_of().middle(8)
    settled = [(spec, record_of(spec, 0, 1.0, tokens=1500))]
    config = space_of(max_tokens=1500, max_seconds=10, max_gpu_hours=0.5).config
    assert limit_reached(config, settled, 0, 0) == "the limit of 1,500 trained tokens was reached"
    assert limit_reached(config, [], 10, 1800) is None
    assert limit_reached(config, [], 10.1, 0) == "the time limit of 10 seconds was reached"
    assert limit_reached(config, [], 0, 1801) == "the limit of 0.5 device hours was reached"
    assert limit_reached(space_of().config, settled, 1e9, 1e9) is None


def test_the_strategy_gp_runs_to_its_end(
    record_of: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = space_of(strategy="gp", trials=20, rank=[4, 8, 16], min_improvement=0)
    run = Landscape(space, record_of, Bowl())
    run.run_packed(monkeypatch, 2)
    assert len(run.ledger.settled()) == 20
    assert {spec.rank for spec, _ in run.searched} == {4, 8, 16}
