"""rsauto: which LoRA rank, alpha and learning rate to fine-tune with under a memory budget.

    import rsauto
    study = rsauto.run_study("study.yaml")           # or a StudyConfig, or a dict
    study.trials                                     # a pandas DataFrame
    rsauto.select_rank(study.trials, memory_budget="24GiB")

Names are loaded when they are used, so importing rsauto is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsauto.adalora import RsAdaLoraCallback, RsAdaLoraConfig
    from rsauto.adapters.export import export_lora
    from rsauto.adapters.optimizers import build_optimizer
    from rsauto.adapters.stock_adalora import export_adalora
    from rsauto.api import run_study, train
    from rsauto.config import StudyConfig
    from rsauto.errors import RsautoError
    from rsauto.exports.run import export
    from rsauto.memory.plan import Plan, plan
    from rsauto.optuna_table import trials_of
    from rsauto.report.compare import compare
    from rsauto.report.pareto import pareto, select_rank
    from rsauto.report.table import Study, load_study

_HOMES = {
    "RsAdaLoraCallback": "rsauto.adalora",
    "RsAdaLoraConfig": "rsauto.adalora",
    "build_optimizer": "rsauto.adapters.optimizers",
    "export": "rsauto.exports.run",
    "export_adalora": "rsauto.adapters.stock_adalora",
    "export_lora": "rsauto.adapters.export",
    "run_study": "rsauto.api",
    "train": "rsauto.api",
    "StudyConfig": "rsauto.config",
    "RsautoError": "rsauto.errors",
    "Plan": "rsauto.memory.plan",
    "plan": "rsauto.memory.plan",
    "trials_of": "rsauto.optuna_table",
    "compare": "rsauto.report.compare",
    "pareto": "rsauto.report.pareto",
    "select_rank": "rsauto.report.pareto",
    "Study": "rsauto.report.table",
    "load_study": "rsauto.report.table",
}

__version__ = "0.1.0"
__all__ = [
    "Plan",
    "RsAdaLoraCallback",
    "RsAdaLoraConfig",
    "RsautoError",
    "Study",
    "StudyConfig",
    "build_optimizer",
    "compare",
    "export",
    "export_adalora",
    "export_lora",
    "load_study",
    "pareto",
    "plan",
    "run_study",
    "select_rank",
    "train",
    "trials_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rsauto' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
