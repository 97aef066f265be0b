"""What a study ran on: versions, device, fingerprints of model and data."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

_PACKAGES = (
    "rsauto", "torch", "transformers", "peft", "optuna", "datasets", "accelerate", "pandas",
    "numpy", "scipy", "tokenizers", "safetensors",
)  # fmt: skip
_OPTIONAL = ("bitsandbytes", "triton")


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine: what may make the results of two machines differ. JSON values only."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "device": _device_name(device),
        "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "cpu": _cpu_name(),
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "num_interop_threads": torch.get_num_interop_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        **(_cuda(device) if device.type == "cuda" else {}),
        "ram_bytes": psutil.virtual_memory().total,
    }


def package_versions() -> dict[str, str]:
    """Of rsauto and of the libraries that results depend on."""
    found = {name: version(name) for name in _PACKAGES}
    for name in _OPTIONAL:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _cpu_name() -> str:
    """The processor's model: kernels are chosen by it, and add up in another order."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _cuda(device: torch.device) -> dict[str, Any]:
    """What chooses the kernels of a GPU, beside its name."""
    return {
        "cuda_capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "cudnn": torch.backends.cudnn.version(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (CUDA {torch.version.cuda})"
    return f"{device.type} ({platform.machine()})"
