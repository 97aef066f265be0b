"""From an error to one clear message and the exit code of a command."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from rsauto.errors import RsautoError

_HEAVY = frozenset({"torch", "optuna", "transformers", "peft", "datasets", "accelerate"})
"""Packages that a machine which only reads reports may lack."""


@contextmanager
def errors_shown() -> Iterator[None]:
    """Turns an error meant for the user into one clear message and its exit code."""
    try:
        yield
    except RsautoError as error:
        typer.echo(f"rsauto: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    except ModuleNotFoundError as error:
        if error.name not in _HEAVY:
            raise
        typer.echo(
            f"rsauto: this command needs {error.name}, which is not installed here; report, status "
            "and compare run without. Install the whole of it: pip install rsauto",
            err=True,
        )
        raise typer.Exit(2) from None
    except BrokenPipeError:
        # Whoever read the output has gone; Python would complain once more when it closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        typer.echo("rsauto: the output was closed; the same command continues.", err=True)
        raise typer.Exit(4) from None
    except KeyboardInterrupt:
        typer.echo("rsauto: stopped at once; the same command continues.", err=True)
        raise typer.Exit(4) from None
