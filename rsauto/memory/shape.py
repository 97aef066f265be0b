"""The model of a plan: found by whatever name it was given, read from its configuration alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsauto.config import TaskType
from rsauto.errors import InputError, nearest
from rsauto.memory.kinds import Bits, DtypeName, configuration_text
from rsauto.memory.presets import (
    PRESET_NAMES,
    is_preset,
    model_preset,
    read_model_config,
)

_DTYPES: tuple[DtypeName, ...] = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """All that a plan needs of a model."""

    name: str
    config_json: str
    """The Hugging Face configuration, as a `StepKind` has it."""
    dtype: DtypeName
    """That the weights were saved in."""
    quant_bits: Bits | None
    """Of a checkpoint that is quantised already."""


def model_shape(
    model: str | Path | Mapping[str, Any] | Any,
    *,
    task: TaskType,
    num_labels: int | None = None,
    revision: str | None = None,
) -> ModelShape:
    """The shape of a preset, folder, config.json, hub model, 'embedded', configuration or model.

    Raises InputError where there is none of the name, or its configuration is broken.
    """
    name, fields = _fields(model, revision)
    if task == "SEQ_CLS":
        fields = _with_labels(fields, num_labels)
    try:
        config_json = configuration_text(fields)
    except (TypeError, ValueError) as error:
        raise InputError(f"model: the configuration is not plain JSON ({error}).") from None
    return ModelShape(
        name=name,
        config_json=config_json,
        dtype=_dtype(fields),
        quant_bits=_saved_bits(fields),
    )


def _with_labels(fields: Mapping[str, Any], num_labels: int | None) -> dict[str, Any]:
    """With so many classes; None leaves those that the configuration names, else two."""
    changed = dict(fields)
    if num_labels is not None or "id2label" not in changed:
        changed = {k: v for k, v in changed.items() if k not in ("id2label", "label2id")}
        changed["num_labels"] = num_labels or 2
    if changed.get("pad_token_id") is None:
        changed["pad_token_id"] = 0
    return changed


def _fields(model: Any, revision: str | None) -> tuple[str, dict[str, Any]]:
    """(name, configuration)."""
    if isinstance(model, Mapping):
        return str(model.get("model_type", "model")), dict(model)
    if not isinstance(model, (str, Path)):
        return _of_object(model)
    name = str(model)
    try:
        path = Path(name).expanduser()
        is_there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # such as a name of 5000 characters
        raise InputError(f"model: {name[:80]!r} is no path and no hub id ({error}).") from None
    if name == "embedded":
        from rsauto.embedded import MODEL_DIR

        return name, read_model_config(MODEL_DIR)
    if is_there:
        return name, read_model_config(path)
    if is_preset(name) and revision is None:
        return name, model_preset(name)
    looks_local = name.startswith((".", "/", "~")) or name.endswith(".json") or name.count("/") > 1
    if looks_local or "/" not in name:
        raise InputError(
            f"model: {name!r} is no file, no folder and no known shape."
            f"{nearest(name.lower(), PRESET_NAMES)} Give a config.json, the folder of a model, a "
            f"hub id such as Qwen/Qwen2.5-0.5B, embedded, or one of {', '.join(PRESET_NAMES)}."
        )
    from rsauto.hub import Repository, fetch_config

    return name, read_model_config(fetch_config(Repository("model", name, revision)))


def _of_object(model: Any) -> tuple[str, dict[str, Any]]:
    """Of transformers: a configuration, or a model that has one."""
    config = getattr(model, "config", model)
    if not hasattr(config, "to_json_string"):
        raise InputError(
            f"model: {type(model).__name__} is neither a name nor a configuration. Give a preset, "
            "a config.json, a hub id, a dict, or a configuration or model of transformers."
        )
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return str(getattr(config, "name_or_path", "") or fields.get("model_type")), fields


def _dtype(fields: Mapping[str, Any]) -> DtypeName:
    saved = str(fields.get("dtype") or fields.get("torch_dtype") or "float32")
    known = [name for name in _DTYPES if name == saved.removeprefix("torch.")]
    return known[0] if known else "float32"


def _saved_bits(fields: Mapping[str, Any]) -> Bits | None:
    saved = fields.get("quantization_config")
    if not saved:
        return None
    if not isinstance(saved, Mapping):
        raise InputError(f"model: its quantization_config is {saved!r}, which is no object.")
    from transformers import PretrainedConfig

    from rsauto.quantisation import saved_bits

    return saved_bits(PretrainedConfig.from_dict(dict(fields)))
