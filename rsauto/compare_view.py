"""What `rsauto compare` shows: a column for each study."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rsauto.report.compare import Comparison


def print_comparison(found: Comparison, console: Console) -> None:
    """The studies side by side, and what must be known to read them."""
    grid = found.grid
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for header, is_number in zip(grid.headers, grid.is_number, strict=True):
        table.add_column(Text(header), justify="right" if is_number else "left", overflow="fold")
    for row in grid.rows:
        table.add_row(*map(Text, row))
    console.print(table)
    for note in found.notes:
        console.print(note, style="dim", markup=False, highlight=False)
