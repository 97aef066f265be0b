"""What a study ran on: versions, device, fingerprints of model and data."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

import psutil
import torch

_PACKAGES = (
    "rsauto", "torch", "transformers", "peft", "optuna", "datasets", "accelerate", "pandas", "numpy"
)  # fmt: skip


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine, JSON values only."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "device": _device_name(device),
        "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "num_threads": torch.get_num_threads(),
        "ram_bytes": psutil.virtual_memory().total,
    }


def package_versions() -> dict[str, str]:
    """Of rsauto and of the libraries that results depend on."""
    return {name: version(name) for name in _PACKAGES}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (CUDA {torch.version.cuda})"
    return f"{device.type} ({platform.machine()})"
