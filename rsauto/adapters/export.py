"""Every adapter leaves as plain LoRA with scale 1, which every server reads alike.

Servers disagree on `use_rslora` and on rank patterns; alpha = r in every module, with gamma_r
folded into the factors, leaves them nothing to disagree on, and keeps the logits. AdaLoRA leaves
in the same form: gamma_r lambda is folded in, only active triplets are written, and modules that
kept none are not adapted at all.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from torch.nn import functional as F

from rsauto.adalora.layer import SvdLayer, svd_layers
from rsauto.adapters.lora import ADAPTER_NAME, short_target_names
from rsauto.adapters.sealed import sealed
from rsauto.atomic import beside, clear_leftovers, naming, put_in_place, write_bytes

Folded = dict[str, tuple[Tensor, Tensor]]
"""Name of a module to (A, B), (r x d_in) and (d_out x r) in float32: Delta W = B A."""


@dataclass(frozen=True, slots=True)
class Exported:
    """An adapter as it was written."""

    num_bytes: int
    """Of its weights."""
    rank_pattern: dict[str, int]
    """Rank of every adapted module."""

    @property
    def r_max(self) -> int:
        """The largest rank, which a server must allow (vLLM: max_lora_rank)."""
        return max(self.rank_pattern.values())


def export_lora(
    model: PeftModel,
    folder: Path | str,
    *,
    padded: bool = False,
    adapter_name: str = ADAPTER_NAME,
    base_name: str | None = None,
    card: str = "",
) -> Exported:
    """Writes a LoRA or AdaLoRA adapter as PEFT LoRA of scale 1, all or nothing.

    Where modules have different ranks each is written with its own, or, ``padded``, all with the
    largest one, filled up with zeros, for loaders that know only one rank. ``card`` becomes
    README.md; ``base_name`` the base model's name, where it is another than the adapter has.

    Raises ValueError for an adapter that is not there, or that has no active rank at all.
    """
    folded = folded_factors(model, adapter_name)
    if not folded:
        raise ValueError(
            f"adapter_name: {adapter_name!r} has nothing to write; the model has "
            f"{', '.join(map(repr, model.peft_config))}."
        )
    warn_where_ranks_are_not_final(model, adapter_name)
    if padded:
        folded = padded_factors(folded)
    tensors = {**lora_tensors(folded), **other_tensors(model, adapter_name, folded)}
    config = _plain_config(model, folded, adapter_name)
    if base_name is not None:
        config.base_model_name_or_path = base_name
    num_bytes = write_adapter(Path(folder), tensors, config, card)
    return Exported(num_bytes, {name: len(a) for name, (a, _) in folded.items()})


def warn_where_ranks_are_not_final(model: PeftModel, adapter_name: str) -> None:
    """Of AdaLoRA in the middle of its schedule, which has more rank than was asked for."""
    layers = [layer for _, layer in svd_layers(model) if adapter_name in layer.triplets]
    states = [layer.triplets[adapter_name] for layer in layers]
    active = sum(state.active_rank for state in states)
    target = sum(state.config.target_r for state in states)
    if active > target:
        warnings.warn(
            f"The ranks are not final: {active} triplets are active, and {target} will be at the "
            "end of the schedule.",
            stacklevel=3,
        )


def write_adapter(
    folder: Path, tensors: dict[str, Tensor], config: PeftConfig, card: str = ""
) -> int:
    """Writes an adapter's folder, all or nothing; returns the size of its weights in bytes."""
    clear_leftovers(folder)
    partial = beside(folder, "partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        weights = partial / "adapter_model.safetensors"
        # Serialised first and written by us: a full disk is then an OSError like any other.
        write_bytes(weights, sealed(tensors))
        with naming(folder):
            config.save_pretrained(str(partial))
            if card:
                (partial / "README.md").write_text(card, encoding="utf-8")
            num_bytes = weights.stat().st_size
            put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return num_bytes


def folded_factors(adapted: PeftModel, adapter_name: str = ADAPTER_NAME) -> Folded:
    """The adapter with everything that multiplies it folded in, module by module.

    In float32, also where it was trained in bfloat16, which would round the products. Modules
    without an active triplet are left out.
    """
    folded: Folded = {}
    for name, layer in adapted.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
            continue
        if isinstance(layer, SvdLayer):
            if layer.triplets[adapter_name].active_rank:
                folded[name] = _folded_svd(layer, adapter_name)
        else:
            a = layer.lora_A[adapter_name].get_parameter("weight")
            b = layer.lora_B[adapter_name].get_parameter("weight")
            folded[name] = (a.float(), b.float() * layer.scaling[adapter_name])
    return {name: (_plain(a), _plain(b)) for name, (a, b) in folded.items()}


def _folded_svd(layer: SvdLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """The active triplets, gamma_r lambda shared evenly by the two factors.

    Evenly, because a file in half precision rounds least when neither is much larger.
    """
    keep = layer.triplets[adapter_name].mask.nonzero().flatten()
    factors = {name: p.detach().float() for name, p in layer.factors(adapter_name).items()}
    keep = keep.to(factors["E"].device)
    values = factors["E"].flatten().index_select(0, keep) * layer.scaling[adapter_name]
    root = values.abs().sqrt()
    a = factors["A"].index_select(0, keep) * root[:, None]
    b = factors["B"].index_select(1, keep) * (root * values.sign())
    return a, b


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def padded_factors(folded: Folded) -> Folded:
    """All modules at the largest rank; zeros change nothing."""
    r_max = max(len(a) for a, _ in folded.values())
    return {
        name: (F.pad(a, (0, 0, 0, r_max - len(a))), F.pad(b, (0, r_max - len(a))))
        for name, (a, b) in folded.items()
    }


def lora_tensors(folded: Folded) -> dict[str, Tensor]:
    """In PEFT's naming."""
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in folded.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    return tensors


def other_tensors(
    adapted: PeftModel, adapter_name: str, kept: Collection[str]
) -> dict[str, Tensor]:
    """What was trained beside the factors, a classifier's head or biases, as PEFT saves it.

    A layer that is not one of ``kept`` will have no adapter around it, so its bias is the layer's.
    """
    saved = get_peft_model_state_dict(adapted, adapter_name=adapter_name)
    found = {}
    for name, tensor in saved.items():
        if ".lora_" in name:
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".base_layer.bias")
        key = name if module in kept else name.replace(".base_layer.bias", ".bias")
        found[key] = _plain(tensor.float())
    return found


def whole_modules(adapted: PeftModel, adapter_name: str) -> list[str]:
    """Names of the modules that were trained whole, such as a classifier's head."""
    return [
        name
        for name, module in adapted.get_base_model().named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
    ]


def _plain_config(adapted: PeftModel, folded: Folded, adapter_name: str) -> LoraConfig:
    trained = adapted.peft_config[adapter_name]
    assert isinstance(trained, LoraConfig)
    ranks = {name: len(a) for name, (a, _) in folded.items()}
    r_max = max(ranks.values())
    pattern = {name: rank for name, rank in ranks.items() if rank != r_max}
    plain = LoraConfig(
        r=r_max,
        lora_alpha=r_max,
        use_rslora=False,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        fan_in_fan_out=trained.fan_in_fan_out,
        lora_dropout=0.0,
        bias=trained.bias,
        task_type=trained.task_type,
        base_model_name_or_path=trained.base_model_name_or_path,
        inference_mode=True,
    )
    plain.modules_to_save = whole_modules(adapted, adapter_name) or None
    # Given to the constructor it would become a set, and be written in another order every time.
    plain.target_modules = short_target_names(adapted, ranks)
    return plain
