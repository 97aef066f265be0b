"""What repeated seeds do not tell apart is not ranked, against intervals worked out by hand."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console
from test_report_records import MIB, peak_bytes, record, study_config, with_loss, write_study
from test_report_verdict import default, searched

from rsauto.console import print_verdict
from rsauto.intervals import t_quantile
from rsauto.records import TrialRecord
from rsauto.report.cells import rank_grid, tiles
from rsauto.report.noise import Noise
from rsauto.report.page import write_report
from rsauto.report.pareto import select_rank
from rsauto.report.ranks import rank_table
from rsauto.report.table import load_study, table
from rsauto.report.verdict import judge

SPREAD = 0.02


def repeated(start: int, rank: int, mean: float, spread: float = SPREAD) -> list[TrialRecord]:
    """Three seeds whose standard deviation is ``spread``."""
    steps = (-spread, 0.0, spread)
    return [searched(start + n, rank, mean + step, seed=n) for n, step in enumerate(steps)]


def test_quantiles_of_several_comparisons() -> None:
    # One in the table, by the same finite sum, and published values at 0.995, 0.999 and 0.9875.
    assert t_quantile(10, 5) == pytest.approx(3.169, abs=5e-4)
    assert t_quantile(8, 5) == pytest.approx(3.355, abs=5e-4)
    assert t_quantile(10, 25) == pytest.approx(4.144, abs=5e-4)
    assert t_quantile(1, 5) == pytest.approx(63.657, abs=5e-3)
    assert t_quantile(6, 2) == pytest.approx(2.969, abs=5e-4)
    assert t_quantile(200, 5) == pytest.approx(2.601, abs=5e-4)
    assert t_quantile(6, 1) == pytest.approx(2.4469118488)
    with pytest.raises(ValueError, match="num_comparisons"):
        t_quantile(6, 0)


def test_intervals_of_a_mean_and_of_several_differences() -> None:
    noise = Noise(pooled_deviation=SPREAD, degrees_of_freedom=6, num_configurations=3)
    assert noise.mean_half_width(3) == pytest.approx(2.4469118488 * SPREAD / math.sqrt(3))
    assert noise.half_width(3, 3) == pytest.approx(2.4469118488 * SPREAD * math.sqrt(2 / 3))
    assert noise.half_width(3, 3, 2) == pytest.approx(2.9687 * SPREAD * math.sqrt(2 / 3), rel=1e-4)
    with pytest.raises(ValueError, match="a mean needs a seed"):
        noise.mean_half_width(0)


def test_two_ranks_in_the_noise_are_not_ranked_and_the_cheaper_saves() -> None:
    verdict = judge(study_config(), [*repeated(0, 128, 1.0), *repeated(3, 64, 1.02)], {})
    assert verdict.best is not None and verdict.best.rank == 128
    assert [s.record.rank for s in verdict.ties] == [64, 128]
    half_width = 2.7764451052 * SPREAD * math.sqrt(2 / 3)
    assert verdict.tie_half_width == pytest.approx(half_width)
    assert verdict.sentences[1] == (
        "Rank 64 and rank 128 cannot be told apart at this noise: they differ by 0.020 ± 0.045; "
        "rank 64 needs 7.87 MiB less."
    )
    assert peak_bytes(128) - peak_bytes(64) == pytest.approx(7.87 * MIB, rel=1e-3)


@pytest.mark.parametrize(
    ("mean", "rank", "says"),
    [
        (1.009, 64, "is within 1 % of the best (rank 128, 1.000 ± 0.032) and it needs 21.4 MiB."),
        (1.0115, 64, "is within one standard error (0.012) of the best (rank 128, 1.000 ± 0.032)"),
        (1.0116, 128, "is the best mean found"),
        (1.02, 128, "is the best mean found"),
    ],
)
def test_one_standard_error_is_given_away_for_less_memory(
    mean: float, rank: int, says: str
) -> None:
    """s_p / sqrt(3) = 0.02 / sqrt(3) = 0.011547. What cannot be told apart is a wider band."""
    records = [*repeated(0, 128, 1.0), *repeated(3, 64, mean)]
    verdict = judge(study_config(), records, {})
    assert verdict.recommended is not None and verdict.recommended.rank == rank
    assert says in verdict.sentences[0]
    assert [s.record.rank for s in verdict.ties] == [64, 128]
    assert select_rank(table(records))["rank"] == rank


def test_the_standard_error_is_that_of_the_best_over_its_own_seeds() -> None:
    """0.015 is beyond 0.02 / sqrt(3), and within 0.02 / sqrt(1) of a best that ran once."""
    repeats = repeated(0, 64, 1.015)
    assert select_rank(table([*repeats, searched(9, 128, 1.0)]))["rank"] == 64
    assert select_rank(table([*repeats, *repeated(9, 128, 1.0)]))["rank"] == 128
    single = [searched(0, 64, 1.015), searched(9, 128, 1.0)]
    assert select_rank(table(single))["rank"] == 128, "nothing is known about the noise"


def test_a_recommendation_dearer_than_the_cheapest_tie_says_what_it_saves_itself() -> None:
    records = [*repeated(0, 128, 1.0), *repeated(3, 64, 1.005), *repeated(6, 16, 1.02)]
    verdict = judge(study_config(), records, {})
    assert verdict.recommended is not None and verdict.recommended.rank == 64
    assert verdict.sentences[0].endswith("and it needs 21.4 MiB, 7.87 MiB less.")
    assert "Of rank 16, rank 64 and rank 128 none can be told apart" in verdict.sentences[1]


def test_the_mean_is_told_with_its_interval() -> None:
    verdict = judge(study_config(), [*repeated(0, 128, 1.5), *repeated(3, 64, 1.0)], {})
    half_width = 2.7764451052 * SPREAD / math.sqrt(3)
    assert verdict.standings["recommended"].half_width == pytest.approx(half_width)
    assert (
        "its eval loss 1.000 ± 0.032 (mean of 3 seeds) is the best mean found" in verdict.sentence
    )
    assert tiles(verdict)[1] == ("eval loss", "1.000 ± 0.032", "mean of 3 seeds, ± 95 %")
    assert verdict.ties == () and "told apart" not in verdict.sentence


def test_intervals_to_the_best_hold_all_together() -> None:
    """A difference of 0.043 is beyond one interval (0.0400) but not beyond two at once (0.0485)."""
    records = [*repeated(0, 128, 1.0), *repeated(3, 64, 1.043), *repeated(6, 4, 1.3)]
    verdict = judge(study_config(), records, {})
    assert verdict.tie_half_width == pytest.approx(0.04848, abs=1e-5)
    assert [s.record.rank for s in verdict.ties] == [64, 128]
    assert [s.record.rank for s in judge(study_config(), records[:6], {}).ties] == [64, 128]
    apart = [*records[:3], *repeated(3, 64, 1.05), *records[6:]]
    assert judge(study_config(), apart, {}).ties == ()


def test_several_ranks_in_the_noise() -> None:
    records = [*repeated(0, 128, 1.0), *repeated(3, 64, 1.02), *repeated(6, 16, 1.01)]
    verdict = judge(study_config(), records, {})
    saved = (peak_bytes(128) - peak_bytes(16)) / MIB
    assert verdict.sentences[1] == (
        "Of rank 16, rank 64 and rank 128 none can be told apart from the best at this noise, "
        f"± 0.048 on each difference; rank 16 needs {saved:.1f} MiB less than rank 128."
    )


def test_a_tie_between_methods_names_them() -> None:
    tuned = [default(n, 1.01 + step, seed=n) for n, step in enumerate((-0.02, 0.0, 0.02))]
    verdict = judge(study_config(), [*tuned, *repeated(3, 64, 1.0)], {})
    assert "LoRA rank 8 and rsLoRA rank 64 cannot be told apart at this noise" in verdict.sentence


def test_settings_of_one_rank_in_the_noise() -> None:
    other = [
        with_loss(record(3 + n, 64, 2e-3, role="seed" if n else "search", seed=n), 1.0 + step)
        for n, step in enumerate((-0.02, 0.0, 0.02))
    ]
    text = judge(study_config(), [*repeated(0, 64, 1.0), *other], {}).sentence
    assert "2 settings of rank 64 cannot be told apart at this noise." in text


def test_a_maximised_objective_ties_alike() -> None:
    """accuracy = 0.9 - 0.3 loss, so every interval is 0.3 as wide."""
    records = [*repeated(0, 128, 1.0), *repeated(3, 64, 1.02), *repeated(6, 4, 1.3)]
    verdict = judge(study_config(objective="accuracy"), records, {})
    assert verdict.best is not None and verdict.best.rank == 128
    assert [s.record.rank for s in verdict.ties] == [64, 128]
    assert verdict.tie_half_width == pytest.approx(0.3 * 0.04848, abs=1e-5)
    assert "they differ by 0.006 ± 0.015; rank 64 needs" in verdict.sentence


def test_equal_means_without_any_spread_are_tied() -> None:
    records = [*repeated(0, 128, 1.0, spread=0.0), *repeated(3, 64, 1.0, spread=0.0)]
    verdict = judge(study_config(), records, {})
    assert verdict.recommended is not None and verdict.recommended.rank == 64
    assert [s.record.rank for s in verdict.ties] == [64, 128]


def test_without_repeated_seeds_nothing_is_said_about_noise_but_that() -> None:
    records = [searched(0, 128, 1.0), searched(1, 64, 1.001)]
    verdict = judge(study_config(), records, {})
    assert verdict.ties == () and verdict.tie_half_width is None
    assert verdict.standings["best"].half_width is None
    assert "±" not in verdict.sentence and "told apart" not in verdict.sentence
    assert (
        "No configuration ran on several seeds, so nothing is known about the noise: "
        "which rank is best may be luck." in verdict.sentences
    )
    assert tiles(verdict)[1][2] == "one seed, noise not known"
    frame = rank_table(records, verdict)
    assert frame["half_width"].isna().all() and frame["is_tied"].isna().all()


def test_single_runs_beside_a_repeated_default() -> None:
    """The default's noise is what is known; a pair of single runs is compared by itself."""
    tuned = [default(n, 2.0 + step, seed=n) for n, step in enumerate((-0.02, 0.0, 0.02))]
    singles = [searched(5, 128, 1.0), searched(6, 64, 1.1), searched(7, 16, 1.2)]
    verdict = judge(study_config(), [*tuned, *singles], {})
    half_width = 4.3026527297 * SPREAD * math.sqrt(2)
    assert verdict.candidate_seeds == 1
    assert verdict.tie_half_width == pytest.approx(half_width)
    assert [s.record.rank for s in verdict.ties] == [64, 128]
    assert verdict.standings["best"].half_width is None
    assert "its eval loss 1.000 is the best found" in verdict.sentence
    assert "The ranks ran on one seed each, so which is best may be luck" in verdict.sentence


def test_the_rank_table_shows_intervals_and_ties() -> None:
    records = [
        *repeated(0, 128, 1.0), *repeated(3, 64, 1.01), *repeated(6, 4, 1.3),
        searched(9, 16, 0.9), default(10, 1.5),
    ]  # fmt: skip
    verdict = judge(study_config(), records, {})
    frame = rank_table(records, verdict).set_index("rank")
    assert frame.loc[64, "half_width"] == pytest.approx(2.4469118488 * SPREAD / math.sqrt(3))
    assert pd.isna(frame.loc[16, "half_width"]) and pd.isna(frame.loc[16, "is_tied"])
    assert frame.loc[[4, 64, 128], "is_tied"].tolist() == [False, True, True]
    grid = rank_grid(frame.reset_index(), verdict)
    cells = {row[0]: row for row in grid.rows}
    marks, value = grid.headers.index(""), grid.headers.index("eval loss")
    assert (cells["64"][marks], cells["64"][value]) == (
        "recommended, tied with best", "1.010 ± 0.028"
    )  # fmt: skip
    assert (cells["128"][marks], cells["16"][value]) == ("best", "0.9000")


def test_a_gain_that_may_be_zero_is_not_put_in_large_figures() -> None:
    records = [default(n, loss, seed=n) for n, loss in enumerate((1.30, 1.20, 1.25))]
    records += [searched(3 + n, 4, loss, seed=n) for n, loss in enumerate((1.28, 1.18, 1.22))]
    tile = tiles(judge(study_config(), records, {}))[3]
    assert tile[0] == "gain over the tuned default" and tile[1] == "within noise"


def test_the_terminal_shows_the_same(tmp_path: Path) -> None:
    records = [*repeated(0, 128, 1.0), *repeated(3, 64, 1.01)]
    environment = {"ended": "all 40 trials have settled."}
    folder = write_study(tmp_path, records, environment=environment)
    verdict = write_report(folder)
    console = Console(width=220, file=io.StringIO())
    print_verdict(load_study(folder), verdict, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "1.010 ± 0.032" in text and "recommended, tied with best" in text
    assert "Rank 64 and rank 128 cannot be told apart at this noise" in text
    assert "Two single runs less than 0.079 apart (95 %) cannot be told apart." in text
    assert "Why the search ended: all 40 trials have settled.\n" in text
