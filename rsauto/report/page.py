"""The report of a study folder: page, Markdown, table and figures, written from records alone."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from rsauto import atomic, study_file
from rsauto.report.cells import Grid, rank_grid, tiles, trial_grid
from rsauto.report.drawing import drawing
from rsauto.report.figures import panels
from rsauto.report.interactive import interactive
from rsauto.report.markdown import markdown
from rsauto.report.notes import endings, notes, token_grid
from rsauto.report.panel import HeatMap, Panel
from rsauto.report.ranks import rank_table
from rsauto.report.table import Study, load_study
from rsauto.report.verdict import Verdict, judge
from rsauto.report.wording import noise_remark

FIGURES = ("memory", "rank", "learning_rate", "rate_law", "rank_map", "curves", "predictions")
"""Keys of the panels, names of the files in figures/."""


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
    ranks = rank_grid(rank_table(study.records, verdict), verdict)
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


def page(study: Study, verdict: Verdict, ranks: Grid, shown: Sequence[Panel | HeatMap]) -> str:
    """report.html: one file that opens offline, everything that it shows escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("rsauto.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        study=study,
        verdict=verdict,
        tiles=tiles(verdict),
        endings=endings(study.records),
        errors=[(r.number, r.outcome, r.error) for r in study.records if r.error],
        ranks=ranks,
        notes=notes(study.records, verdict),
        noise=noise_remark(verdict),
        tokens=token_grid(study.records),
        trials=trial_grid(study.trials, verdict.objective),
        panels=shown,
        figures=_script_json({panel.key: interactive(panel).to_plotly_json() for panel in shown}),
        plotly=Markup(get_plotlyjs()) if shown else "",
        environment=_flat(study.environment),
        configuration=study_file.dump(study.config),
    )


def _script_json(value: Any) -> Markup:
    """JSON that no text in it can end the script element of, the one place autoescape cannot
    guard."""
    text = json.dumps(value, sort_keys=True, allow_nan=False, default=list)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _inert(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


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
