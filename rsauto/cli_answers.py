"""Commands for a study that is there: what it found, and what is made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rsauto.cli_errors import errors_shown
from rsauto.errors import InputError

Folder = Annotated[Path, typer.Argument(help="A study folder, such as runs/embedded.")]
Trial = Annotated[int | None, typer.Option(help="A trial by its number.")]
Rank = Annotated[int | None, typer.Option(help="The best trial of this rank.")]
Best = Annotated[bool, typer.Option("--best", help="The trial with the best result.")]
Recommended = Annotated[
    bool, typer.Option("--recommended", help="What the report recommends [this].")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line.")]


def status(folder: Folder, as_json: Json = False) -> None:
    """Where a study stands, also while another terminal runs it."""
    with errors_shown():
        from rsauto.report.table import load_study
        from rsauto.status import status_lines, status_values

        found = load_study(folder)
        if as_json:
            typer.echo(json.dumps(status_values(found)))
        else:
            typer.echo("\n".join(status_lines(found)))


def report(folder: Folder) -> None:
    """Write table, figures and page anew, from the records alone."""
    with errors_shown():
        from rsauto.report.page import write_report

        try:
            verdict = write_report(folder)
        except OSError as error:
            raise InputError(f"{folder}: the report cannot be written: {error}.") from None
        typer.echo("\n".join(verdict.sentences))
        typer.echo(f"report       {folder / 'report.html'}")


def compare(
    folders: Annotated[list[Path], typer.Argument(help="Two study folders or more.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for compare.md, compare.csv and compare.svg.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Put studies side by side: other models, methods or budgets, from their records alone."""
    with errors_shown():
        from rich.console import Console

        from rsauto.compare_view import print_comparison
        from rsauto.report.compare import comparison, write_comparison

        found = comparison(folders)
        print_comparison(found, Console(stderr=as_json))
        for path in write_comparison(found, out) if out is not None else ():
            typer.echo(f"written      {path}", err=as_json)
        if as_json:
            typer.echo(json.dumps(found.values, allow_nan=False))


def train(
    folder: Folder,
    trial: Trial = None,
    rank: Rank = None,
    best: Best = False,
    recommended: Recommended = False,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps [as in the study].")] = None,
    epochs: Annotated[float | None, typer.Option(help="The length in epochs instead.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed [the trial's].")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to train in [DIR/trained/<choice>].")
    ] = None,
    evals: Annotated[int | None, typer.Option(help="Evaluations [as in the study].")] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints [a tenth of the run].")
    ] = None,
    memory_budget: Annotated[str | None, typer.Option(help="Such as 24GiB [the study's].")] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option(help="Sequences at a time [the largest that fits].")
    ] = None,
    track: Annotated[
        list[str] | None, typer.Option(help="tensorboard, wandb or trackio; repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train what a study found, at full length. The same command continues an interrupted run."""
    with errors_shown():
        from rsauto.finetuning.request import Request
        from rsauto.report.choice import Choice
        from rsauto.train_command import run_training

        request = Request(
            study=folder,
            choice=Choice(trial=trial, rank=rank, best=best, recommended=recommended),
            out=out,
            steps=steps,
            epochs=epochs,
            seed=seed,
            num_evals=evals,
            save_every=save_every,
            memory_budget=memory_budget,
            micro_batch_size=micro_batch_size,
            track=tuple(track or ()),
        )
        run_training(request, as_json)


def export(
    folder: Folder,
    to: Annotated[
        str,
        typer.Option(
            help="lora, adalora, merged, axolotl, llamafactory, trl, peft (a script), or card."
        ),
    ],
    trial: Trial = None,
    rank: Rank = None,
    best: Best = False,
    recommended: Recommended = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write [DIR/exports/<choice>-<target>].")
    ] = None,
    padded: Annotated[
        bool, typer.Option("--padded", help="Of lora: every module at the largest rank.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Of weights: float32, bfloat16, float16 [as saved].")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    as_json: Json = False,
) -> None:
    """Write a trial for others to run: an adapter, a merged model, settings, or a model card."""
    with errors_shown():
        from rsauto.export_command import run_export
        from rsauto.report.choice import Choice

        choice = Choice(trial=trial, rank=rank, best=best, recommended=recommended)
        run_export(folder, to, choice, as_json, out=out, padded=padded, dtype=dtype, force=force)


COMMANDS = (status, report, compare, train, export)
