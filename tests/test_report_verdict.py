"""What the verdict says, for every kind of study it may meet."""

from __future__ import annotations

import pytest
from test_report_records import (
    BUDGET,
    ENVIRONMENT,
    MIB,
    record,
    study_config,
    study_records,
    with_loss,
)

from rsauto.config import StudyConfig
from rsauto.errors import InputError
from rsauto.records import TrialRecord
from rsauto.report.pareto import select_rank
from rsauto.report.ranks import RANK_COLUMNS, rank_table
from rsauto.report.table import table
from rsauto.report.verdict import judge


def default(number: int, loss: float, rate: float = 2e-3, seed: int = 0) -> TrialRecord:
    role = "default" if rate == 5e-5 else "default_tuned" if seed == 0 else "seed"
    changes = {"role": role, "method": "lora", "alpha": 8, "seed": seed}
    return with_loss(record(number, 8, rate, **changes), loss)


def searched(
    number: int, rank: int, loss: float, seed: int = 0, peak: float | None = None
) -> TrialRecord:
    role = "search" if seed == 0 else "seed"
    trial = record(number, rank, 1.2e-3, role=role, seed=seed)
    if peak is not None:
        trial = record(
            number, rank, 1.2e-3, role=role, seed=seed, predicted_peak_bytes=int(peak * MIB)
        )
    return with_loss(trial, loss)


def say(*records: TrialRecord, config: StudyConfig | None = None) -> str:
    return judge(config or study_config(), records, {}).sentence


def test_a_whole_study() -> None:
    found = study_records()
    verdict = judge(study_config(), found, ENVIRONMENT)
    assert verdict.default == found[0]
    assert verdict.default_tuned is not None and verdict.default_tuned.learning_rate == 2e-3
    assert verdict.best is not None and verdict.best.rank == 128
    assert verdict.recommended is not None and verdict.recommended.rank == 64
    assert verdict.candidate_seeds == 3 and verdict.standings["recommended"].num_seeds == 3
    assert verdict.baseline == 2.311 and verdict.memory_budget_bytes == BUDGET
    assert verdict.noise is not None and verdict.noise.degrees_of_freedom == 8
    assert verdict.gain is not None and verdict.gain.is_certain
    # Seed 0 chose both, so the gain is that of seeds 1 and 2.
    tuned, taken = (
        {
            r.seed: r.eval_loss
            for r in found
            if r.role == "seed" and r.seed and (r.rank, r.alpha, r.learning_rate) == chosen
        }
        for chosen in ((8, 8, 2e-3), (64, 16, 1.6e-3))
    )
    assert sorted(tuned) == sorted(taken) == [1, 2]
    assert verdict.gain.num_fresh_seeds == 2
    expected = sum(tuned.values()) / 2 - sum(taken.values()) / 2
    assert verdict.gain.difference == pytest.approx(expected)
    assert verdict.gain.half_width == pytest.approx(verdict.noise.half_width(2, 2))
    assert verdict.sentences == (
        "Take rank 64 (alpha 16, learning rate 1.6e-3, rsLoRA): its eval loss 1.2273 ± 0.0051 "
        "(mean of 3 seeds) is within 1 % of the best (rank 128, 1.2238 ± 0.0051) and it needs "
        "21.4 MiB.",
        "Rank 64 and rank 128 cannot be told apart at this noise: they differ by 0.0035 ± 0.0094; "
        "rank 64 needs 7.87 MiB less.",
        "It beats the tuned default (LoRA, rank 8, learning rate 2e-3; 1.3528 ± 0.0051) by "
        "0.1252 ± 0.0088 (9.3 %) on the 2 seeds that chose neither.",
        "Rank 256 does not fit the memory budget of 32.0 MiB: it needs 45.0 MiB.",
    )


def test_recommended_is_what_select_rank_takes() -> None:
    found = study_records()
    verdict = judge(study_config(), found, ENVIRONMENT)
    assert verdict.recommended is not None
    row = select_rank(table(found), BUDGET, min_seeds=verdict.candidate_seeds)
    assert row["number"] == verdict.recommended.number


def test_the_best_is_taken_when_nothing_cheaper_is_near() -> None:
    text = say(default(0, 1.5), searched(1, 8, 1.3), searched(2, 64, 1.2))
    assert text.startswith("Take rank 64 (alpha 16, learning rate 1.2e-3, rsLoRA): its eval loss ")
    assert "1.200 is the best found and it needs 21.4 MiB." in text


def test_without_repeats_there_is_no_interval_and_it_says_so() -> None:
    text = say(default(0, 1.5), searched(1, 64, 1.2))
    assert "by 0.3 (20 %). No configuration ran on several seeds" in text
    assert "±" not in text


def test_a_gain_within_the_noise_is_not_called_one() -> None:
    records = [default(n, loss, seed=n) for n, loss in enumerate((1.30, 1.20, 1.25))]
    records += [searched(3 + n, 4, loss, seed=n) for n, loss in enumerate((1.28, 1.18, 1.22))]
    text = say(*records)
    assert "Take rank 4" in text
    assert "It cannot be told apart from the tuned default (LoRA, rank 8" in text
    assert "may be zero" in text and "beats" not in text


def test_the_default_may_win() -> None:
    text = say(default(0, 1.0), searched(1, 64, 1.2))
    assert text.startswith("Take the tuned default, rank 8 (alpha 8, learning rate 2e-3, LoRA): ")
    assert "is the best found" in text
    assert "That is the default adapter itself: nothing tried is better." in text
    near = say(default(0, 1.0), searched(1, 64, 0.995))
    assert "Take the tuned default, rank 8" in near and "better by more than that." in near


def test_a_cheaper_rank_may_be_worse_than_the_default() -> None:
    text = say(default(0, 1.0), searched(1, 2, 1.005))
    assert "Take rank 2" in text and "the best (the tuned default, rank 8, 1.000)" in text
    assert "It is worse than the tuned default (LoRA, rank 8, learning rate 2e-3; 1.000)" in text
    assert "by 0.005 (0.5 %) and needs 755.7 KiB less" in text


def test_no_default_finished() -> None:
    assert "No run of the tuned default finished" in say(searched(0, 8, 1.2))
    oom = record(0, 8, 5e-5, role="default", method="lora", outcome="oom")
    verdict = judge(study_config(), [oom, searched(1, 8, 1.2)], {})
    assert verdict.default == oom and verdict.default_tuned is None and verdict.gain is None


def test_the_default_rate_is_one_of_those_tuned() -> None:
    verdict = judge(study_config(), [default(0, 1.0, 5e-5), default(1, 1.1)], {})
    assert verdict.default_tuned == verdict.default


def test_an_empty_study_and_one_without_results() -> None:
    assert say() == "The study has no trials yet: run rsauto study to start it."
    pruned = with_loss(record(0, 8, 1e-3, outcome="pruned", fidelity=0.25, steps=25), 1.9)
    failed = record(1, 8, 1e-3, outcome="failed")
    assert "None of 2 trials finished at full length" in say(pruned, failed)


def test_every_rank_too_large() -> None:
    records = [record(n, rank, 1e-3, outcome="infeasible") for n, rank in enumerate((256, 512))]
    assert say(*records) == (
        "None of 2 trials finished at full length, so no rank can be recommended yet. Ranks 256 "
        "and 512 do not fit the memory budget of 32.0 MiB: they need 45.0 MiB and 76.5 MiB."
    )


def test_finished_but_over_the_budget() -> None:
    trial = with_loss(record(0, 64, 1e-3, measured_peak_bytes=40 * MIB), 1.0)
    verdict = judge(study_config(), [trial], {})
    assert verdict.recommended is None and verdict.best is None
    assert "Nothing that finished fits the memory budget of 32.0 MiB" in verdict.sentence
    assert verdict.too_large[0].need_bytes == 40 * MIB


def test_a_rank_that_ran_out_though_it_was_planned_to_fit() -> None:
    oom = record(0, 128, 1e-3, outcome="oom")
    text = say(oom, searched(1, 8, 1.0))
    assert text.endswith("Rank 128 ran out of memory.")


def test_single_runs_are_no_candidates_once_finalists_ran_on_seeds() -> None:
    lucky = searched(0, 16, 1.0)
    finalist = [searched(1 + n, 64, loss, seed=n) for n, loss in enumerate((1.1, 1.12, 1.11))]
    verdict = judge(study_config(), [lucky, *finalist], {})
    assert verdict.best is not None and verdict.best.rank == 64
    # A repeated default alone does not shut the search out.
    repeated = [default(n, 1.5 + n / 100, seed=n) for n in range(3)]
    verdict = judge(study_config(), [*repeated, searched(5, 16, 1.0)], {})
    assert verdict.best is not None and verdict.best.rank == 16 and verdict.candidate_seeds == 1


def test_a_seed_that_diverged_costs_the_finalist_its_place() -> None:
    whole = [searched(n, 32, 1.2 + n / 1000, seed=n) for n in range(3)]
    broken = [searched(3 + n, 64, 1.1 + n / 1000, seed=n) for n in range(2)]
    broken.append(record(5, 64, 1.2e-3, role="seed", seed=2, outcome="diverged"))
    verdict = judge(study_config(), [*whole, *broken], {})
    assert verdict.best is not None and verdict.best.rank == 32


def test_a_metric_as_objective_is_maximised() -> None:
    config = study_config(objective="accuracy")
    verdict = judge(config, study_records(), ENVIRONMENT)
    assert verdict.best is not None and verdict.best.rank == 128
    assert verdict.baseline == 0.31
    assert verdict.gain is not None and verdict.gain.difference > 0


def test_an_objective_that_no_record_has() -> None:
    config = study_config(objective="acuracy")
    with pytest.raises(InputError, match=r"objective 'acuracy'.*Did you mean 'accuracy'"):
        judge(config, study_records(), {})
    # While nothing has finished, a metric cannot be there yet.
    unfinished = [record(0, 8, 1e-3, outcome="failed")]
    assert judge(config, unfinished, {}).recommended is None


def test_the_budget_comes_from_the_file_or_from_what_auto_came_to() -> None:
    auto = study_config().model_copy(update={"memory_budget": "auto"})
    trial = record(0, 8, 1e-3, memory_budget_bytes=7)
    assert judge(study_config(), [trial], {}).memory_budget_bytes == BUDGET
    assert judge(auto, [trial], {"memory_budget_bytes": 5}).memory_budget_bytes == 5
    assert judge(auto, [trial], {}).memory_budget_bytes == 7
    assert judge(auto, [], {}).memory_budget_bytes is None


@pytest.mark.parametrize("environment", [{"baseline": None}, {"baseline": 3}, {"baseline": {}}])
def test_an_odd_environment_is_no_reason_to_fail(environment: dict[str, object]) -> None:
    assert judge(study_config(), study_records(), environment).baseline is None


def test_rank_table() -> None:
    found = study_records()
    verdict = judge(study_config(), found, ENVIRONMENT)
    frame = rank_table(found, verdict)
    assert {name: str(frame[name].dtype) for name in frame.columns} == RANK_COLUMNS
    assert frame["rank"].tolist() == [2, 2, 2, 2, 4, 8, 8, 16, 32, 64, 128, 256]
    by_rank = frame[(frame["method"] == "rslora") & ~frame["refit"]].set_index("rank")
    assert by_rank.loc[64, "marks"] == "recommended" and by_rank.loc[128, "marks"] == "best"
    assert by_rank.loc[64, "objective"] == verdict.standings["recommended"].objective
    assert by_rank.loc[64, "best_single"] < by_rank.loc[64, "objective"]
    assert by_rank.loc[64, "num_seeds"] == 3 and by_rank.loc[16, "num_seeds"] == 1
    assert by_rank["fits"].tolist() == [True] * 7 + [False]
    assert by_rank.loc[256, "predicted_peak_bytes"] > BUDGET
    empty = rank_table([], judge(study_config(), [], {}))
    assert len(empty) == 0 and list(empty.columns) == list(RANK_COLUMNS)
