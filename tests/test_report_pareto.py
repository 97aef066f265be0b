"""The Pareto front and the choice of a rank, against cases worked by hand and brute force."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report_records import BUDGET, MIB, record, study_records, with_loss

from rsauto.errors import InputError
from rsauto.report.pareto import pareto, select_rank
from rsauto.report.table import table


def trials(*rows: tuple[int, float, float], **changes: Any) -> pd.DataFrame:
    """A table of complete trials given as (rank, peak in MiB, loss), numbered as they come."""
    return table(
        [
            with_loss(record(n, rank, 1e-3, predicted_peak_bytes=int(peak * MIB), **changes), loss)
            for n, (rank, peak, loss) in enumerate(rows)
        ]
    )


def test_front_drawn_by_hand() -> None:
    #   loss 5 | a                a, c, e and its equal f cannot be beaten;
    #        4 |    b             b is beaten by c, which costs the same;
    #        3 |    c  d          d costs more than c for the same loss;
    #        2 |          e f     g costs more than e and is worse
    #          +--1--2--3--4--5
    frame = trials(
        (2, 1, 5), (4, 2, 4), (8, 2, 3), (16, 3, 3), (32, 4, 2), (64, 4, 2), (128, 5, 2.5)
    )
    assert pareto(frame)["number"].tolist() == [0, 2, 4, 5]
    assert pareto(frame, minimize_y=False)["number"].tolist() == [0]


def test_front_of_a_metric_that_is_maximised() -> None:
    frame = trials((2, 1, 5), (4, 2, 4), (8, 3, 4.5))
    front = pareto(frame, y="accuracy", minimize_y=False)
    assert front["number"].tolist() == [0, 1]
    assert pareto(frame, y="accuracy").equals(front), "as its name says"
    assert pareto(frame).equals(pareto(frame, minimize_y=True))
    by_train_loss = frame.assign(train_loss=frame["eval_loss"])
    assert pareto(by_train_loss, y="train_loss")["number"].tolist() == [0, 1]


def test_only_complete_full_length_feasible_trials_take_part() -> None:
    good = with_loss(record(0, 8, 1e-3), 2.0)
    others = [
        with_loss(record(1, 8, 1e-3, outcome="pruned", fidelity=0.25, steps=25), 1.0),
        with_loss(record(2, 8, 1e-3, outcome="complete", fidelity=0.5, steps=50), 1.0),
        with_loss(record(3, 8, 1e-3, measured_peak_bytes=BUDGET + 1), 1.0),
        with_loss(record(4, 8, 1e-3, predicted_peak_bytes=None), 1.0),
        record(5, 8, 1e-3),
    ]
    assert pareto(table([good, *others]))["number"].tolist() == [0]
    assert len(pareto(table([]))) == 0


@settings(max_examples=60, deadline=None)
@given(
    points=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=9),
    minimize=st.booleans(),
)
def test_front_agrees_with_comparing_every_pair(
    points: list[tuple[int, int]], minimize: bool
) -> None:
    frame = pd.DataFrame(
        {
            "number": pd.array(range(len(points)), dtype="Int64"),
            "predicted_peak_bytes": pd.array([x for x, _ in points], dtype="Int64"),
            "eval_loss": pd.array([float(y) for _, y in points], dtype="Float64"),
        }
    )
    sign = 1 if minimize else -1

    def beats(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a[0] <= b[0] and sign * a[1] <= sign * b[1] and a != b

    expected = {i for i, b in enumerate(points) if not any(beats(a, b) for a in points)}
    front = pareto(frame, minimize_y=minimize)
    assert set(front["number"]) == expected
    assert front["predicted_peak_bytes"].is_monotonic_increasing


def test_an_unknown_column_lists_the_objectives() -> None:
    frame = trials((8, 1, 2.0))
    with pytest.raises(InputError, match=r"eval_loss, perplexity, train_loss, accuracy.*Did you"):
        pareto(frame, y="eval_los")
    with pytest.raises(InputError, match="'worker' is not a number"):
        select_rank(frame, objective="worker")


def test_cheapest_within_one_percent_of_the_best() -> None:
    frame = trials((8, 10, 1.05), (16, 12, 1.01), (32, 16, 1.004), (64, 24, 1.0))
    assert select_rank(frame)["rank"] == 16
    assert select_rank(frame, within=0.0)["rank"] == 64
    assert select_rank(frame, within=0.005)["rank"] == 32
    assert select_rank(frame, within=0.06)["rank"] == 8
    assert select_rank(frame, prefer="best")["rank"] == 64


def test_the_budget_decides_who_is_the_best() -> None:
    frame = trials((8, 10, 1.05), (16, 12, 1.02), (32, 16, 1.004), (64, 24, 1.0))
    assert select_rank(frame, "12MiB")["rank"] == 16
    assert select_rank(frame, 12 * MIB)["rank"] == 16
    assert select_rank(frame, "11.9 MiB")["rank"] == 8
    # A larger budget than the one the trials ran under lets every complete trial in.
    assert select_rank(frame, "1TiB", within=0.0)["rank"] == 64


def test_what_was_measured_or_reserved_counts_against_the_budget() -> None:
    small = with_loss(record(0, 8, 1e-3, predicted_peak_bytes=10 * MIB), 1.0)
    large = with_loss(
        record(1, 16, 1e-3, predicted_peak_bytes=11 * MIB, measured_peak_bytes=13 * MIB), 0.5
    )
    reserved = with_loss(
        record(2, 32, 1e-3, predicted_peak_bytes=11 * MIB, predicted_reserved_bytes=14 * MIB), 0.4
    )
    frame = table([small, large, reserved])
    assert select_rank(frame, "12MiB")["rank"] == 8
    assert select_rank(frame, "13MiB")["rank"] == 16


def test_ties_go_to_less_memory_then_fewer_flops_then_the_better_objective() -> None:
    def one(number: int, rate: float, loss: float, flops: float, peak: int) -> Any:
        changes = {"flops": flops, "predicted_peak_bytes": peak * MIB}
        return with_loss(record(number, 8, rate, **changes), loss)

    assert select_rank(table([one(0, 1.0, 1.0, 5, 10), one(1, 2.0, 1.0, 9, 9)]))["number"] == 1
    assert select_rank(table([one(0, 1.0, 1.0, 5, 10), one(1, 2.0, 1.0, 4, 10)]))["number"] == 1
    assert select_rank(table([one(0, 1.0, 1.01, 5, 10), one(1, 2.0, 1.0, 5, 10)]))["number"] == 1
    assert select_rank(table([one(0, 1.0, 1.0, 5, 10), one(1, 2.0, 1.0, 5, 10)]))["number"] == 0


def test_largest_rank_that_fits_at_its_best() -> None:
    frame = trials((8, 10, 1.0), (64, 24, 1.5), (128, 40, 1.0), memory_budget_bytes=100 * MIB)
    assert select_rank(frame, prefer="largest")["rank"] == 128
    assert select_rank(frame, "24MiB", prefer="largest")["rank"] == 64
    rates = [with_loss(record(n, 64, 10.0**-n), loss) for n, loss in enumerate((1.4, 1.2, 1.3))]
    assert select_rank(table(rates), prefer="largest")["number"] == 1


def test_seeds_are_averaged_before_anything_is_compared() -> None:
    lucky = [with_loss(record(n, 8, 1e-3, seed=n), loss) for n, loss in enumerate((0.8, 1.4))]
    steady = [with_loss(record(n, 16, 1e-3, seed=n), loss) for n, loss in ((2, 1.0), (3, 1.02))]
    row = select_rank(table([*lucky, *steady]), prefer="best")
    assert (row["rank"], row["num_seeds"], row["numbers"]) == (16, 2, "2,3")
    assert row["eval_loss"] == pytest.approx(1.01)


def test_min_seeds_leaves_out_single_runs() -> None:
    single = with_loss(record(0, 8, 1e-3), 0.5)
    twice = [with_loss(record(n, 16, 1e-3, seed=n), 1.0) for n in (1, 2)]
    frame = table([single, *twice])
    assert select_rank(frame)["rank"] == 8
    assert select_rank(frame, min_seeds=2)["rank"] == 16
    with pytest.raises(InputError, match="no trial finished"):
        select_rank(frame, min_seeds=3)


def test_a_metric_is_maximised_unless_told_otherwise() -> None:
    frame = trials((8, 10, 1.5), (16, 12, 1.0))
    assert select_rank(frame, objective="accuracy", within=0.0)["rank"] == 16
    assert select_rank(frame, objective="accuracy", within=0.0, minimize=False)["rank"] == 16
    assert select_rank(frame, objective="accuracy", within=0.0, minimize=True)["rank"] == 8


def test_an_objective_below_zero_has_a_margin_of_the_right_sign() -> None:
    frame = trials((8, 10, 1.0), (16, 12, 1.0), (32, 14, 1.0))
    frame["score"] = pd.array([-1.2, -1.005, -1.0], dtype="Float64")
    assert select_rank(frame, objective="score")["rank"] == 16


def test_defaults_are_candidates() -> None:
    frame = table(
        [
            with_loss(record(0, 8, 1e-3, role="default_tuned", method="lora", alpha=8), 1.0),
            with_loss(record(1, 64, 1e-3), 1.1),
        ]
    )
    assert select_rank(frame)["role"] == "default_tuned"


def test_a_table_made_by_hand_needs_few_columns() -> None:
    frame = pd.DataFrame(
        {"rank": [8, 16], "eval_loss": [1.2, 1.0], "predicted_peak_bytes": [100, 200]}
    )
    assert select_rank(frame)["rank"] == 16
    assert select_rank(frame, 150)["rank"] == 8


def test_nothing_fits_says_what_the_smallest_needs() -> None:
    frame = trials((8, 10, 1.0), (16, 12, 1.0))
    with pytest.raises(InputError, match=r"budget of 8\.00 MiB.*rank 8, needs 10\.0 MiB"):
        select_rank(frame, "8MiB")
    with pytest.raises(InputError, match="no trial finished at full length"):
        select_rank(table([]))
    with pytest.raises(InputError, match="no trial finished"):
        select_rank(table([record(0, 8, 1e-3, outcome="oom")]))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prefer": "biggest"}, "prefer must be 'cheapest', 'best' or 'largest', got 'biggest'"),
        ({"within": -0.1}, "within must be"),
        ({"within": float("nan")}, "within must be"),
        ({"memory_budget": "24 apples"}, "memory_budget '24 apples'"),
        ({"memory_budget": "auto"}, "give a size"),
        ({"memory_budget": True}, "give a size"),
        ({"memory_budget": -5}, "memory_budget -5"),
        ({"objective": "bleu"}, "'bleu' is not a column"),
        ({"time_budget": "soon"}, "time_budget must be seconds, .* got 'soon'"),
        ({"time_budget": 0}, "time_budget must be"),
        ({"time_budget": True}, "time_budget must be"),
        ({"time_budget": [1]}, "time_budget must be"),
        ({"parameters": True}, "parameters must be a whole number"),
        ({"time_budget": "-2h"}, "time_budget must be"),
        ({"time_budget": "3.5h", "parameters": 1.5}, "parameters must be a whole number"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        select_rank(trials((8, 10, 1.0)), **arguments)


def timed(*rows: tuple[int, float | None, int, float]) -> pd.DataFrame:
    """A table of complete trials given as (rank, seconds, parameters, loss)."""
    return table(
        [
            with_loss(
                record(n, rank, 1e-3, train_seconds=seconds, num_trainable_params=count), loss
            )
            for n, (rank, seconds, count, loss) in enumerate(rows)
        ]
    )


def test_time_and_parameters_limit_what_is_considered() -> None:
    frame = timed((8, 60, 100, 3.0), (16, 90, 200, 2.0), (32, None, 400, 1.0), (64, 240, 800, 0.5))
    assert select_rank(frame)["rank"] == 64
    assert select_rank(frame, time_budget=239)["rank"] == 16
    assert select_rank(frame, time_budget="4min")["rank"] == 64
    assert select_rank(frame, time_budget="89")["rank"] == 8
    assert select_rank(frame, time_budget=timedelta(minutes=4))["rank"] == 64
    assert select_rank(frame, parameters=400)["rank"] == 32
    counts = frame["num_trainable_params"].to_numpy(dtype="int64")
    assert select_rank(frame, parameters=counts[2])["rank"] == 32, "a number of NumPy's"
    assert select_rank(frame, parameters=400, time_budget="1h", prefer="largest")["rank"] == 16
    with pytest.raises(InputError, match=r"time_budget of 59\.0 s: .* rank 8, takes 1 min 0 s"):
        select_rank(frame, time_budget=59)
    with pytest.raises(InputError, match="the parameters of 99: the cheapest, rank 8, takes 100"):
        select_rank(frame, parameters=99)
    with pytest.raises(InputError, match="no configuration has train_seconds of its own"):
        select_rank(timed((8, None, 100, 3.0)), time_budget=10)


def test_on_a_whole_study() -> None:
    frame = table(study_records())
    assert select_rank(frame, "16MiB")["rank"] == 16
    assert select_rank(frame, "22MiB", min_seeds=3, prefer="best")["rank"] == 64
    assert select_rank(frame, "22MiB", min_seeds=3)["rank"] == 32
    assert select_rank(frame, "32MiB", min_seeds=3)["rank"] == 64
    assert select_rank(frame, "32MiB", prefer="largest")["rank"] == 128
