"""The command line. Heavy libraries are imported inside the commands, so help is instant.

Exit codes: 0 done, 1 a bug, 2 the input is wrong, 3 no configuration fits the budget, 4 stopped
early but resumable, 5 every trial failed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rsauto.cli_answers import COMMANDS, Json
from rsauto.cli_errors import errors_shown
from rsauto.errors import InputError
from rsauto.garbage import collection_paused
from rsauto.launch import STORAGE_VARIABLE
from rsauto.launched import is_follower
from rsauto.study_command import quieten_libraries, run_study, run_worker

if TYPE_CHECKING:
    from rsauto.config import StudyConfig
    from rsauto.memory.kinds import StepKind, StepSize
    from rsauto.plan_command import Request as PlanRequest

app = typer.Typer(
    help="Find the LoRA rank, alpha and learning rate to fine-tune with under a memory budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Config = Annotated[
    Path | None,
    typer.Argument(help="Study file (YAML). Without one: the embedded model and task."),
]


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"rsauto {installed('rsauto')}")
        raise typer.Exit


@app.command()
def study(
    config: Config = None,
    trials: Annotated[int | None, typer.Option(help="Settled trials the study ends with.")] = None,
    out: Annotated[Path | None, typer.Option(help="Study folder [runs/<study name>].")] = None,
    memory_budget: Annotated[str | None, typer.Option(help="Such as 24GiB.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of initialisation and data order.")] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Optuna storage URL [a journal in the study folder].", envvar=STORAGE_VARIABLE
        ),
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes: one a GPU, or as many on a CPU.")] = 1,
    launcher: Annotated[
        str, typer.Option(help="Who starts the workers: local, or ray for a Ray cluster.")
    ] = "local",
    preset: Annotated[str | None, typer.Option(help="Of the study file; several as a,b.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, repeatable.")
    ] = None,
    no_report: Annotated[
        bool, typer.Option("--no-report", help="Leave report and table to `rsauto report`.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Search rank, alpha and learning rate. The same command continues an interrupted study."""
    with errors_shown():
        if is_follower():
            quieten_libraries()
            from rsauto.search.follow import follow

            return follow()
        from rsauto import study_file

        options = {"search.trials": trials, "memory_budget": memory_budget, "training.seed": seed}
        loaded = study_file.load(config, preset=preset, sets=set_ or (), options=options)
        folder = out or Path("runs") / loaded.name
        run_study(
            loaded,
            folder,
            storage,
            as_json,
            workers=workers,
            launcher=launcher,
            report=not no_report,
        )


@app.command()
def worker(
    target: Annotated[
        str,
        typer.Argument(
            help="A study folder on this host, or the URL given as --storage.",
            envvar=STORAGE_VARIABLE,
        ),
    ],
    study: Annotated[
        str | None, typer.Option(help="Name of the study in the storage, with a URL.")
    ] = None,
    wait: Annotated[
        float, typer.Option(help="Seconds to wait for a study that is not begun yet.")
    ] = 0.0,
) -> None:
    """Join a study as one more process, on this or another machine, until it is done."""
    with errors_shown():
        run_worker(target, study, wait)


@app.command()
def plan(
    config: Annotated[
        Path | None,
        typer.Argument(help="Study file (YAML). Without one and without --model: the embedded."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Such as llama-2-7b; a config.json, folder, hub id, or embedded."),
    ] = None,
    memory_budget: Annotated[
        str | None, typer.Option(help="Such as 24GiB, rtx4090, a100-80, or auto.")
    ] = None,
    ranks: Annotated[str | None, typer.Option(help="Such as 8,64,256 or 4..256.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences a step [1].")] = None,
    micro_batch_size: Annotated[
        str | None, typer.Option(help="Sequences at a time, or auto [the batch size].")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of the longest row [512].")] = None,
    quant_bits: Annotated[int | None, typer.Option(help="8 or 4, of the base.")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option(help="Recompute activations in backward.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="rslora, lora, rsadalora, adalora, dora or peft_adalora [rslora]."),
    ] = None,
    init_ratio: Annotated[
        float | None,
        typer.Option(help="Of AdaLoRA: initial rank over the rank, which is the target [1.5]."),
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="Of AdaLoRA: importance, full or lambda [lambda].")
    ] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="all-linear, attention, or names [all-linear].")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="adamw, adamw_8bit, adafactor, sgd and others [adamw].")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the base: bfloat16, float16, float32 [as saved].")
    ] = None,
    adapter_dtype: Annotated[str | None, typer.Option(help="Of the adapter [float32].")] = None,
    autocast: Annotated[
        str | None, typer.Option(help="Mixed precision, bfloat16 or float16 [none].")
    ] = None,
    attn_implementation: Annotated[
        str | None, typer.Option(help="sdpa, eager, flash_attention_2 or auto [auto].")
    ] = None,
    task: Annotated[str | None, typer.Option(help="CAUSAL_LM or SEQ_CLS [CAUSAL_LM].")] = None,
    num_labels: Annotated[int | None, typer.Option(help="Classes, with SEQ_CLS [2].")] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu [cuda; cpu for the embedded study].")
    ] = None,
    fit: Annotated[
        int | None, typer.Option(help="A rank: what is the cheapest change that makes it fit?")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Of a study, for its cost.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of each trial, for the cost.")] = None,
    flops_per_second: Annotated[
        str | None, typer.Option(help="Such as 150T: how long a study takes.")
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(help="Such as 2.5: what a study costs.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Of the study file; several as a,b.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what every rank needs before anything is loaded. Options override the study file."""
    with errors_shown():
        from rsauto.plan_command import Request

        options = {
            "model": model,
            "memory_budget": memory_budget,
            "ranks": ranks,
            "batch_size": batch_size,
            "micro_batch_size": micro_batch_size,
            "max_length": max_length,
            "quant_bits": quant_bits,
            "gradient_checkpointing": gradient_checkpointing,
            "method": method,
            "init_ratio": init_ratio,
            "score": score,
            "target_modules": target_modules,
            "optimizer": optimizer,
            "dtype": dtype,
            "adapter_dtype": adapter_dtype,
            "autocast": autocast,
            "attn_implementation": attn_implementation,
            "task": task,
            "num_labels": num_labels,
            "device": device,
        }
        request = Request.of_options(
            options,
            _study_to_plan(config, model, preset, set_ or ()),
            fit=fit,
            trials=trials,
            steps=steps,
            flops_per_second=flops_per_second,
            price_per_hour=price_per_hour,
        )
        _plan(request, as_json)


@app.command()
def init(
    model: Annotated[str, typer.Option(help="Hub id, folder, or embedded.")] = "embedded",
    data: Annotated[str, typer.Option(help="Hub id, file, folder, or embedded.")] = "embedded",
    out: Annotated[Path, typer.Option(help="Study file to write.")] = Path("study.yaml"),
    subset: Annotated[str | None, typer.Option(help="Configuration of a hub dataset.")] = None,
    label: Annotated[
        str | None, typer.Option(help="Column of the class, to train a classifier.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Jinja file, for chats and a model without a template.")
    ] = None,
    memory_budget: Annotated[str, typer.Option(help="Such as 24GiB.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace the study file.")] = False,
) -> None:
    """Look at a model and a dataset, and write a study file with a reason for every line."""
    with errors_shown():
        typer.echo("loading libraries ...", err=True)
        quieten_libraries()
        from rsauto.suggest import Wishes, write_study

        wishes = Wishes(
            model=model,
            data=data,
            subset=subset,
            label=label,
            chat_template=chat_template,
            memory_budget=memory_budget,
        )
        for line in write_study(wishes, out, force=force):
            typer.echo(line)


for _command in COMMANDS:
    app.command()(_command)


def run() -> None:
    """Entry point of the `rsauto` command."""
    app()


def _study_to_plan(
    path: Path | None, model: str | None, preset: str | None, sets: Sequence[str]
) -> StudyConfig | None:
    """The study whose ranks are planned; None for a model without one."""
    if path is not None or model is None:
        from rsauto import study_file

        return study_file.load(path, preset=preset, sets=sets)
    if preset is not None or sets:
        raise InputError(
            "--preset and --set change a study file, and with --model alone there is none. Name "
            "the study file first, or give options instead."
        )
    return None


def _plan(request: PlanRequest, as_json: bool) -> None:
    from rich.console import Console

    from rsauto.plan_command import answers, require_fit
    from rsauto.plan_view import print_plan, print_sentences, tracing_line

    def announce(kind: StepKind, size: StepSize) -> None:
        typer.echo(tracing_line(str(request.settings["model"]), kind, size), err=True)
        with collection_paused():
            quieten_libraries()

    found = request.plan(announce)
    console = Console(stderr=as_json, soft_wrap=False)
    print_plan(found, console, request.notes)
    answered = answers(found, request.questions)
    print_sentences(["", *answered.sentences] if answered.sentences else [], console)
    if as_json:
        typer.echo(json.dumps({**found.to_json(), **answered.result}, allow_nan=False))
    require_fit(found)
