"""What one process has of its host: its share of the memory, and the loaded model.

Also what that model scores before anything is trained.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from rsauto.base import pick_device
from rsauto.config import StudyConfig
from rsauto.search.follow import load_everywhere
from rsauto.search.ledger import Ledger
from rsauto.search.setup import Setup, device_bytes
from rsauto.training.evaluate import Evaluation
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
    return replace(bench, untouched_general_loss=baseline.metrics.get("general_loss")), baseline


def _measured(bench: Bench, setup: Setup) -> Evaluation:
    spec = setup.space.middle(setup.space.ranks[0])
    prediction = setup.predict(spec)
    size = prediction.micro_batch_size if prediction else 1
    result = untouched(bench, size, setup.config.training.seed)
    general = {"forgetting": 0.0} if bench.data.general else {}
    return replace(result, metrics={**result.metrics, **general})
