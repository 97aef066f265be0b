"""The base model: from the package, a local folder or the hub; frozen, without dropout."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from rsauto.adapters.head import head_module_names
from rsauto.architecture import architecture_of, attention_of, auto_class, pad_like
from rsauto.checkpoint import require_model_folder
from rsauto.config import ModelConfig, TaskType
from rsauto.embedded import MODEL_DIR
from rsauto.errors import InputError, nearest
from rsauto.hub import Repository, explain, fetch_model
from rsauto.quantisation import (
    hides_inputs,
    keep_trainable,
    loading_settings,
    require_loadable,
    saved_bits,
    unquantised_modules,
)

_WRITTEN_BY = ("_name_or_path", "transformers_version")
"""Keys of a config.json that say where and by what it was written, nothing of the model."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class BaseSource:
    """A base model before its weights are read: enough to plan memory and to tokenise data."""

    name: str
    """As written in the study: 'embedded', a hub id or a folder."""
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    attn_implementation: str
    task: TaskType
    fingerprint: str
    """Changes when the model does: the hub commit, or a hash of configuration and weights."""
    commit: str | None = None
    """Of a model from the hub, all of whose files are read at it."""
    former_fingerprint: str | None = None
    """What earlier versions of rsauto wrote for this very folder."""

    def in_todays_form(self, stored: Mapping[str, str]) -> dict[str, str]:
        """Fingerprints that a study has stored, with today's of this model in place of a former."""
        model = stored.get("model")
        is_former = model is not None and model == self.former_fingerprint
        return {**stored, "model": self.fingerprint} if is_former else dict(stored)


@dataclass(frozen=True)
class LoadedBase:
    """A frozen base model on its device."""

    model: PreTrainedModel
    fresh_parameters: tuple[str, ...] = ()
    """Full names of a classifier's parameters that the checkpoint did not have, in model order."""


def pick_device() -> torch.device:
    """The device accelerate would use: this process's GPU where there is one, else the CPU.

    Memory is planned and measured for CUDA and CPUs; other accelerators are not used.
    """
    device: torch.device = PartialState().device
    return device if device.type == "cuda" else torch.device("cpu")


def open_base(config: ModelConfig, task: TaskType = "CAUSAL_LM") -> BaseSource:
    """Reads configuration and tokenizer, no weights.

    Raises InputError when the model is not there, cannot do the task or has no tokenizer.
    """
    location = _location(config)
    commit = _commit(config, location)
    model_config = _read(AutoConfig, config, location, commit)
    architecture = architecture_of(config.name, model_config, task)
    require_loadable(config.name, config.quant_bits, model_config)
    switch_off_dropout(model_config)
    fingerprint, former = (commit, None) if commit else _fingerprints(location, model_config)
    return BaseSource(
        name=config.name,
        config=model_config,
        tokenizer=_read(AutoTokenizer, config, location, commit),
        dtype=_dtype(config, model_config),
        attn_implementation=attention_of(architecture, config.attn_implementation),
        task=task,
        fingerprint=fingerprint,
        commit=commit,
        former_fingerprint=former,
    )


def with_labels(source: BaseSource, names: Sequence[str], pad_token_id: int) -> BaseSource:
    """The source of a classifier with these classes, the checkpoint's own or other ones."""
    config = copy.deepcopy(source.config)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    pad_like(config, pad_token_id)
    return replace(source, config=config)


def load_weights(source: BaseSource, config: ModelConfig, device: torch.device) -> LoadedBase:
    """The frozen model on its device, safetensors only, no remote code.

    Raises InputError when weights are missing or unreadable; a classifier's head may be missing.
    """
    location = _location(config)
    try:
        model, found = _quietly(
            auto_class(source.task).from_pretrained,
            location,
            config=source.config,
            revision=source.commit,
            dtype=source.dtype,
            attn_implementation=source.attn_implementation,
            ignore_mismatched_sizes=True,  # told below, with their names
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            **_quantised_loading(source, config, device),
        )
    except Exception as error:
        # While files are fetched, the network library raises kinds of its own.
        words = explain(error, _repository(config)) if source.commit else None
        if not words and not isinstance(error, (OSError, ValueError, ImportError, SafetensorError)):
            raise
        at_fault = f"model.name: {config.name!r} cannot be loaded: {_first(error)}"
        raise InputError(words or at_fault) from error
    absent = _absent_parameters(model, found)
    _require_shapes(config, model, found)
    _require_complete(config, model, absent)
    return LoadedBase(to_device(prepare(model, config.gradient_checkpointing), device), absent)


def _quantised_loading(
    source: BaseSource, config: ModelConfig, device: torch.device
) -> dict[str, Any]:
    """Arguments of `from_pretrained`: weights are quantised on the device they stay on."""
    if config.quant_bits is None:
        return {}
    if saved_bits(source.config) is not None:
        return {"device_map": {"": device}}
    with torch.device("meta"):
        skeleton = auto_class(source.task).from_config(source.config, trust_remote_code=False)
    kept = unquantised_modules(skeleton, head_module_names(skeleton))
    settings = loading_settings(config.quant_bits, source.dtype, kept)
    return {"device_map": {"": device}, "quantization_config": settings}


def _absent_parameters(model: PreTrainedModel, found: dict[str, Any]) -> tuple[str, ...]:
    """Parameters that the checkpoint lacks, or has in another shape."""
    other_shape = {key[0] for key in found["mismatched_keys"]}
    absent = set(found["missing_keys"]) | other_shape
    return tuple(name for name, _ in model.named_parameters() if name in absent)


def _require_shapes(config: ModelConfig, model: PreTrainedModel, found: dict[str, Any]) -> None:
    other = sorted(key for key in found["mismatched_keys"] if not _is_of_head(model, key[0]))
    if other:
        name, saved, asked = other[0]
        raise InputError(
            f"model.name: {len(other)} weights of {config.name!r} have another shape than its "
            f"config.json says: {name} is {tuple(saved)} and should be {tuple(asked)}. They do not "
            "belong together; save_pretrained of the model writes both."
        )


def _is_of_head(model: PreTrainedModel, name: str) -> bool:
    """Whether a weight belongs to a classifier's head, which every study draws anew."""
    heads = tuple(f"{head}." for head in head_module_names(model))
    return name.startswith(heads or "no head")


def _require_complete(config: ModelConfig, model: PreTrainedModel, absent: tuple[str, ...]) -> None:
    needed = [name for name in absent if not _is_of_head(model, name)]
    if needed:
        raise InputError(
            f"model.name: the checkpoint of {config.name!r} lacks {len(needed)} weights of a "
            f"{type(model).__name__}, {needed[0]} among them; they would be random numbers. "
            f"Give a checkpoint of that architecture."
        )


def _quietly(load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Loads without transformers' progress bar, which would tear a live display."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return load(*args, **kwargs)
    finally:
        if shown:
            logging.enable_progress_bar()


def to_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model with its weights on ``device``."""
    moved: PreTrainedModel = model.to(device)  # type: ignore[arg-type]
    return moved


def prepare(
    model: PreTrainedModel, gradient_checkpointing: bool, use_reentrant: bool | None = None
) -> PreTrainedModel:
    """Freezes the weights, turns dropout off, sets up checkpointing. Changes the model in place.

    ``use_reentrant`` is that of torch.utils.checkpoint; None takes it only where the model needs
    it.
    Raises InputError for checkpointing where the architecture has none.
    """
    switch_off_dropout(model.config)
    for module in model.modules():
        switch_off_dropout(module)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    keep_trainable(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    if gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise InputError(
                f"model.gradient_checkpointing: true, but {type(model).__name__} has none in "
                "transformers. Set it to false."
            )
        # Renamed in transformers 5; the old name still works and warns.
        enable = getattr(model, "activation_checkpointing_enable", None)
        reentrant = hides_inputs(model) if use_reentrant is None else use_reentrant
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
        # Frozen embeddings give activations without a gradient, and a checkpointed block whose
        # inputs need none would be skipped in backward together with its adapters.
        model.enable_input_require_grads()
    return model


def switch_off_dropout(holder: PretrainedConfig | nn.Module) -> None:
    """Sets to zero every dropout probability that a configuration or a module holds, in place.

    Trials are then comparable and repeatable; fine-tuning recipes for LoRA do the same.
    """
    for key, value in list(vars(holder).items()):
        if isinstance(value, float) and "drop" in key:
            setattr(holder, key, 0.0)


def _location(config: ModelConfig) -> str:
    if config.name == "embedded":
        return str(MODEL_DIR)
    path = Path(config.name).expanduser()
    looks_local = config.name.startswith((".", "/", "~")) or config.name.count("/") > 1
    if path.is_dir():
        require_model_folder(config.name, path)
        return str(path)
    if path.is_file():
        raise InputError(
            f"model.name: {config.name!r} is a file. Give the folder of the model, with its "
            "config.json, tokenizer and *.safetensors."
        )
    if looks_local:
        siblings = path.parent.iterdir() if path.parent.is_dir() else ()
        close = nearest(str(path), [str(one) for one in siblings if one.is_dir()])
        raise InputError(
            f"model.name: there is no folder {config.name!r} (seen from {Path.cwd()}).{close} "
            "Give a local folder, a hub id such as Qwen/Qwen2.5-0.5B, or embedded."
        )
    return config.name


def _commit(config: ModelConfig, location: str) -> str | None:
    if not Path(location).is_dir():
        return fetch_model(_repository(config))
    if config.revision is not None:
        raise InputError(
            f"model.revision: {config.revision!r} has no effect, because {config.name!r} is not on "
            f"the hub. Remove it."
        )
    return None


def _repository(config: ModelConfig) -> Repository:
    return Repository("model", config.name, config.revision)


def _read(kind: Any, config: ModelConfig, location: str, commit: str | None) -> Any:
    try:
        # All it needs of a commit is in the cache by now; looking for more would be slow offline.
        return kind.from_pretrained(
            location,
            revision=commit,
            local_files_only=commit is not None,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        if kind is AutoTokenizer:
            what = "tokenizer"
            advice = "Its files must be there and whole; save_pretrained of a tokenizer writes them"
        else:
            what = "configuration"
            advice = "Its architecture must be one of transformers, without code of its own"
        raise InputError(
            f"model.name: no {what} of {config.name!r} could be read: {_first(error)} {advice}."
        ) from None


def _dtype(config: ModelConfig, model_config: PretrainedConfig) -> torch.dtype:
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    saved = getattr(model_config, "dtype", None)
    return saved if isinstance(saved, torch.dtype) else torch.float32


def _fingerprints(location: str, model_config: PretrainedConfig) -> tuple[str, str]:
    """Of a local folder: today's fingerprint, and the one that earlier versions of rsauto wrote.

    Today's tells of contents alone, wherever they lie and whatever reads them: config.json but for
    ``_WRITTEN_BY``, and of each safetensors file the name, size, header and the blocks sampled from
    it. These are all of a file up to 16 MiB and 16 MiB of a larger one, so that a change of single
    numbers between them goes unseen; other weights do not. The earlier one is of the configuration
    as the installed transformers tells it, with its version and the path.
    """
    files = sorted(Path(location).glob("*.safetensors"))
    stated = json.loads((Path(location) / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in stated.items() if key not in _WRITTEN_BY}
    contents = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for path in files:
        contents.update(_header(path))
    former = hashlib.sha256(model_config.to_json_string(use_diff=False).encode())
    for path in files:
        name = f"{path.name} {path.stat().st_size}".encode()
        for piece in (name, *_sampled_blocks(path)):
            contents.update(piece)
            former.update(piece)
    return contents.hexdigest()[:16], former.hexdigest()[:16]


def _header(path: Path) -> bytes:
    """Names, shapes and types of a safetensors file's tensors, after 8 bytes with its length."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(min(length, path.stat().st_size))


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
    return line.rstrip(".:") + "."
