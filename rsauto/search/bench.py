"""What one process has of its host: its share of the memory, and the loaded model.

Also what that model scores before anything is trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from rsauto.base import pick_device
from rsauto.config import StudyConfig
from rsauto.errors import BudgetError, InputError
from rsauto.search.follow import load_everywhere
from rsauto.search.ledger import Ledger
from rsauto.search.setup import Setup, device_bytes
from rsauto.training.evaluate import Evaluation
from rsauto.training.out_of_memory import NO_ROOM, told
from rsauto.training.trial import Bench, untouched


def with_memory_of(config: StudyConfig, num_processes: int) -> StudyConfig:
    """The settings for one of several processes of a study on this host.

    On a CPU they share what is free; of GPUs each has its own.
    """
    device = pick_device()
    if num_processes == 1 or device.type == "cuda":
        return config
    share = device_bytes(device) // num_processes
    budgets = ("memory_budget", "pack_memory_budget")
    changed = {name: share for name in budgets if getattr(config, name) == "auto"}
    return config.model_copy(update=changed)


def load_bench(setup: Setup) -> Bench:
    """The model on the device, with the study's data."""
    with _room_to("load the model"):
        loaded = load_everywhere(setup)
    return Bench(
        model=loaded.model,
        base_name=setup.source.name,
        data=setup.data,
        device=setup.device,
        fresh_parameters=loaded.fresh_parameters,
        spread=setup.spread,
    )


def with_baseline(
    bench: Bench, setup: Setup, ledger: Ledger, known: dict[str, Any] | None = None
) -> tuple[Bench, Evaluation]:
    """The bench, and how well the untouched model does: the same for every process of a study.

    Whoever comes first measures it, unless it is ``known`` from an earlier run.
    """
    found = ledger.attributes().get("baseline") or known or asdict(_measured(bench, setup))
    # Another process may have measured it meanwhile, on another machine.
    found = ledger.attributes().get("baseline") or found
    ledger.set_attribute("baseline", found)
    baseline = Evaluation(**found)
    _require_numbers(setup, baseline)
    return replace(bench, untouched_general_loss=baseline.metrics.get("general_loss")), baseline


def _measured(bench: Bench, setup: Setup) -> Evaluation:
    spec = setup.space.middle(setup.space.ranks[0])
    prediction = setup.predict(spec)
    size = prediction.micro_batch_size if prediction else 1
    with _room_to("measure the untouched model"):
        result = untouched(bench, size, setup.config.training.seed)
    general = {"forgetting": 0.0} if bench.data.general else {}
    return replace(result, metrics={**result.metrics, **general})


@contextmanager
def _room_to(do: str) -> Iterator[None]:
    """Raises BudgetError where the device has no room for what every trial needs."""
    try:
        yield
    except NO_ROOM as error:
        full = str(told(error)).rstrip(".")
        raise BudgetError(
            f"memory_budget: out of memory while trying to {do}, so no trial was begun: {full}. "
            "Stop what else uses the device and run the same command again, or begin another "
            "study with a smaller model, a lower data.max_length or model.quant_bits: 4."
        ) from None


def _require_numbers(setup: Setup, baseline: Evaluation) -> None:
    """Raises InputError where the untouched model gives no numbers: no adapter mends that."""
    objective = setup.config.search.objective
    values = {"eval_loss": baseline.eval_loss, **baseline.metrics}
    for name in dict.fromkeys(("eval_loss", "general_loss", objective)):
        value = values.get(name, 0.0)
        if not math.isfinite(value):
            dtype = str(setup.source.dtype).removeprefix("torch.")
            raise InputError(
                f"model.name: {setup.source.name!r} gives {name} {value} as it is, before anything "
                f"is trained. Its weights hold nan or inf, or its activations overflow in {dtype}: "
                "give whole weights, or set model.dtype to bfloat16 or float32; and choose another "
                "--out."
            )
