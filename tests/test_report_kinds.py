"""Trials that differ in a power of rank are different kinds, in every table and figure."""

from __future__ import annotations

import math
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from test_report_records import study_config
from test_report_verdict import searched

from rsauto.console import ranks_as_table
from rsauto.records import TrialRecord
from rsauto.report.cells import rank_grid
from rsauto.report.drawing import _layers
from rsauto.report.figures import panels
from rsauto.report.kinds import kind_looks, kind_of, kinds
from rsauto.report.panel import Panel
from rsauto.report.ranks import rank_table
from rsauto.report.rates import rate_findings
from rsauto.report.steps import steps
from rsauto.report.table import Study, table
from rsauto.report.verdict import judge
from rsauto.scaling import init_scale

RANKS = (4, 16, 64)


def trial(number: int, rank: int, loss: float, power: float | None, init: float) -> TrialRecord:
    made = searched(number, rank, loss)
    return replace(made, method="lora", scaling_exponent=power, init_scale=init_scale(rank, init))


def ablation() -> list[TrialRecord]:
    """r^-1/4 is best at every rank, r^-2 worst, and LoRA with a narrow A between them."""
    sorts = [(None, 0.0, 1.2), (-0.25, 0.0, 1.0), (-2.0, 0.0, 1.6), (None, -0.5, 1.4)]
    found = []
    for power, init, loss in sorts:
        for rank in RANKS:
            found.append(trial(len(found), rank, loss - rank / 1000, power, init))
    return found


NAMES = ["LoRA", "LoRA alpha r^-0.25", "LoRA alpha r^-2", "LoRA, A by r^-0.5"]


def test_their_names_are_those_of_the_powers_at_every_rank() -> None:
    assert list(dict.fromkeys(kind_of(record) for record in ablation())) == NAMES
    assert list(kinds(table(ablation()))) == [name for name in NAMES for _ in RANKS]
    assert kind_of(trial(0, 1, 1.0, None, -0.5)) == "LoRA", "one to any power is one"
    near = {kind_of(trial(0, 8, 1.0, None, power)) for power in (-0.333, -0.3333)}
    assert len(near) == 2
    assert kind_of(trial(0, 8, 1.0, -2.0, -0.5)) == "LoRA alpha r^-2, A by r^-0.5"


def test_every_kind_has_its_row_and_its_loss() -> None:
    records = ablation()
    verdict = judge(study_config(), records, {})
    ranks = rank_table(records, verdict)
    assert len(ranks) == len(records)
    losses = {(record.rank, kind_of(record)): record.eval_loss for record in records}
    for row in ranks.to_dict(orient="records"):
        assert row["objective"] == pytest.approx(losses[row["rank"], row["kind"]])
    marked = ranks[ranks["marks"].str.contains("best")]
    assert list(marked["kind"]) == ["LoRA alpha r^-0.25"]
    shown = rank_grid(ranks, verdict)
    column = shown.headers.index("method")
    assert [row[column] for row in shown.rows] == NAMES * len(RANKS)
    down, _ = steps(ranks, verdict)
    assert down.setting is not None and "LoRA alpha r^-0.25" in down.setting


def test_every_kind_has_its_line() -> None:
    records = ablation()
    drawn = {
        panel.key: panel
        for panel in panels(records, judge(study_config(), records, {}))
        if isinstance(panel, Panel)
    }
    best = [layer for layer in drawn["rank"].layers if layer.name.startswith("best of")]
    assert [layer.name.removeprefix("best of ") for layer in best] == NAMES
    assert all(len(layer.x) == len(RANKS) for layer in best)
    assert len({layer.colour for layer in best}) == len(NAMES)
    points = [layer for layer in drawn["memory"].layers if layer.name in NAMES]
    assert sorted(layer.name for layer in points) == NAMES
    assert len({(layer.colour, layer.symbol) for layer in points}) == len(NAMES)
    for layer in points:
        assert all(f"{layer.name} rank" in hover for hover in layer.hover)
    lines = [layer for layer in drawn["curves"].layers if layer.in_legend]
    assert [layer.name for layer in lines] == [f"{n} {rank}" for rank in RANKS for n in NAMES]
    assert len({layer.dash for layer in lines if layer.name.endswith(" 64")}) == len(NAMES)
    assert {layer.name for layer in drawn["learning_rate"].layers} == {line.name for line in lines}


@pytest.mark.parametrize("scale", [0.0, -0.5, math.inf, math.nan])
def test_a_record_that_no_study_wrote_is_named_alike_everywhere(scale: float) -> None:
    odd = replace(trial(0, 8, 1.0, None, 0.0), init_scale=scale)
    assert list(kinds(table([odd]))) == [kind_of(odd)]
    verdict = judge(study_config(), [odd], {})
    assert "best" in rank_table([odd], verdict)["marks"][0]


def test_one_power_in_the_place_of_both_rules_is_one_kind() -> None:
    """Their gamma_r is the same, and so is all that they are."""
    of_lora = [trial(rank, rank, 1.0 - rank / 100, -0.25, 0.0) for rank in RANKS]
    of_rslora = [replace(record, number=100 + record.number, method="rslora") for record in of_lora]
    records = [*of_lora, *of_rslora]
    verdict = judge(study_config(), records, {})
    ranks = rank_table(records, verdict)
    assert list(ranks["num_trials"]) == [2, 2, 2]
    assert list(ranks["marks"].str.contains("best")) == [False, False, True]
    (memory, *_) = panels(records, verdict)
    assert isinstance(memory, Panel)
    points = [layer for layer in memory.layers if layer.name == "LoRA alpha r^-0.25"]
    assert [len(layer.x) for layer in points] == [len(records)]


def test_a_row_of_the_terminal_never_loses_its_numbers() -> None:
    records = ablation()
    records += [trial(50 + rank, rank, 0.9, -0.25, -0.5) for rank in RANKS]
    verdict = judge(study_config(), records, {})
    study = Study(folder=Path("out"), config=study_config(), environment={},
                  records=tuple(records), trials=table(records))  # fmt: skip
    console = Console(width=80, file=StringIO())
    console.print(ranks_as_table(study, verdict, 80))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in said and "best" in said
    assert max(map(len, said.splitlines())) <= 80


def test_legends_of_long_names_have_fewer_columns() -> None:
    records = [trial(n, 4 + n, 1.0 + n, -0.25 - n, -0.5) for n in range(4)]
    panel = next(
        panel
        for panel in panels(records, judge(study_config(), records, {}))
        if isinstance(panel, Panel) and panel.key == "curves"
    )
    figure = _layers(panel)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width


def test_one_power_in_the_place_of_both_rules_has_one_law() -> None:
    of_lora = [trial(n, rank, 1.0 + n / 10, -0.25, 0.0) for n, rank in enumerate(RANKS)]
    of_both = [replace(r, number=50 + r.number, method="rslora") for r in of_lora]
    (found,) = rate_findings([*of_lora, *of_both])
    assert (found.kind, len(found.trials)) == ("LoRA alpha r^-0.25", 6)


def test_many_powers_look_different_and_the_map_says_which_share_a_symbol() -> None:
    powers = (-0.1, -0.25, -0.3, -0.4, -0.6, -0.8, -2.0)
    records = [
        replace(trial(10 * n + k, rank, 1.0 + n, power, 0.0), learning_rate=1 / rank)
        for n, power in enumerate((None, *powers))
        for k, rank in enumerate(RANKS)
    ]
    records += [replace(r, number=200 + r.number, method="rslora") for r in records[:3]]
    found = [(record.method, kind_of(record)) for record in records]
    looks = kind_looks(found)
    assert len(set(looks.values())) == len(looks) == 9
    verdict = judge(study_config(), records, {})
    drawn = next(panel for panel in panels(records, verdict) if panel.key == "rate_map")
    assert isinstance(drawn, Panel)
    assert drawn.caption.lower().count("diamonds are") == 1 and " or LoRA alpha" in drawn.caption


def test_a_method_keeps_its_look_whatever_else_is_there() -> None:
    alone = kind_looks([("lora", "LoRA"), ("rslora", "rsLoRA")])
    among = kind_looks(
        [("lora", "LoRA"), *(("lora", name) for name in NAMES), ("rslora", "rsLoRA")]
    )
    assert {name: among[name] for name in alone} == alone
    # Each of colour and dash tells apart the powers of a study beside both methods.
    assert len({colour for colour, _, _ in among.values()}) == len(among)
    assert len({dash for _, _, dash in among.values()}) == len(among)
