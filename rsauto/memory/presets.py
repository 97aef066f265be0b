"""Configurations of well-known models, and those in a file: all that a plan needs of a model.

`presets.json` holds what shapes each model, from the config.json of the repository it names, and
the published number of parameters. Standard library only.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from rsauto.errors import InputError, nearest

MAX_CONFIG_BYTES = 2**20
"""Of a config.json; the largest known ones have a tenth of it."""

MAX_PARAMS = 10**14
"""A model beyond this is a mistake in its configuration."""

_SIZES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads"),
    "num_key_value_heads": ("num_key_value_heads",),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim"),
    "vocab_size": ("vocab_size",),
}
"""Sizes under the names that architectures give them; each may be absent or null."""

_ALIASES = {
    "gpt-j": "gpt-j-6b", "gptj": "gpt-j-6b", "tinyllama": "tinyllama-1.1b",
    "gpt2": "gpt-2", "gpt2-medium": "gpt-2-medium", "gpt2-large": "gpt-2-large",
    "gpt2-xl": "gpt-2-xl", "phi-3": "phi-3-mini", "mistral": "mistral-7b",
}  # fmt: skip


@cache
def _presets() -> dict[str, dict[str, Any]]:
    text = resources.files("rsauto.memory").joinpath("presets.json").read_text(encoding="utf-8")
    presets: dict[str, dict[str, Any]] = json.loads(text)
    return presets


PRESET_NAMES: tuple[str, ...] = tuple(_presets())


def model_preset(name: str) -> dict[str, Any]:
    """The configuration of a well-known model, a copy that may be changed.

    Case, underscores and the owner of a repository do not matter: 'Qwen/Qwen2.5-7B' is
    'qwen2.5-7b'. Raises InputError with the nearest name.
    """
    config: dict[str, Any] = copy.deepcopy(_presets()[_preset_name(name)]["config"])
    return config


def preset_num_params(name: str) -> int:
    """Published number of parameters, tied ones once. Raises InputError as `model_preset` does."""
    return int(_presets()[_preset_name(name)]["num_params"])


def is_preset(name: str) -> bool:
    """Whether `model_preset` knows the name, in any of its spellings."""
    return _canonical(name) in PRESET_NAMES


def _preset_name(name: str) -> str:
    canonical = _canonical(name)
    if canonical not in PRESET_NAMES:
        raise InputError(
            f"model: {name!r} is not known by name.{nearest(canonical, PRESET_NAMES)} Known are "
            f"{', '.join(PRESET_NAMES)}. For any other model give its config.json."
        )
    return canonical


def _canonical(name: str) -> str:
    key = name.strip().lower().replace("_", "-")
    repositories = {e["repository"].lower(): preset for preset, e in _presets().items()}
    return _ALIASES.get(key) or repositories.get(name.strip().lower()) or key


def read_model_config(path: str | Path) -> dict[str, Any]:
    """The configuration in a config.json, or in the folder that holds one.

    Raises InputError if there is none, it is no JSON object, names no model_type, or has sizes
    that no model has. Whether transformers knows the type is found when the model is built; types
    that need code from their repository (auto_map) it does not.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    config = _parsed(file)
    where = f"model: {str(file)!r}"
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise InputError(
            f"{where} has no model_type. Give the config.json of a transformers model."
        )
    text_config = config.get("text_config")
    for part in (config, text_config if isinstance(text_config, dict) else {}):
        _check_sizes(part, where)
    return config


def _parsed(file: Path) -> dict[str, Any]:
    where = f"model: {str(file)!r}"
    try:
        if not file.is_file():  # nor is a pipe or a device, which might never end
            raise InputError(f"{where} is no file. Give a config.json or the folder of a model.")
        with file.open("rb") as stream:
            content = stream.read(MAX_CONFIG_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where} cannot be read ({error}).") from None
    if len(content) > MAX_CONFIG_BYTES:
        raise InputError(f"{where} is larger than 1 MiB, so it is no model configuration.")
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"{where} is not JSON ({reason}). Give a model's config.json.") from None
    if not isinstance(config, dict):
        raise InputError(f"{where} holds no JSON object. Give a model's config.json.")
    return config


def _check_sizes(config: dict[str, Any], where: str) -> None:
    sizes = {
        size: _size(config, key, where)
        for size, keys in _SIZES.items()
        for key in keys
        if config.get(key) is not None
    }
    hidden, layers = sizes.get("hidden_size", 1), sizes.get("num_hidden_layers", 1)
    inner = sizes.get("intermediate_size", hidden)
    # The least that these sizes can mean: one projection in, one out, and the embeddings.
    num_params = hidden * (sizes.get("vocab_size", 1) + layers * (hidden + inner))
    if num_params > MAX_PARAMS:
        listed = ", ".join(f"{size} {value}" for size, value in sizes.items())
        raise InputError(f"{where} describes a model of more than 10^14 parameters ({listed}).")


def _size(config: dict[str, Any], key: str, where: str) -> int:
    value = config[key]
    if isinstance(value, list) and value and key in ("num_key_value_heads", "intermediate_size"):
        return max(_size({key: item}, key, where) for item in value)  # one for each layer
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_PARAMS:
        shown = repr(value) if len(repr(value)) < 40 else repr(value)[:36] + "..."
        raise InputError(f"{where}: {key} must be a whole number from 1 to 10^14, but is {shown}.")
    return value
