"""The report of a study folder: page, Markdown, table and figures, written from records alone."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from rsauto import atomic, study_file
from rsauto.report.cells import rank_grid, tiles, trial_grid
from rsauto.report.drawing import drawing
from rsauto.report.figures import panels
from rsauto.report.interactive import interactive
from rsauto.report.markdown import markdown
from rsauto.report.notes import endings, notes, token_grid
from rsauto.report.panel import HeatMap, Panel
from rsauto.report.ranks import rank_table
from rsauto.report.steps import headline, steps
from rsauto.report.table import Study, load_study
from rsauto.report.verdict import Verdict, judge
from rsauto.report.wording import noise_remark
from rsauto.units import objective_text

FIGURES = (
    "memory", "compute", "time", "rank", "curves", "grad_norms", "rate_law", "learning_rate",
    "rate_map", "importance", "rank_map", "predictions",
)  # fmt: skip
"""Keys of the panels, names of the files in figures/."""

_CHOSEN_FROM = ("outcome", "role", "method")


def write_report(folder: Path) -> Verdict:
    """Write report.html, report.md, tradeoff.csv, tradeoff.parquet and figures/ into ``folder``.

    Everything is made before anything is written, and each file is replaced in one step. The same
    records give the same bytes. Raises InputError if the folder cannot be read, and OSError if
    it cannot be written.
    """
    study = load_study(Path(folder))
    verdict = judge(study.config, study.records, study.environment)
    files = report_files(study, verdict)
    for name, data in files.items():
        (study.folder / name).parent.mkdir(exist_ok=True)
        atomic.write_bytes(study.folder / name, data)
    for key in FIGURES:
        if f"figures/{key}.svg" not in files:
            (study.folder / f"figures/{key}.svg").unlink(missing_ok=True)
    return verdict


def report_files(study: Study, verdict: Verdict) -> dict[str, bytes]:
    """The files of a report by their names in the study folder."""
    shown = panels(study.records, verdict)
    ranks = rank_table(study.records, verdict)
    return {
        "tradeoff.csv": csv_bytes(study.trials),
        "tradeoff.parquet": parquet_bytes(study.trials),
        **{f"figures/{panel.key}.svg": drawing(panel) for panel in shown},
        "report.md": markdown(study, verdict, ranks, shown).encode("utf-8"),
        "report.html": page(study, verdict, ranks, shown).encode("utf-8"),
    }


def csv_bytes(trials: pd.DataFrame) -> bytes:
    """The table as CSV. Text that a spreadsheet would run as a formula gets an apostrophe."""
    safe = trials.copy()
    for name in safe.columns:
        if pd.api.types.is_string_dtype(safe[name]):
            safe[name] = safe[name].map(_inert, na_action="ignore").astype("string")
    safe.columns = pd.Index([_inert(str(name)) for name in safe.columns])
    return safe.to_csv(index=False, lineterminator="\n").encode("utf-8")


def parquet_bytes(trials: pd.DataFrame) -> bytes:
    """The table as Parquet, column types kept."""
    buffer = io.BytesIO()
    trials.to_parquet(buffer, index=False)
    return buffer.getvalue()


def page(
    study: Study, verdict: Verdict, ranks: pd.DataFrame, shown: Sequence[Panel | HeatMap]
) -> str:
    """report.html: one file that opens offline, everything that it shows escaped."""
    figures, texts = _figures(shown)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["unbroken"] = _unbroken
    return environment.from_string(_source("page.html.j2")).render(
        study=study,
        verdict=verdict,
        headline=headline(ranks, verdict),
        tiles=tiles(verdict),
        steps=steps(ranks, verdict),
        objective=objective_text(verdict.objective),
        endings=endings(study.records),
        errors=[(r.number, r.outcome, r.error) for r in study.records if r.error],
        ranks=rank_grid(ranks, verdict),
        notes=notes(study.records, verdict),
        noise=noise_remark(verdict),
        tokens=token_grid(study.records),
        trials=trial_grid(study.trials, verdict.objective),
        choices=_choices(study.trials),
        figures=_groups(shown),
        figure_json=_script_json(figures),
        text_json=_script_json(texts),
        plotly=Markup(get_plotlyjs()) if shown else "",
        environment=_flat(study.environment),
        configuration=study_file.dump(study.config),
        **{name.replace(".", "_"): Markup(_source(name)) for name in ("table.js", "figures.js")},
        css=Markup(_source("page.css")),
    )


def _unbroken(text: str) -> Markup:
    """Text in which no learning rate is broken at its hyphen."""
    parts = re.split(r"(\d+(?:\.\d+)?e-\d+)", text)
    rate = Markup('<span class="unbroken">{}</span>')
    return Markup("").join(rate.format(p) if n % 2 else escape(p) for n, p in enumerate(parts))


def _source(name: str) -> str:
    return resources.files("rsauto.report").joinpath(name).read_text(encoding="utf-8")


def _figures(shown: Sequence[Panel | HeatMap]) -> tuple[dict[str, Any], list[str]]:
    """What the page draws, by key, and the texts of points: several figures show the same ones, so
    a trace has only their places in the list."""
    figures = {panel.key: interactive(panel).to_plotly_json() for panel in shown}
    places: dict[str, int] = {}
    for figure in figures.values():
        for trace in figure["data"]:
            if trace.get("text") and trace["mode"] != "text":
                trace["text"] = [places.setdefault(text, len(places)) for text in trace["text"]]
    return figures, list(places)


def _groups(shown: Sequence[Panel | HeatMap]) -> list[list[Panel | HeatMap]]:
    """Figures that share a place, in the order of their first."""
    groups: dict[str, list[Panel | HeatMap]] = {}
    for panel in shown:
        groups.setdefault(panel.group or panel.key, []).append(panel)
    return list(groups.values())


def _choices(trials: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """Columns of few words that tell trials apart, and their words."""
    found = ((name, sorted(trials[name].dropna().unique())) for name in _CHOSEN_FROM)
    return [(name, values) for name, values in found if len(values) > 1]


def _script_json(value: Any) -> Markup:
    """JSON that no text in it can end the script element of, the one place autoescape cannot
    guard."""
    text = json.dumps(value, sort_keys=True, allow_nan=False, default=list)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


_FORMULA = tuple("=+-@\t\r\n\N{FULLWIDTH EQUALS SIGN}\N{FULLWIDTH PLUS SIGN}"
                 "\N{FULLWIDTH HYPHEN-MINUS}\N{FULLWIDTH COMMERCIAL AT}")  # fmt: skip
"""How text begins that a spreadsheet calculates, full-width letters as in Japan among them."""


def _inert(text: str) -> str:
    # pandas puts no quotes around a lone carriage return, which readers take for the end of a row.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return f"'{text}" if text.startswith(_FORMULA) else text


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows: {'device': {'kind': 'cpu'}} as ('device.kind', 'cpu')."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows.append((f"{prefix}{key}", text))
    return rows
