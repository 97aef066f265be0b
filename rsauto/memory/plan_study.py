"""The plan of a study, from its study file alone: the data are not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rsauto.config import StudyConfig
from rsauto.memory.plan import Plan, plan
from rsauto.records import ADALORA_METHODS, Method
from rsauto.units import method_text

_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Devices of GPU drivers: NVIDIA's, the same under Windows, and AMD's."""


def plan_study(config: StudyConfig, **overrides: Any) -> Plan:
    """What the ranks of a study need, its rows taken to be as long as data.max_length allows.

    ``overrides`` are arguments of `rsauto.plan` that take the place of the study's own. A budget
    of 'auto' is none on a machine without a GPU. Raises InputError as `rsauto.plan` does.
    """
    return plan(**study_settings(config, **overrides))


def study_settings(config: StudyConfig, **overrides: Any) -> dict[str, Any]:
    """The arguments of `rsauto.plan` that a study stands for, ``overrides`` applied."""
    model, training = config.model, config.training
    name = overrides.get("model", model.name)
    settings: dict[str, Any] = {
        "model": name,
        "revision": model.revision if name == model.name else None,
        "device": "cpu" if name == "embedded" else "cuda",
        "memory_budget": config.memory_budget,
        "ranks": config.search.ranks,
        "batch_size": training.batch_size,
        "micro_batch_size": training.micro_batch_size,
        "max_length": config.data.max_length,
        "method": _needing_most(config.search.method),
        "init_ratio": config.adalora.init_ratio,
        "score": config.adalora.score,
        "orth_reg": config.adalora.orth_reg_weight > 0,
        "target_modules": config.target_choices()[0],
        "optimizer": training.optimizer,
        "dtype": model.dtype,
        "adapter_dtype": model.adapter_dtype,
        "quant_bits": model.quant_bits,
        "attn_implementation": model.attn_implementation,
        "gradient_checkpointing": model.gradient_checkpointing,
        "clip": training.max_grad_norm is not None,
        "task": config.data.task,
        **overrides,
    }
    if "memory_budget" not in overrides and config.memory_budget == "auto":
        asks_gpu = settings["device"] == "cuda" and _has_gpu()
        settings["memory_budget"] = "auto" if asks_gpu else None
    return settings


def study_notes(config: StudyConfig, settings: dict[str, Any]) -> list[str]:
    """Sentences on what ``settings`` assume where the study leaves it open."""
    notes = [
        f"The data are not read: the longest row is taken to have {settings['max_length']} tokens."
    ]
    if settings["task"] == "SEQ_CLS":
        notes[0] += f" There are {settings.get('num_labels', 2)} classes."
    if config.memory_budget == "auto" and settings["memory_budget"] is None:
        notes.append(
            "The study's memory_budget is auto and no GPU was found, so this is a plan without a "
            "budget. Give --memory-budget, such as 24GiB or rtx4090."
        )
    methods = config.search.method
    if len(set(map(_allocates, methods))) > 1:
        planned, most = settings["method"], _needing_most(methods)
        other = next(m for m in methods if _allocates(m) != _allocates(planned))
        notes.append(
            f"The study searches over several methods; planned is {method_text(planned)}"
            f"{', which needs most' if planned == most else ''}. Give --method {other} to plan "
            f"{method_text(other)}."
        )
    if len(config.target_choices()) > 1:
        notes.append(
            "The study searches over several choices of layers; planned are target_modules "
            f"{targets_text(settings['target_modules'])}."
        )
    return notes


def _needing_most(methods: tuple[Method, ...]) -> Method:
    """AdaLoRA where it is searched; whether a method is scaled as rsLoRA is of no account."""
    return next(filter(_allocates, methods), methods[0])


def _allocates(method: str) -> bool:
    return method in ADALORA_METHODS


def targets_text(targets: str | tuple[str, ...]) -> str:
    """'all-linear', or 'q_proj, v_proj'."""
    return targets if isinstance(targets, str) else ", ".join(targets)


def _has_gpu() -> bool:
    """Where there is no driver, torch need not be loaded to know."""
    if not any(Path(driver).exists() for driver in _DRIVERS):
        return False
    import torch

    return torch.cuda.is_available()
