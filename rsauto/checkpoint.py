"""What a folder or repository must hold to be a base model: a configuration and safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from rsauto.errors import InputError

_INDEX = "model.safetensors.index.json"


def require_model_folder(name: str, path: Path) -> None:
    """Raises InputError when a local folder has no configuration or no weights to be read."""
    files = sorted(one.name for one in path.iterdir())
    if "config.json" in files:
        problem = missing_weights(files, path.joinpath)
    elif "adapter_config.json" in files:
        problem = adapter_base(path / "adapter_config.json")
    else:
        problem = (
            "has no config.json, so it is not a Hugging Face model. It holds: "
            f"{', '.join(files[:12]) or 'nothing'}."
        )
    if problem:
        raise InputError(f"model.name: folder {name!r} {problem}")


def missing_weights(files: Iterable[str], path_of: Callable[[str], Path]) -> str | None:
    """What keeps the weights from being read, as the end of a sentence; None when nothing does.

    ``files`` are those of a repository or folder, ``path_of`` gives one to be read.
    """
    names = set(files)
    weights = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if not [name for name in weights if not name.startswith("adapter_")]:
        if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
            return (
                "has its weights as PyTorch pickles only, and rsauto reads safetensors only. "
                "Convert it once: load model and tokenizer with transformers, save_pretrained both "
                "to one folder, and give that folder."
            )
        if any(name.endswith(".gguf") for name in names):
            return (
                "has its weights as GGUF only, which is for inference. Give the model that it was "
                "made from."
            )
        return "has no weights, which rsauto reads from *.safetensors files."
    if "model.safetensors" not in names and _INDEX in names:
        shards = json.loads(path_of(_INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        absent = sorted(set(shards) - names)
        if absent:
            return (
                f"is not complete: {_INDEX} names {len(set(shards))} files, of which "
                f"{', '.join(absent[:3])}{' and more are' if absent[3:] else ' is'} missing. "
                f"Download or upload it again."
            )
    return None


def adapter_base(config: Path) -> str:
    """The end of a sentence about an adapter, with the base model its configuration names."""
    base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    return (
        f"is an adapter, not a model: rsauto trains adapters of its own. "
        f"Give its base model{f', {base}' if base else ''}."
    )
