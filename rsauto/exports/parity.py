"""The logits of what is exported against those of what was trained, each time.

The trained side is computed without PEFT: every adapted layer W x becomes W x + B A x, with the
factors as they were kept, and modules trained whole stand in their places. The exported side is
what stock PEFT or transformers loads from the files.

Tolerances, on the largest difference of two logits over the largest logit (at least 1):

    float32     1e-4    sums in another order
    float16     1e-2    10 bits of mantissa, in the files or in the base model
    bfloat16    5e-2    7 bits
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from rsauto.adapters.head import in_float32
from rsauto.data import TokenisedData, collate
from rsauto.errors import RsautoError
from rsauto.exports.weights import Saved

NUM_ROWS = 4
"""Validation rows, the longest first."""

TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2,
}  # fmt: skip

_PREFIX = "base_model.model."


class ParityError(RsautoError):
    """What was exported does not compute what was trained."""


@dataclass(frozen=True)
class Parity:
    """How far two models are apart on the same rows."""

    max_difference: float
    """Of two logits."""
    max_logit: float
    """The largest of the trained model, by its absolute value."""
    tolerance: float
    """As a share of the largest logit, which counts as at least 1."""
    adapter_effect: float
    """The largest change of a logit by the adapter; without one the check would be empty."""
    rows: int
    dtype: str
    """The coarsest there is among files and base model."""

    @property
    def holds(self) -> bool:
        return self.max_difference <= self.tolerance * max(1.0, self.max_logit)

    def __str__(self) -> str:
        return (
            f"largest difference of two logits {self.max_difference:.2g} on {self.rows} validation "
            f"rows, of which the adapter moves logits by up to {self.adapter_effect:.2g}; allowed "
            f"{self.tolerance * max(1.0, self.max_logit):.2g} in {self.dtype}"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "max_logit_difference": self.max_difference,
            "max_logit": self.max_logit,
            "adapter_effect": self.adapter_effect,
            "relative_tolerance": self.tolerance,
            "rows": self.rows,
            "dtype": self.dtype,
        }


@dataclass(frozen=True)
class Trained:
    """What the export is compared with."""

    logits: Tensor
    """With the adapter, see `logits_of`."""
    effect: float
    """The largest change of a logit by the adapter."""


def trained_logits(
    base: nn.Module, saved: Saved, data: TokenisedData, device: torch.device
) -> Trained:
    """Of the base model with the saved adapter, which is taken off again."""
    untouched = logits_of(base, data, device)
    with with_factors(base, saved):
        logits = logits_of(base, data, device)
    return Trained(logits, float((logits - untouched).abs().max()))


def compare(trained: Trained, exported: Tensor, *dtypes: torch.dtype, rows: int) -> Parity:
    """Raises ParityError where the logits are further apart than the coarsest dtype explains."""
    coarsest = max(dtypes, key=lambda dtype: TOLERANCES[dtype])
    difference = (trained.logits - exported).abs().max()
    found = Parity(
        # A difference that is no number is none that is small.
        max_difference=float(torch.nan_to_num(difference, nan=torch.inf)),
        max_logit=float(trained.logits.abs().max()),
        tolerance=TOLERANCES[coarsest],
        adapter_effect=trained.effect,
        rows=rows,
        dtype=str(coarsest).removeprefix("torch."),
    )
    if not found.holds:
        raise ParityError(
            f"The export does not compute what was trained: {found}. Nothing was written. This is "
            "an error in rsauto or in a library; please report it with the versions installed."
        )
    return found


@torch.no_grad()
def logits_of(model: nn.Module, data: TokenisedData, device: torch.device) -> Tensor:
    """Logits of the longest validation rows, float32 on the CPU, those of padding zero.

    (rows, tokens, vocabulary), or (rows, classes).
    """
    examples = sorted(data.validation, key=lambda example: -len(example.input_ids))[:NUM_ROWS]
    batch = collate(examples, data.pad_token_id).to(device)
    was_training = model.training
    model.eval()
    logits: Tensor = model(**batch.inputs()).logits.float()
    model.train(was_training)
    if logits.dim() == 3:
        logits = logits * batch.attention_mask[..., None]
    return logits.cpu()


def num_rows(data: TokenisedData) -> int:
    return min(NUM_ROWS, len(data.validation))


@contextmanager
def with_factors(model: nn.Module, saved: Saved) -> Iterator[nn.Module]:
    """The base model with the saved adapter, by hooks alone; it is as it was afterwards."""
    hooks = [
        model.get_submodule(name).register_forward_hook(_plus(a, b))
        for name, (a, b) in saved.factors.items()
    ]
    before = _swapped(model, {n.removeprefix(_PREFIX): t for n, t in saved.others.items()})
    # A module that was trained whole computed in float32, whatever the base model does.
    hooks += [
        model.get_submodule(name).register_forward_pre_hook(in_float32, with_kwargs=True)
        for name in saved.config.modules_to_save or ()
    ]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()
        _swapped(model, before)


def _plus(a: Tensor, b: Tensor) -> Any:
    """Adds B A x to a layer's output. In float32, and then in the dtype of the layer."""

    def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0].float()
        low_rank = (x @ a.to(x.device).T) @ b.to(x.device).T
        summed: Tensor = output.float() + low_rank
        return summed.to(output.dtype)

    return hook


def _swapped(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Puts tensors in the places of parameters; returns what was there."""
    before: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parameter = model.get_parameter(name)
        before[name] = parameter.data
        parameter.data = tensor.to(parameter.device)
    return before


def adapter_logits(
    base: nn.Module, folder: str, data: TokenisedData, device: torch.device
) -> Tensor:
    """Logits of the base model with an adapter loaded by PEFT, which stays on it."""
    return logits_of(put_on(base, folder).to(device), data, device)


def put_on(base: nn.Module, folder: str) -> PeftModel:
    """The adapter as PEFT loads it."""
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5 for a property by its old name, and takes the lists of
        # booleans of its own AdaLoRA for LoRA's patterns.
        for message in (".*is_gradient_checkpointing", ".*rank_pattern keys did not match"):
            warnings.filterwarnings("ignore", message=message, append=False)
        adapted: PeftModel = PeftModel.from_pretrained(base, folder)
    return adapted
