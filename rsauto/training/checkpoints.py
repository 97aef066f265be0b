"""A trial between two steps, kept so that another process goes on exactly where it was.

    adapter.safetensors      trained parameters by name, and AdaLoRA's masks and smoothed scores
    optimizer.safetensors    the optimizer's moments, <parameter>|<name of the moment>
    progress.json            steps done, the curve so far, and what of the moments is no tensor

That is all there is to keep: schedule and data order follow from the spec and the number of steps,
and nothing is drawn at random after the first step, because the base model's dropout is off and
adapters have none. Written as tensors and JSON, never pickled: reading one runs no code.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.optim import Optimizer

from rsauto.adalora.layer import svd_layers
from rsauto.adalora.saved import pop_saved, saved_tensors
from rsauto.adapters.lora import ADAPTER_NAME, trainable_parameters
from rsauto.atomic import write_bytes, write_text
from rsauto.records import ActivationMoments, EvalPoint, LogPoint, StepPoint

KEPT = 2
"""Checkpoints that are kept: the last one, and one in case the disk has lost it."""

_WEIGHTS, _MOMENTS, _PROGRESS = "adapter.safetensors", "optimizer.safetensors", "progress.json"
_VERSION = 1


class OtherAdapterError(ValueError):
    """A checkpoint is of another adapter than the one it was to go on with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a trial is, in plain numbers."""

    started_at: str | None = None
    last: StepPoint | None = None
    """None before the first step."""
    since_evaluation: tuple[StepPoint, ...] = ()
    """Steps whose means the next point of the curve has."""
    curve: tuple[EvalPoint, ...] = ()
    log: tuple[LogPoint, ...] = ()
    since_log: tuple[StepPoint, ...] = ()
    """Steps whose means the next point of the log has."""
    moments: tuple[ActivationMoments, ...] = ()
    train_seconds: float = 0.0
    flops: float = 0.0
    measured_peak_bytes: int | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        fixed = {
            "last": None if data["last"] is None else _step_point(data["last"]),
            "since_evaluation": tuple(map(_step_point, data["since_evaluation"])),
            "curve": tuple(EvalPoint(**point) for point in data["curve"]),
            "log": tuple(LogPoint(**point) for point in data.get("log", ())),
            "since_log": tuple(map(_step_point, data.get("since_log", ()))),
            "moments": tuple(ActivationMoments(**point) for point in data.get("moments", ())),
        }
        return cls(**{**data, **fixed})


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A trial between two steps."""

    progress: Progress
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    """By parameter and name of the moment."""
    plain_moments: dict[str, Any]
    """Those that are no tensors, such as Adafactor's step."""

    @property
    def step(self) -> int:
        """Steps done."""
        return 0 if self.progress.last is None else self.progress.last.step


def snapshot(adapted: PeftModel, optimizer: Optimizer, progress: Progress) -> Snapshot:
    """The trial as it is. Tensors are copied to the CPU where they are elsewhere, else shared."""
    layers = dict(svd_layers(adapted))
    weights = {**trainable_parameters(adapted), **saved_tensors(layers, ADAPTER_NAME)}
    moments: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for key, value in _moments(adapted, optimizer):
        if isinstance(value, Tensor):
            moments[key] = _on_cpu(value)
        else:
            plain[key] = value
    return Snapshot(
        progress=progress,
        weights={name: _on_cpu(tensor) for name, tensor in weights.items()},
        moments=moments,
        plain_moments=plain,
    )


def restore(adapted: PeftModel, kept: Snapshot) -> None:
    """Puts weights and AdaLoRA's allocation into a fresh adapter of the same spec.

    Before its optimizer is built: parameters may take other shapes. Raises OtherAdapterError.
    """
    layers = dict(svd_layers(adapted))
    suffix = f".{ADAPTER_NAME}"
    names = {name.removesuffix(suffix) if ".lora_" in name else name: name for name in kept.weights}
    short = {name: kept.weights[full] for name, full in names.items()}
    left = pop_saved(layers, ADAPTER_NAME, short, drop_inactive=False)
    found = {names[name]: tensor for name, tensor in left.items()}
    parameters = trainable_parameters(adapted)
    if found.keys() != parameters.keys():
        raise OtherAdapterError("the checkpoint's parameters are not those of this adapter")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != found[name].shape:
                raise OtherAdapterError(
                    f"{name} is {tuple(parameter.shape)}, in the checkpoint "
                    f"{tuple(found[name].shape)}"
                )
            parameter.copy_(found[name])


def restore_moments(adapted: PeftModel, optimizer: Optimizer, kept: Snapshot) -> None:
    """Puts the moments into a fresh optimizer over the restored parameters.

    Not by the optimizer's own `load_state_dict`, which rounds float32 moments of bfloat16
    parameters. Raises OtherAdapterError.
    """
    parameters = trainable_parameters(adapted)
    for key, value in {**kept.moments, **kept.plain_moments}.items():
        name, _, moment = key.partition("|")
        if name not in parameters:
            raise OtherAdapterError(f"the checkpoint has moments of {name}, which is not trained")
        parameter = parameters[name]
        if isinstance(value, Tensor):
            value = value.to(parameter.device, copy=True)
        optimizer.state[parameter][moment] = value


def write_checkpoint(folder: Path, kept: Snapshot) -> Path:
    """Writes ``folder``/step-<steps done>, all or nothing, and removes all but the last `KEPT`.

    Raises OSError when the disk refuses; what was there before is then untouched.
    """
    path = folder / f"step-{kept.step:08d}"
    partial = folder / f".{path.name}.{os.getpid()}.partial"
    for leftover in folder.glob(".step-*.partial"):  # of a killed process; the folder is locked
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_bytes(partial / _WEIGHTS, save(kept.weights))
        write_bytes(partial / _MOMENTS, save(kept.moments))
        values = {
            "version": _VERSION,
            "progress": dataclasses.asdict(kept.progress),
            "plain_moments": kept.plain_moments,
        }
        write_text(partial / _PROGRESS, json.dumps(values) + "\n")
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, the last one last."""
    return sorted(folder.glob("step-*"))


def read_checkpoint(path: Path) -> Snapshot:
    """Raises ValueError that says what is wrong with it."""
    try:
        values = json.loads((path / _PROGRESS).read_text(encoding="utf-8"))
        if values["version"] != _VERSION:
            raise ValueError(f"it is of another version of rsauto ({values['version']})")
        return Snapshot(
            progress=Progress.from_json(values["progress"]),
            weights=load_file(path / _WEIGHTS),
            moments=load_file(path / _MOMENTS),
            plain_moments=values["plain_moments"],
        )
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError
    ) as error:  # fmt: skip
        raise ValueError(f"{path} cannot be read: {error}") from error


def _moments(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Any]]:
    for name, parameter in trainable_parameters(model).items():
        state: Mapping[str, Any] = optimizer.state.get(parameter, {})
        for moment, value in state.items():
            yield f"{name}|{moment}", value


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _step_point(data: dict[str, Any]) -> StepPoint:
    evaluation = data["evaluation"]
    return StepPoint(
        **{**data, "evaluation": None if evaluation is None else EvalPoint(**evaluation)}
    )
