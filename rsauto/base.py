"""The base model: from the package, a local folder or the hub; frozen, without dropout."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from rsauto.config import ModelConfig
from rsauto.embedded import MODEL_DIR
from rsauto.errors import InputError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class BaseSource:
    """A base model before its weights are read: enough to plan memory and to tokenise data."""

    name: str
    """As written in the study: 'embedded', a hub id or a folder."""
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    fingerprint: str
    """Changes when the model does: the hub commit, or a hash of configuration and weights."""


def pick_device() -> torch.device:
    """The device accelerate would use: this process's GPU where there is one, else the CPU.

    Memory is planned and measured for CUDA and CPUs; other accelerators are not used.
    """
    device: torch.device = PartialState().device
    return device if device.type == "cuda" else torch.device("cpu")


def open_base(config: ModelConfig) -> BaseSource:
    """Reads configuration and tokenizer, no weights.

    Raises InputError when the model is not there, is not a causal LM or has no tokenizer.
    """
    location = _location(config)
    model_config = _read(AutoConfig, config, location)
    _require_causal_lm(config, model_config)
    switch_off_dropout(model_config)
    return BaseSource(
        name=config.name,
        config=model_config,
        tokenizer=_read(AutoTokenizer, config, location),
        dtype=_dtype(config, model_config),
        fingerprint=_fingerprint(location, model_config),
    )


def load_weights(source: BaseSource, config: ModelConfig, device: torch.device) -> PreTrainedModel:
    """The frozen model on its device, safetensors only, no remote code.

    Raises InputError when the weights are missing or unreadable.
    """
    location = _location(config)
    try:
        model: PreTrainedModel = _quietly(
            AutoModelForCausalLM.from_pretrained,
            location,
            config=source.config,
            revision=config.revision,
            dtype=source.dtype,
            attn_implementation=config.attn_implementation,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"model.name: {config.name!r} cannot be loaded: {_first(error)}") from None
    return to_device(prepare(model, config.gradient_checkpointing), device)


def _quietly(load: Callable[..., PreTrainedModel], *args: Any, **kwargs: Any) -> PreTrainedModel:
    """Loads without transformers' progress bar, which would tear a live display."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: PreTrainedModel = load(*args, **kwargs)
        return loaded
    finally:
        if shown:
            logging.enable_progress_bar()


def to_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model with its weights on ``device``."""
    moved: PreTrainedModel = model.to(device)  # type: ignore[arg-type]
    return moved


def prepare(model: PreTrainedModel, gradient_checkpointing: bool) -> PreTrainedModel:
    """Freezes the weights, turns dropout off, sets up checkpointing. Changes the model in place."""
    switch_off_dropout(model.config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.requires_grad_(False)
    model.config.use_cache = False
    if gradient_checkpointing:
        # Renamed in transformers 5; the old name still works and warns.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        # Frozen embeddings give activations without a gradient, and a checkpointed block whose
        # inputs need none would be skipped in backward together with its adapters.
        model.enable_input_require_grads()
    return model


def switch_off_dropout(config: PretrainedConfig) -> None:
    """Sets every dropout probability of a configuration to zero, in place.

    Trials are then comparable and repeatable; fine-tuning recipes for LoRA do the same.
    """
    for key, value in list(vars(config).items()):
        if isinstance(value, float) and ("dropout" in key or key.endswith(("pdrop", "_drop"))):
            setattr(config, key, 0.0)


def _location(config: ModelConfig) -> str:
    if config.name == "embedded":
        return str(MODEL_DIR)
    path = Path(config.name).expanduser()
    looks_local = config.name.startswith((".", "/", "~")) or config.name.count("/") > 1
    if path.is_dir():
        if not (path / "config.json").is_file():
            there = ", ".join(sorted(p.name for p in path.iterdir())[:12]) or "nothing"
            raise InputError(
                f"model.name: folder {config.name!r} has no config.json, so it is not a Hugging "
                f"Face model. It holds: {there}."
            )
        return str(path)
    if looks_local:
        raise InputError(
            f"model.name: there is no folder {config.name!r} (seen from {Path.cwd()}). "
            "Give a local folder, a hub id such as Qwen/Qwen2.5-0.5B, or embedded."
        )
    return config.name


def _read(kind: Any, config: ModelConfig, location: str) -> Any:
    try:
        return kind.from_pretrained(location, revision=config.revision, trust_remote_code=False)
    except (OSError, HFValidationError, ValueError, KeyError) as error:
        what = "tokenizer" if kind is AutoTokenizer else "configuration"
        raise InputError(
            f"model.name: no {what} of {config.name!r} could be read: {_first(error)} "
            "Give a local folder, embedded, or a hub id that can be reached or is in the cache "
            "(HF_HUB_OFFLINE=1 uses the cache only; gated models need `hf auth login`)."
        ) from None


def _require_causal_lm(config: ModelConfig, model_config: PretrainedConfig) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(model_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(
            f"model.name: {config.name!r} is a {model_config.model_type} model, which has no "
            "causal language model. Choose a decoder such as Llama, Qwen, Mistral or GPT-2."
        )


def _dtype(config: ModelConfig, model_config: PretrainedConfig) -> torch.dtype:
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    saved = getattr(model_config, "dtype", None)
    return saved if isinstance(saved, torch.dtype) else torch.float32


def _fingerprint(location: str, model_config: PretrainedConfig) -> str:
    commit = getattr(model_config, "_commit_hash", None)
    if commit:
        return str(commit)
    digest = hashlib.sha256(model_config.to_json_string(use_diff=False).encode())
    for path in sorted(Path(location).glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        for block in _sampled_blocks(path):
            digest.update(block)
    return digest.hexdigest()[:16]


def _sampled_blocks(path: Path) -> Iterator[bytes]:
    """The first block of a file and 255 more, evenly spread: seconds for any size."""
    block_bytes, num_blocks = 2**16, 256
    stride = max(block_bytes, path.stat().st_size // num_blocks)
    with open(path, "rb") as file:
        for offset in range(0, path.stat().st_size, stride):
            file.seek(offset)
            yield file.read(block_bytes)


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Of a loaded model: a hash of the first 1024 numbers of every tensor."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        start = tensor.detach().flatten()[:1024].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + start.numpy().tobytes())
    return digest.hexdigest()[:16]


def _first(error: BaseException) -> str:
    """The first sentence of a library's message, which may run over many lines."""
    line = str(error).strip().split("\n")[0].strip()
    return line if line.endswith(".") else line + "."
