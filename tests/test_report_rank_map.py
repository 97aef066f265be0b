"""Where AdaLoRA's rank went, and what is said of adapters whose modules differ in rank."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.console import Console
from test_report_records import (
    BUDGET,
    PATTERN,
    allocated,
    record,
    refit,
    study_config,
    with_loss,
    write_study,
)

from rsauto.console import WIDE, ranks_as_table, trial_line
from rsauto.plan_view import METHODS
from rsauto.records import AllocationSpec, Role, TrialRecord
from rsauto.report.cells import rank_grid, tiles, trial_grid
from rsauto.report.drawing import drawing
from rsauto.report.figures import panels
from rsauto.report.interactive import interactive
from rsauto.report.notes import ROLE_NAMES
from rsauto.report.page import write_report
from rsauto.report.panel import BLUE, NONE, SCALE, HeatMap, Panel
from rsauto.report.rank_map import OUTSIDE, Place, place, rank_map, short_names
from rsauto.report.ranks import rank_table
from rsauto.report.table import load_study, table
from rsauto.report.verdict import Verdict, judge
from rsauto.units import METHOD_NAMES

SVG = "{http://www.w3.org/2000/svg}"


def verdict_on(trials: list[TrialRecord], **search: Any) -> Verdict:
    return judge(study_config(**search), trials, {})


def drawn(trials: list[TrialRecord]) -> HeatMap:
    panel = rank_map(trials, verdict_on(trials))
    assert panel is not None
    return panel


def of(pattern: dict[str, int]) -> HeatMap:
    return drawn([with_loss(allocated(0, pattern), 1.0)])


def texts(svg: bytes) -> list[str]:
    return ["".join(e.itertext()).strip() for e in ET.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize(
    ("module", "stack", "layer", "path"),
    [
        ("model.layers.11.self_attn.q_proj", "model.layers", 11, "self_attn.q_proj"),
        ("transformer.h.0.attn.c_attn", "transformer.h", 0, "attn.c_attn"),
        ("model.layers.3.mlp.experts.7.up_proj", "model.layers", 3, "mlp.experts.7.up_proj"),
        ("lm_head", "", None, "lm_head"),
    ],
)
def test_a_module_stands_in_the_layer_its_name_says(
    module: str, stack: str, layer: int | None, path: str
) -> None:
    expected = Place(tuple(filter(None, stack.split("."))), layer, tuple(path.split(".")))
    assert place(module) == expected


def test_short_names_tell_modules_apart() -> None:
    bert = ["attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"]
    assert list(short_names(tuple(name.split(".")) for name in bert).values()) == [
        "query", "attention.output.dense", "intermediate.dense", "output.dense"
    ]  # fmt: skip


def test_every_rank_stands_in_its_cell() -> None:
    found = of(
        {
            "model.layers.10.mlp.up_proj": 7,
            "model.layers.2.self_attn.q_proj": 0,
            "model.layers.2.mlp.up_proj": 3,
            "lm_head": 4,
        }
    )
    assert found.columns == ("up_proj", "q_proj", "lm_head")
    assert found.rows == ("2", "10", OUTSIDE), "by number, not by letter"
    assert found.values == ((3, 0, None), (7, None, None), (None, None, 4))
    assert found.hover[1] == ("model.layers.10.mlp.up_proj\nrank 7", "", "")
    assert found.largest == 7


def test_layers_of_two_stacks_keep_rows_of_their_own() -> None:
    found = of({"vision.layers.0.fc1": 1, "text.layers.0.fc1": 3, "text.layers.1.fc1": 2})
    assert found.rows == ("vision.layers 0", "text.layers 0", "text.layers 1")
    assert found.values == ((1,), (3,), (2,))


def test_title_and_caption_say_trial_target_room_and_what_kept_none() -> None:
    found = of(PATTERN)
    assert found.title == "Where the rank went: AdaLoRA rank 2 (from 6), trial 0"
    assert found.caption == (
        "Trial 0, eval loss 1.000. Rank of each module at the end: 8 over 4 modules, for a target "
        "of 2 on average. The largest is 5: a server must allow at least rank 5. "
        "1 module kept none, in orange."
    )
    assert found.alt.endswith("on average over the layers: up_proj 3, q_proj 1.")
    assert "kept none" not in of({"layers.0.fc1": 2}).caption


def test_the_trial_shown_is_the_one_the_verdict_is_about() -> None:
    """Three AdaLoRA trials: the recommended one before the best single one, and the one whose ranks
    a recommended refit has before both."""
    other = {**PATTERN, "model.layers.1.mlp.up_proj": 4}
    lucky = with_loss(allocated(0, other), 1.00)
    cheap = with_loss(allocated(1, rank=1, predicted_peak_bytes=1), 1.005)
    source = with_loss(allocated(2, lambda_lr_ratio=4.0), 1.3)
    below = with_loss(refit(3), 0.5)
    assert drawn([lucky, source]).title.endswith("trial 0")
    assert drawn([lucky, cheap, source]).title.endswith("trial 1")
    shown = drawn([lucky, source, below])
    assert shown.title.endswith("trial 2")
    assert "The recommended refit was trained with these ranks." in shown.caption
    assert "refit" not in drawn([lucky, source]).caption


def test_only_adalora_that_finished_is_shown() -> None:
    trials = [
        with_loss(record(0, 8, 1e-3), 1.0),
        with_loss(refit(1), 1.0),
        with_loss(allocated(2, outcome="pruned", fidelity=0.5, steps=50), 0.5),
        allocated(3, outcome="infeasible", rank_pattern=None, fidelity=None),
    ]
    assert rank_map(trials, verdict_on(trials)) is None
    assert "rank_map" not in {panel.key for panel in panels(trials, verdict_on(trials))}
    best = with_loss(allocated(4, method="rsadalora", scaling_rule="rslora"), 3.0)
    assert drawn([*trials, best]).title.startswith("Where the rank went: rsAdaLoRA rank 2")


def test_page_and_svg_draw_the_same_numbers() -> None:
    found = of({**PATTERN, "lm_head": 3})
    heat, numbers = interactive(found).data
    assert [list(row) for row in heat.z] == [[0, 1, None], [2, 5, None], [None, None, 3]]
    assert list(zip(numbers.x, numbers.y, numbers.text, strict=True)) == [
        (0, 0, "0"), (1, 0, "1"), (0, 1, "2"), (1, 1, "5"), (2, 2, "3")
    ]  # fmt: skip
    words = texts(drawing(found))
    assert " 0 1 2 5 3 " in f" {' '.join(words)} ", "the cells, row by row"
    assert {"q_proj", "up_proj", "lm_head", OUTSIDE, found.title} <= set(words)
    labels = [e for e in ET.fromstring(drawing(found)).iter(f"{SVG}text") if e.text == OUTSIDE]
    below = [e for e in ET.fromstring(drawing(found)).iter(f"{SVG}text") if e.text == "q_proj"]
    assert float(labels[0].attrib["y"]) > 0.6 * float(below[0].attrib["y"]), "the last row is last"
    assert interactive(found).layout.yaxis.range == (2.5, -0.5)
    assert ET.fromstring(drawing(found)).findtext(f"{SVG}title") == found.alt


def test_zero_has_a_colour_of_its_own() -> None:
    heat = interactive(of(PATTERN)).data[0]
    colours = [(at * 5, colour.upper()) for at, colour in heat.colorscale]
    assert [c for at, c in colours if at <= 0.5][:2] == [NONE, NONE]
    assert (heat.zmin, heat.zmax) == (0, 5) and colours[-1] == (5.0, SCALE[-1])
    assert NONE.lower() in drawing(of(PATTERN)).decode()
    assert NONE.lower() not in drawing(of({"layers.0.fc1": 1, "layers.1.fc1": 2})).decode()


def test_numbers_can_be_read_on_every_cell() -> None:
    """A contrast of 4.5 to 1, as WCAG asks of text, on the whole scale."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    def shade(share: float) -> str:
        at = min(int(share * 3), 2)
        pairs = [
            (int(SCALE[at][i : i + 2], 16), int(SCALE[at + 1][i : i + 2], 16)) for i in (1, 3, 5)
        ]
        return "#" + "".join(f"{round(a + (b - a) * (share * 3 - at)):02X}" for a, b in pairs)

    found = of({"layers.0.fc1": 200})
    assert contrast(found.ink(0), NONE) >= 4.5
    for value in range(1, 201):
        assert contrast(found.ink(value), shade((value - 0.5) / 199.5)) >= 4.5, value
    shades = [luminance(shade(i / 50)) for i in range(51)]
    assert shades == sorted(shades, reverse=True) and BLUE in SCALE, "darker is always more"


def test_a_thousand_modules_are_drawn_without_numbers() -> None:
    names = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}" for n in ("gate", "up", "down")]
    pattern = {
        f"model.layers.{i}.{name}": (i + j) % 9 for i in range(143) for j, name in enumerate(names)
    }
    found = of(pattern)
    assert len(pattern) == 1001 and not found.has_room
    assert len(interactive(found).data) == 1 and interactive(found).layout.height < 1000
    words = texts(drawing(found))
    layers = [word for word in words if word.isdecimal()]
    assert len(layers) < 60 and "0" in layers and "down" in words
    assert len(drawing(found)) < 500_000


def test_names_in_ranks_are_no_markup(tmp_path: Path) -> None:
    pattern = {"layers.0.<b>$x$": 1, "layers.0.[y](z)": 0}
    write_report(write_study(tmp_path, [with_loss(allocated(0, pattern), 1.0)]))
    assert "<b>" not in (tmp_path / "report.html").read_text(encoding="utf-8").split("<script>")[0]
    assert r"\[y\](z)" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<b>$x$" in texts((tmp_path / "figures" / "rank_map.svg").read_bytes())


def test_a_recommended_refit_is_called_one_and_says_what_a_server_must_allow() -> None:
    trials = [
        with_loss(record(0, 2, 4e-3), 1.2),
        with_loss(allocated(1), 1.1),
        with_loss(refit(2), 1.0),
    ]
    verdict = verdict_on(trials)
    assert verdict.sentences[0].startswith(
        "Take rank 2 on average (alpha 16, learning rate 4e-3, rsLoRA with the ranks that AdaLoRA "
        "found): its eval loss 1.000 is the best found"
    )
    room = "Its modules differ in rank, the largest is 5: whatever serves the adapter must allow"
    assert any(sentence.startswith(room) for sentence in verdict.sentences)
    assert tiles(verdict)[0] == (
        "rank to take",
        "2",
        "rsLoRA refit, alpha 16, learning rate 4e-3, largest rank of a module 5",
    )


def test_a_recommended_adalora_trial_says_how_it_is_trained_and_served() -> None:
    trials = [with_loss(record(0, 2, 4e-3), 1.2), with_loss(allocated(1), 1.1)]
    verdict = verdict_on(trials)
    assert verdict.sentences[0].startswith(
        "Take rank 2 on average (alpha 16, learning rate 1e-2, lambda_lr_ratio 16, "
        "AdaLoRA from rank 6)"
    )
    assert "the largest is 5" in verdict.sentence
    uniform = verdict_on([with_loss(record(0, 2, 4e-3, r_max=2), 1.2)])
    assert uniform.sentences[0].startswith("Take rank 2 (alpha 16")
    assert "must allow" not in uniform.sentence


def test_a_refit_has_a_row_a_line_and_a_curve_of_its_own() -> None:
    trials = [
        with_loss(record(0, 2, 4e-3, r_max=2), 1.2),
        with_loss(allocated(1), 1.1),
        with_loss(refit(2), 1.0),
        with_loss(refit(3, role="seed", seed=1), 1.0),
    ]
    verdict = verdict_on(trials)
    ranks = rank_table(trials, verdict)
    rows = list(zip(ranks["method"], ranks["refit"], ranks["r_max"], ranks["marks"], strict=True))
    assert rows == [
        ("adalora", False, 5, ""),
        ("rslora", False, 2, ""),
        ("rslora", True, 5, "recommended, best"),
    ]
    grid = rank_grid(ranks, verdict)
    assert [row[1:3] for row in grid.rows] == [
        ("AdaLoRA", "5"), ("rsLoRA", "2"), ("rsLoRA refit", "5")
    ]  # fmt: skip
    layers = {
        panel.key: {layer.name: layer for layer in panel.layers}
        for panel in panels(trials, verdict)
        if isinstance(panel, Panel)
    }
    assert {"rsLoRA", "rsLoRA refit, AdaLoRA's ranks", "AdaLoRA"} <= set(layers["memory"])
    assert len(layers["memory"]["rsLoRA"].x) == 1
    for key in ("learning_rate", "curves"):
        assert {"rsLoRA 2", "rsLoRA refit 2", "AdaLoRA 2"} == set(layers[key])
    hover = layers["rank"]["AdaLoRA"].hover[0]
    assert "AdaLoRA rank 2 (from 6), alpha 16" in hover and "largest rank of a module 5" in hover


def test_the_largest_rank_is_a_column_only_where_it_says_something() -> None:
    trials = [with_loss(record(0, 2, 4e-3, r_max=2), 1.2)]
    verdict = verdict_on(trials)
    assert "largest rank" not in rank_grid(rank_table(trials, verdict), verdict).headers


def test_the_list_of_trials_leaves_patterns_to_the_figure() -> None:
    same = [record(0, 2, 4e-3), allocated(1), refit(2)]
    headers = trial_grid(table(same), "eval_loss").headers
    assert {"init rank", "lambda lr ratio", "r max", "refit"} <= set(headers)
    assert not any(h.startswith(("rank pattern", "target", "allocation")) for h in headers)
    differ = [record(0, 2, 4e-3)] + [
        allocated(n, allocation=AllocationSpec(tinit=10, tfinal=30, recovery=recovery))
        for n, recovery in ((1, "paper"), (2, "none"))
    ]
    grid = trial_grid(table(differ), "eval_loss")
    at = grid.headers.index("allocation recovery")
    assert [row[at] for row in grid.rows] == ["-", "paper", "none"]


def test_a_rank_that_only_adalora_was_tried_at_is_not_called_too_large_for_all() -> None:
    nothing: dict[str, Any] = {"outcome": "infeasible", "fidelity": None, "rank_pattern": None}
    trials = [
        with_loss(record(0, 2, 4e-3), 1.2),
        allocated(1, rank=64, predicted_peak_bytes=BUDGET + 1, **nothing),
    ]
    assert "Rank 64 of AdaLoRA does not fit" in verdict_on(trials).sentence
    trials[1] = record(1, 64, 4e-3, predicted_peak_bytes=BUDGET + 1, outcome="infeasible")
    assert "Rank 64 does not fit" in verdict_on(trials).sentence


def test_lines_of_the_terminal_name_every_role_and_stay_aligned() -> None:
    assert set(ROLE_NAMES) == set(get_args(Role))
    assert set(METHODS) >= set(METHOD_NAMES)
    trials = [
        record(0, 8, 5e-5, method="lora", role="default"),
        allocated(1, method="rsadalora", scaling_rule="rslora"),
        refit(2),
        refit(3, role="seed"),
    ]
    lines = [trial_line(trial, study_config()) for trial in trials]
    assert {line.index("r=") for line in lines} == {29}
    assert lines[1].split()[1:3] == ["search", "rsAdaLoRA"]
    assert lines[2].split()[1:3] == ["refit", "rsLoRA"]
    assert lines[3].split()[1:4] == ["refit,", "seed", "rsLoRA"]


def test_the_widest_table_of_the_terminal_cuts_no_word(tmp_path: Path) -> None:
    trials = [
        with_loss(record(0, 2, 4e-3, r_max=2), 1.2, solo=True),
        with_loss(allocated(1, method="rsadalora"), 1.1, solo=True),
        with_loss(refit(2), 1.0, solo=True),
    ]
    study = load_study(write_study(tmp_path, trials))
    console = Console(width=WIDE, file=io.StringIO(), record=True)
    console.print(ranks_as_table(study, verdict_on(trials), WIDE))
    shown = console.export_text()
    assert "…" not in shown and "largest" in shown
    assert {"rsAdaLoRA", "refit", "recommended,"} <= set(shown.split())


def test_the_page_describes_the_figure_in_words(tmp_path: Path) -> None:
    write_report(write_study(tmp_path, [with_loss(allocated(0), 1.0)]))
    alt = of(PATTERN).alt
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f'id="plot-rank_map" role="img" aria-label="{alt}"' in page
    figures = page.split('id="figures">')[1].split("</script>")[0]
    assert json.loads(figures)["rank_map"]["data"][0]["z"] == [[0, 1], [2, 5]]
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"![{alt}](figures/rank_map.svg)" in markdown
