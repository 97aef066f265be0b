"""Memory budgets: a size, or a GPU by its name, with what CUDA reports for it and not the box.

A "24 GB" card has 23.5 GiB for programs. The sizes are `get_device_properties().total_memory`, as
PyTorch prints it where memory runs out; of several reports, with and without error correction or
on several drivers, the smallest. Standard library only: a plan that was made before starts at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rsauto.choices import parse_bytes
from rsauto.errors import InputError, nearest

GIB = 2**30
MIB = 2**20

CONTEXT_BYTES = 512 * MIB
"""Driver context and loaded kernels of one process, outside PyTorch's allocator.

A context alone was seen at 426 MiB (RTX 6000 Ada, PyTorch 2.10 with CUDA 13.0,
https://github.com/unslothai/unsloth-zoo/pull/1053) and is put at 400 MiB by those who maintain it
(https://github.com/pytorch/pytorch/issues/109888); kernels come on top when first used."""

LARGE_WORKSPACE_BYTES = 32 * MIB
SMALL_WORKSPACE_BYTES = 2 * 4096 * 1024 + 8 * 16 * 1024
"""cuBLAS's scratch, allocated by PyTorch for every handle and stream and kept: 32 MiB on compute
capability 9, 10 and 12, else what CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8 asks for. cublasLt shares
it. From `parseChosenWorkspaceSize` in PyTorch's aten/src/ATen/cuda/CublasHandlePool.cpp; releases
that know Blackwell's default only as the small one need less."""

CUBLAS_THREADS = 2
"""Forward runs on the thread of the caller and backward on autograd's, each with its own handle."""

_LARGE_WORKSPACES = frozenset({9, 10, 12})
"""Major compute capabilities: Hopper and Blackwell."""


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU as CUDA describes it."""

    name: str
    total_bytes: int
    compute_capability: tuple[int, int]
    source: str
    """Where the size was reported: an address, or the log it stands in."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Device memory that the whole fine-tune may take."""

    total_bytes: int
    device: Device | None
    """None where only a size is known."""
    words: str
    """As people read it: '24GiB', 'rtx4090 (23.52 GiB)'."""


def _table(*rows: tuple[str, int, tuple[int, int], str]) -> Mapping[str, Device]:
    return {row[0]: Device(*row) for row in rows}


_GITHUB = "https://github.com/"

DEVICES: Mapping[str, Device] = _table(
    ("p100", 16276 * MIB, (6, 0), "get_device_properties in Kaggle notebooks"),
    ("v100-16", int(15.75 * GIB), (7, 0), _GITHUB + "XuyangBai/TransFusion/issues/49"),
    ("v100-32", int(31.74 * GIB), (7, 0), _GITHUB + "haotian-liu/LLaVA/issues/812"),
    ("t4", int(14.56 * GIB), (7, 5), _GITHUB + "Zheng-Chong/CatVTON/issues/133"),
    ("rtx2080ti", int(10.76 * GIB), (7, 5), _GITHUB + "JDAI-CV/image-captioning/issues/11"),
    ("a30", int(23.53 * GIB), (8, 0), _GITHUB + "google/RB-Modulation/issues/5"),
    ("a100-40", 42_298_834_944, (8, 0), _GITHUB + "bottlerocket-os/bottlerocket/pull/3873"),
    ("a100-80", int(79.14 * GIB), (8, 0), _GITHUB + "lianqi1008/Control-GIC/issues/6"),
    ("a10", int(21.99 * GIB), (8, 6), _GITHUB + "zai-org/CogVLM/issues/236"),
    ("a10g", 22587 * MIB, (8, 6), "get_device_properties in TorchCodec's CUDA tutorial"),
    ("a40", 47_622_258_688, (8, 6), _GITHUB + "pyscf/gpu4pyscf/issues/304"),
    ("a5000", 24114 * MIB, (8, 6), "get_device_properties in public environment reports"),
    ("a6000", 48670 * MIB, (8, 6), _GITHUB + "ultralytics/ultralytics/issues/19084"),
    ("rtx3060", int(11.75 * GIB), (8, 6), _GITHUB + "Kunhao-Liu/StyleGaussian/issues/12"),
    ("rtx3080", int(9.78 * GIB), (8, 6), _GITHUB + "zai-org/CogVideo/issues/34"),
    ("rtx3090", int(23.59 * GIB), (8, 6), _GITHUB + "Stable-X/StableNormal/issues/33"),
    ("l4", int(22.05 * GIB), (8, 9), _GITHUB + "instructlab/instructlab/issues/2666"),
    ("l40", int(44.40 * GIB), (8, 9), _GITHUB + "QwenLM/Qwen3-VL/issues/2097"),
    ("l40s", int(44.42 * GIB), (8, 9), _GITHUB + "stepfun-ai/Step-Video-T2V/issues/8"),
    ("rtx4070ti", int(11.73 * GIB), (8, 9), _GITHUB + "OpenLMLab/LOMO/issues/17"),
    ("rtx4080", 16049 * MIB, (8, 9), "BrainGlobe's documentation, Speeding up cellfinder"),
    ("rtx4090", int(23.52 * GIB), (8, 9), _GITHUB + "Soul-AILab/SoulX-FlashTalk/issues/5"),
    ("rtx6000-ada", int(44.43 * GIB), (8, 9), _GITHUB + "DINGYANB/MTVCrafter/issues/21"),
    ("h100", int(79.10 * GIB), (9, 0), _GITHUB + "huggingface/trl/issues/2688"),
    ("h100-nvl", int(93.00 * GIB), (9, 0), _GITHUB + "ali-vilab/VACE/issues/56"),
    ("h200", int(139.72 * GIB), (9, 0), "OutOfMemoryError in public training logs"),
    ("b200", int(178.35 * GIB), (10, 0), _GITHUB + "pytorch/ao/pull/4002"),
    ("rtx5080", 15840 * MIB, (12, 0), "device line of Ultralytics in public training logs"),
    ("rtx5090", 33_677_180_928, (12, 0), _GITHUB + "aikitoria/open-gpu-kernel-modules/issues/1"),
)
"""By name; h100 is the one with 80 GB."""

_SIZES = {"a100": ("a100-40", "a100-80"), "v100": ("v100-16", "v100-32")}
"""Names under which cards of two sizes are sold."""

_DECORATION = re.compile(
    r"nvidia|geforce|tesla|rtx|sxm\d?|pcie|hbm\d?e?|generation|(?<=\b\d\d)gb|\s|(?<=\w)[_-]"
)
"""What names of one card differ in, such as 'NVIDIA A100-SXM4-80GB' and 'a100-80'."""


def _key(name: str) -> str:
    return _DECORATION.sub("", name.lower())


_BY_KEY = {
    **{_key(name): device for name, device in DEVICES.items()},
    "p10016": DEVICES["p100"],
    "h10080": DEVICES["h100"],
    "h10094": DEVICES["h100-nvl"],
}


def find_device(name: str) -> Device | None:
    """The device that `name` means, None where it means none: '4090', 'RTX 4090' and 'rtx_4090'.

    Raises ValueError for a name that is sold in two sizes.
    """
    key = _key(name)
    if key in _SIZES:
        small, large = _SIZES[key]
        raise ValueError(f"{key} comes in two sizes: give {small} or {large}")
    return _BY_KEY.get(key)


def read_budget(value: object) -> Budget:
    """The budget that a size, a number of bytes or the name of a GPU stands for, 'auto' excepted.

    Raises ValueError with what is allowed, for messages that name the field themselves.
    """
    text = str(value).strip()
    device = find_device(text)
    if device is not None:
        words = f"{device.name} ({device.total_bytes / GIB:.2f} GiB)"
        return Budget(device.total_bytes, device, words)
    if text == "auto":
        raise ValueError("auto asks a device, and none is asked here: give a size such as 24GiB")
    try:
        return Budget(parse_bytes(value), None, text)
    except ValueError as error:
        also = "" if text[:1].isdigit() else ", or a GPU such as rtx4090 or a100-80"
        meant = nearest(text.lower(), DEVICES)
        raise ValueError(f"{error}{also}{'.' if meant else ''}{meant}") from None


def parse_budget(text: str) -> Budget:
    """The budget that `text` stands for, as `read_budget` reads it.

    Raises InputError naming memory_budget, also for 'auto', which only a device can resolve.
    """
    try:
        return read_budget(text)
    except ValueError as error:
        raise InputError(f"memory_budget: {text!r}: {error}.".replace("?.", "?")) from None


def context_bytes(device: Device | None) -> int:
    """Memory of a process on the device that no tensor takes: context and kernels.

    The same for every device: no report was found in which they differ by more than kernels do.
    """
    return CONTEXT_BYTES


def workspace_bytes(device: Device | None) -> int:
    """cuBLAS workspaces of a training process; the larger ones where the device is not known."""
    large = device is None or device.compute_capability[0] in _LARGE_WORKSPACES
    return CUBLAS_THREADS * (LARGE_WORKSPACE_BYTES if large else SMALL_WORKSPACE_BYTES)


def outside_bytes(device: Device | None) -> int:
    """What a training process takes on a GPU outside of what its tensors are counted in."""
    return context_bytes(device) + workspace_bytes(device)


def card_of(properties: Any) -> Device:
    """The GPU that `torch.cuda.get_device_properties` describes."""
    capability = (int(properties.major), int(properties.minor))
    return Device(properties.name, int(properties.total_memory), capability, "this machine")
