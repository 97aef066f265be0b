"""Repeated seeds, against numbers worked out with nothing but `statistics`."""

from __future__ import annotations

import math
import statistics

import pytest
from test_report_records import allocated, record, refit, with_loss

from rsauto.records import AllocationSpec
from rsauto.report.noise import CONFIGURATION, configurations, seed_noise, t_quantile
from rsauto.report.table import table

A = (1.00, 1.02, 1.05)
B = (2.10, 2.00)


def repeats() -> list[object]:
    first = [with_loss(record(n, 8, 1e-3, seed=n), loss) for n, loss in enumerate(A)]
    second = [with_loss(record(3 + n, 64, 1e-3, seed=n), loss) for n, loss in enumerate(B)]
    alone = [with_loss(record(9, 128, 1e-3), 5.0)]
    return [*first, *second, *alone]


def test_pooled_deviation_by_hand() -> None:
    noise = seed_noise(table(repeats()))  # type: ignore[arg-type]
    assert noise is not None
    pooled = math.sqrt((2 * statistics.variance(A) + 1 * statistics.variance(B)) / 3)
    assert noise.pooled_deviation == pytest.approx(pooled)
    assert (noise.degrees_of_freedom, noise.num_configurations) == (3, 2)
    assert noise.half_width(3, 2) == pytest.approx(3.182446305 * pooled * math.sqrt(1 / 3 + 1 / 2))


def test_two_equal_groups_give_the_textbook_interval() -> None:
    # Two samples of 3, both with variance 1: t(4) * sqrt(2/3) = 2.776 * 0.81650.
    trials = [
        with_loss(record(3 * g + n, 8 * (g + 1), 1e-3, seed=n), value + 10 * g)
        for g in (0, 1)
        for n, value in enumerate((1.0, 2.0, 3.0))
    ]
    noise = seed_noise(table(trials))
    assert noise is not None and noise.pooled_deviation == pytest.approx(1.0)
    assert noise.half_width(3, 3) == pytest.approx(2.266957, abs=1e-5)


def test_no_repeats_no_noise() -> None:
    assert seed_noise(table([])) is None
    assert seed_noise(table([with_loss(record(0, 8, 1e-3), 1.0)])) is None


def test_a_seed_run_again_alone_is_no_second_seed() -> None:
    """Finalists run again outside their pack on the search's own seed: the same trial twice."""
    trials = [with_loss(record(0, 8, 1e-3, engine="packed", pack_id="a"), 1.0),
              with_loss(record(1, 8, 1e-3, role="seed"), 1.02, solo=True)]  # fmt: skip
    assert seed_noise(table(trials)) is None
    row = configurations(table(trials)).iloc[0]
    assert (row["num_seeds"], row["roles"], row["numbers"]) == (1, "search,seed", "0,1")
    assert row["number"] == 1, "the trial that ran alone stands for the configuration"
    other_seed = with_loss(record(2, 8, 1e-3, role="seed", seed=1), 1.05)
    row = configurations(table([*trials, other_seed])).iloc[0]
    assert row["eval_loss"] == pytest.approx((1.01 + 1.05) / 2)


def test_trials_that_did_not_finish_say_nothing_about_noise() -> None:
    trials = [
        with_loss(record(0, 8, 1e-3), 1.0),
        with_loss(record(1, 8, 1e-3, seed=1, outcome="pruned", steps=25, fidelity=0.25), 2.0),
        record(2, 8, 1e-3, seed=2, outcome="diverged"),
    ]
    assert seed_noise(table(trials)) is None


@pytest.mark.parametrize("name", CONFIGURATION)
def test_every_setting_tells_configurations_apart(name: str) -> None:
    frame = table([with_loss(record(n, 8, 1e-3, seed=n), 1.0) for n in (0, 1)])
    assert len(configurations(frame)) == 1
    changed = "other" if str(frame[name].dtype) == "string" else 3
    frame.loc[1, name] = changed
    assert len(configurations(frame)) == 2


def test_ranks_that_were_given_tell_configurations_apart() -> None:
    """A refit is neither rsLoRA of one rank nor a refit of other ranks; its own seeds repeat it."""
    trials = [
        with_loss(record(0, 2, 4e-3), 1.0),
        with_loss(refit(1), 1.1),
        with_loss(refit(2, role="seed", seed=1), 1.2),
        with_loss(refit(3, {"model.layers.0.mlp.up_proj": 2}), 1.3),
    ]
    assert configurations(table(trials))["numbers"].tolist() == ["0", "1,2", "3"]


def test_ranks_that_adalora_found_are_a_result_and_tell_nothing_apart() -> None:
    trials = [
        with_loss(allocated(0), 1.0),
        with_loss(allocated(1, {"model.layers.0.mlp.up_proj": 2}, seed=1), 1.1),
        with_loss(allocated(2, seed=1, lambda_lr_ratio=4.0), 1.1),
        with_loss(allocated(3, seed=1, init_rank=4), 1.1),
        with_loss(allocated(4, seed=1, allocation=AllocationSpec(tinit=9, tfinal=30)), 1.1),
    ]
    assert configurations(table(trials))["numbers"].tolist() == ["0,1", "2", "3", "4"]


def test_a_longer_run_is_another_configuration() -> None:
    trials = [with_loss(record(0, 8, 1e-3, steps=100), 1.0),
              with_loss(record(1, 8, 1e-3, seed=1, steps=200), 1.0)]  # fmt: skip
    assert len(configurations(table(trials))) == 2


def test_means_and_peaks_of_a_configuration() -> None:
    trials = [with_loss(record(n, 8, 1e-3, seed=n), loss, solo=True) for n, loss in enumerate(A)]
    row = configurations(table(trials)).iloc[0]
    assert row["eval_loss"] == pytest.approx(statistics.fmean(A))
    assert row["accuracy"] == pytest.approx(0.9 - 0.3 * statistics.fmean(A))
    assert row["measured_peak_bytes"] == trials[0].measured_peak_bytes
    assert row["train_seconds"] == trials[0].train_seconds
    assert len(configurations(table([]))) == 0


def test_t_quantiles() -> None:
    assert t_quantile(1) == pytest.approx(12.7062047) and t_quantile(8) == pytest.approx(2.3060041)
    # Beyond the table, against published values.
    assert t_quantile(40) == pytest.approx(2.021, abs=2e-3)
    assert t_quantile(120) == pytest.approx(1.980, abs=1e-3)
    assert all(t_quantile(n) > t_quantile(n + 1) for n in range(1, 60))
    with pytest.raises(ValueError, match="at least 1"):
        t_quantile(0)
