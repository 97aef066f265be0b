"""report.md: the report where only Markdown is shown, such as a repository."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pandas as pd

from rsauto import study_file
from rsauto.report.cells import rank_grid, tiles
from rsauto.report.notes import endings, notes, token_grid
from rsauto.report.panel import HeatMap, Panel
from rsauto.report.steps import headline, steps
from rsauto.report.table import Study
from rsauto.report.verdict import Verdict
from rsauto.report.wording import noise_remark


def markdown(
    study: Study, verdict: Verdict, ranks: pd.DataFrame, shown: Sequence[Panel | HeatMap]
) -> str:
    """The verdict, the rank table, the figures, what did not finish, and the study file."""
    told = [*headline(ranks, verdict)]
    told += [f"{step.title} {step.sentence}." for step in steps(ranks, verdict)]
    grid = rank_grid(ranks, verdict)
    parts = [
        f"# {inline(study.config.name)}",
        "\n".join(f"- {inline(sentence)}" for sentence in told),
        pipe_table(
            ("", "", ""),
            [(what, f"**{inline(value)}**", remark) for what, value, remark in tiles(verdict)],
            (False, True, False),
            is_escaped=True,
        ),
    ]
    if grid.rows:
        parts += ["## What each rank costs and what it buys",
                  pipe_table(grid.headers, grid.rows, grid.is_number)]  # fmt: skip
        parts.append(inline(noise_remark(verdict)))
    parts += [inline(note) for note in notes(study.records, verdict)]
    for panel in shown:
        parts += [f"![{inline(panel.alt)}](figures/{panel.key}.svg)", inline(panel.caption)]
    tokens = token_grid(study.records)
    if tokens.rows:
        parts += ["## Where the tokens went",
                  pipe_table(tokens.headers, tokens.rows, tokens.is_number)]  # fmt: skip
    parts += _unfinished(study)
    parts += ["## Study", fenced(study_file.dump(study.config), "yaml")]
    return "\n\n".join(parts) + "\n"


def _unfinished(study: Study) -> list[str]:
    if not study.records:
        return []
    errors = [
        (str(record.number), record.outcome, record.error)
        for record in study.records
        if record.error
    ]
    parts = [
        "## How the trials ended",
        f"{endings(study.records)}. All of them are in `tradeoff.csv`.",
    ]
    if errors:
        parts.append(pipe_table(("trial", "outcome", "error"), errors, (True, False, False)))
    return parts


def pipe_table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    is_number: Sequence[bool],
    *,
    is_escaped: bool = False,
) -> str:
    """A table of Markdown; with ``is_escaped`` the cells are markup already."""
    write = str if is_escaped else inline
    lines = [[write(header) for header in headers]]
    lines.append(["---:" if right else "---" for right in is_number])
    lines += [[write(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def inline(text: str) -> str:
    """Text on one line that neither Markdown nor HTML nor a table takes for markup."""
    one_line = " ".join(text.split())
    escaped = one_line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # An underscore inside a word is one everywhere; at its edge it may begin emphasis.
    return re.sub(r"([\\`*\[\]|#]|(?<!\w)_|_(?!\w))", r"\\\1", escaped)


def code(text: str) -> str:
    """Text as code on one line, whatever runs of backticks it has."""
    one_line = " ".join(text.split())
    fence = _fence(one_line, 1)
    space = " " if "`" in one_line or not one_line else ""
    return f"{fence}{space}{one_line}{space}{fence}"


def fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    fence = _fence(text, 3)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _fence(text: str, shortest: int) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(shortest, longest + 1)
