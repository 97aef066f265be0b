"""What a proposal may know, and that a study asks the same however many trials run at once."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from test_agenda import Records, SyntheticRun, space_of

from rsauto.records import TrialRecord, TrialSpec
from rsauto.search.agenda import num_settled
from rsauto.search.history import History, history_of
from rsauto.search.packs import Entrant

SPEC = TrialSpec(
    role="search", method="rslora", rank=4, alpha=8, scaling_rule="rslora", learning_rate=1e-3
)


def records(record_of: Records, *numbers: int) -> dict[int, TrialRecord]:
    return {n: record_of(replace(SPEC, rank=n + 1), n, float(n), "complete") for n in numbers}


def history_with(record_of: Records, count: int, settled: list[int]) -> History:
    """Trials 0 .. count - 1, of rank number + 1, some of them settled."""
    found = records(record_of, *settled)
    return history_of([(n, replace(SPEC, rank=n + 1), found.get(n)) for n in range(count)])


def test_with_a_lookahead_of_one_everything_before_is_known(record_of: Records) -> None:
    history = history_with(record_of, 5, [0, 1, 3])
    known = history.known_to(5, 1)
    assert [record.number for _, record in known.settled] == [0, 1, 3]
    assert [spec.rank for spec in known.pending] == [3, 5]


def test_results_of_the_last_trials_are_not_looked_at_whether_they_ended_or_not(
    record_of: Records,
) -> None:
    early = history_with(record_of, 6, [0, 1, 2])
    late = history_with(record_of, 6, [0, 1, 2, 3, 4, 5])
    for history in (early, late):
        known = history.known_to(6, 4)
        assert [record.number for _, record in known.settled] == [0, 1, 2]
        assert [spec.rank for spec in known.pending] == [4, 5, 6]


def test_a_trial_waits_for_those_that_it_has_to_know_about(record_of: Records) -> None:
    history = history_with(record_of, 6, [0, 2, 3, 4, 5])
    assert history.must_wait(6, 5, running=[1])
    assert not history.must_wait(6, 6, running=[1]), "far enough back"
    assert not history.must_wait(6, 5, running=[]), "another process has it"


def test_a_trial_that_is_run_again_keeps_its_place(record_of: Records) -> None:
    again = replace(SPEC, rank=2, retry_of=1)
    once_more = replace(SPEC, rank=2, retry_of=3)
    found = records(record_of, 0, 2)
    history = history_of(
        [(0, replace(SPEC, rank=1), found[0]), (1, replace(SPEC, rank=2), None),
         (2, replace(SPEC, rank=3), found[2]), (3, again, None), (4, once_more, None)]
    )  # fmt: skip
    assert [trial.number for trial in history.trials] == [0, 4, 2]
    assert history.position_of(4) == 1
    assert history.num_unsettled == 1


class InFlight(SyntheticRun):
    """Several trials at once, which end in any order."""

    def run_at_once(self, size: int, seed: int) -> None:
        generator = random.Random(seed)
        running: list[Entrant] = []
        while num_settled(self.ledger.settled()) < self.config.search.trials:
            while len(running) < (size if self.is_searching(running) else 1):
                entrant = self._begin(self._propose)
                if entrant is None:
                    break
                running.append(entrant)
                assert entrant.trial.number < 200, "the study does not end"
            assert running, "nothing runs and nothing may begin"
            self.end(running.pop(generator.randrange(len(running))))

    def is_searching(self, running: list[Entrant]) -> bool:
        return all(entrant.spec.role == "search" for entrant in running) and self._is_searching()


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.sample(1)
def test_a_study_asks_the_same_however_many_run_at_once_and_in_whatever_order_they_end(
    size: int, record_of: Records
) -> None:
    def mixed(spec: TrialSpec, number: int) -> str:
        return "diverged" if spec.learning_rate > 8e-3 else "complete"

    def asked(at_once: int, seed: int) -> list[TrialSpec]:
        run = InFlight(space_of(trials=40), record_of, mixed)
        run.ledger.set_lookahead(8)
        run.run_at_once(at_once, seed)
        return [trial.spec for trial in run.ledger.history().trials]

    alone = asked(1, 0)
    assert len({spec.role for spec in alone}) == 4
    assert len(alone) == 40
    for seed in (1, 2):
        assert asked(size, seed) == alone


def test_the_last_trials_wait_for_all_others(record_of: Records) -> None:
    run = InFlight(space_of(trials=30), record_of, lambda spec, number: "complete")
    run.ledger.set_lookahead(8)
    entrants: list[Entrant] = []
    while entrant := run._begin(run._propose):
        if entrant.spec.role != "search":
            run.end(entrant)
        elif entrant.known is not None and len(entrants) < 7:
            entrants.append(entrant)
        else:
            run.end(entrant)
    assert entrants, "search trials were running"
    assert all(trial.spec.role != "seed" for trial in run.ledger.history().trials)
