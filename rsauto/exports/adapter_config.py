"""What an adapter_config.json of a study may say: plain LoRA of scale 1, and no more.

PEFT does more with such a file than rsauto ever writes into it: it imports a module that the file
names, reads caches that it names, and takes its names for regular expressions, which can be made
never to end. A study folder may come from somebody else.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor

from rsauto.adapters.sealed import load_sealed

_WRITTEN = frozenset({
    "alpha_pattern", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode",
    "lora_alpha", "modules_to_save", "peft_type", "peft_version", "r", "rank_pattern", "revision",
    "target_modules", "task_type", "use_rslora",
})  # fmt: skip
"""Fields that rsauto gives a value of its own."""

_NAME = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)
"""Of a module; as a regular expression it matches itself, or a dot any letter."""


def load_plain_lora(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter that rsauto wrote, by their names in the file.

    Raises ValueError where its configuration or weights are not as they were written, and OSError,
    TypeError, AttributeError, RecursionError or SafetensorError where they cannot be read at all.
    """
    path = folder / "adapter_config.json"
    require_plain_lora(path)
    tensors = load_sealed(folder / "adapter_model.safetensors")
    found = json.loads(path.read_text(encoding="utf-8"))
    targets, whole = (found.get(key) or [] for key in ("target_modules", "modules_to_save"))
    modules = {f".{name.rpartition('.lora_')[0]}" for name in tensors if ".lora_" in name}
    wrong = [name for name in modules if not name.endswith(tuple(f".{t}" for t in targets))]
    wrong += [name for name in targets if not any(m.endswith(f".{name}") for m in modules)]
    wrong += [name for name in whole if not any(f".{name}." in f".{key}" for key in tensors)]
    if wrong:
        raise ValueError(f"{path.name} and the weights differ in modules: {_start(wrong)}")
    return tensors


def require_plain_lora(path: Path) -> None:
    """Raises ValueError that names what rsauto did not write, OSError where it cannot be read."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        raise ValueError(f"{path.name} is not of LoRA")
    default = LoraConfig().to_dict()
    problems = [
        f"{key} is {_start(value)}"
        for key, value in found.items()
        if key in default and key not in _WRITTEN and value != default[key]
    ]
    problems += [f"{key} has the name {_start(name)}" for key, name in _wrong_names(found)]
    problems += _other_scales(found)
    if problems:
        raise ValueError(f"{path.name} is not what rsauto writes: {'; '.join(problems[:5])}")


def _wrong_names(found: dict[str, Any]) -> list[tuple[str, Any]]:
    listed = {key: found.get(key) or [] for key in ("target_modules", "modules_to_save")}
    patterns = {key: found.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    wrong = [(key, names) for key, names in listed.items() if not isinstance(names, list)]
    wrong += [(key, names) for key, names in patterns.items() if not isinstance(names, dict)]
    if wrong:
        return wrong
    return [
        (key, name)
        for key, names in (listed | patterns).items()
        for name in names
        if not (isinstance(name, str) and _NAME.fullmatch(name))
    ]


def _other_scales(found: dict[str, Any]) -> list[str]:
    """Alpha is the rank in every module; where it is not, one of the two was damaged."""
    pairs = (("lora_alpha", "r"), ("alpha_pattern", "rank_pattern"))
    problems = [
        f"{alpha} is {_start(found.get(alpha))} and {rank} {_start(found.get(rank))}"
        for alpha, rank in pairs
        if (found.get(alpha) or {}) != (found.get(rank) or {})
    ]
    return [*problems, "use_rslora is set"] if found.get("use_rslora") else problems


def _start(value: Any) -> str:
    return repr(value)[:60]
