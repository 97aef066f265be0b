"""A trial in numbers that other trainers know, and what they cannot express.

A trainer that cannot express a trial exactly is refused, with the nearest that is exact: the folded
adapter, or, of AdaLoRA, the refit, which is rsLoRA with the rank pattern that AdaLoRA found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rsauto.adapters.head import head_module_names
from rsauto.adapters.lora import has_conv1d, target_module_names
from rsauto.architecture import auto_class
from rsauto.errors import InputError
from rsauto.exports.chosen import Chosen
from rsauto.records import ADALORA_METHODS, TrialRecord
from rsauto.training.schedule import warmup_steps


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a trial was trained at full length, by LoRA's own numbers."""

    chosen: Chosen
    record: TrialRecord
    model: str
    """For `from_pretrained`."""
    commit: str | None
    """Of a model from the hub."""
    dtype: str
    """Of the frozen weights."""
    rank: int
    alpha: int
    use_rslora: bool
    exact_scaling: bool
    """Whether alpha and the rule give gamma_r; else it is set by hand."""
    target_modules: tuple[str, ...]
    """Last names where those select the same layers, else full names."""
    rank_pattern: dict[str, int]
    """Full names of the modules whose rank is another than `rank`."""
    modules_to_save: tuple[str, ...]
    fan_in_fan_out: bool
    steps: int
    warmup_steps: int
    micro_batch_size: int
    gradient_accumulation: int
    eval_steps: int

    @property
    def scheduler(self) -> str:
        """In transformers' words."""
        if self.record.schedule == "constant":
            return "constant_with_warmup" if self.warmup_steps else "constant"
        return self.record.schedule

    @property
    def optimizer(self) -> str:
        """In transformers' words."""
        return {"adamw": "adamw_torch_fused"}.get(self.record.optimizer, self.record.optimizer)

    @property
    def max_grad_norm(self) -> float:
        """0 clips nothing, in transformers' words."""
        return self.record.max_grad_norm or 0.0


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """What a trainer's settings can express beside plain LoRA."""

    name: str
    lora_plus: bool = False
    lora_plus_decay: bool = False
    """Weight decay together with LoRA+."""
    rank_pattern: bool = False
    init_scale: bool = False
    any_scaling: bool = False
    """A gamma_r that no whole alpha gives."""
    classifiers: bool = False


def recipe_of(chosen: Chosen, abilities: Abilities) -> Recipe:
    """Raises InputError, every reason at once, for what the trainer cannot express."""
    record = chosen.record
    _require_lora(chosen, abilities)
    scaling = _scaling(record)
    _require_expressible(chosen, abilities, scaling is not None)
    alpha, use_rslora = scaling or (record.alpha, record.scaling_rule == "rslora")
    source = chosen.source
    import torch

    with torch.device("meta"):
        skeleton = auto_class(source.task).from_config(source.config, trust_remote_code=False)
    steps = full_steps(chosen)
    micro = _micro_batch_size(record)
    pattern = {n: r for n, r in (record.rank_pattern or {}).items() if r}
    names = list(pattern) or target_module_names(skeleton, record.target_modules)
    rank = max(pattern.values()) if pattern else record.rank
    return Recipe(
        chosen=chosen,
        record=record,
        model=chosen.location,
        commit=source.commit,
        dtype=str(source.dtype).removeprefix("torch."),
        rank=rank,
        alpha=alpha,
        use_rslora=use_rslora,
        exact_scaling=scaling is not None,
        target_modules=_short(skeleton, names),
        rank_pattern={name: r for name, r in pattern.items() if r != rank},
        modules_to_save=tuple(head_module_names(skeleton)),
        fan_in_fan_out=has_conv1d(skeleton),
        steps=steps,
        warmup_steps=warmup_steps(steps, record.warmup_share),
        micro_batch_size=micro,
        gradient_accumulation=record.batch_size // micro,
        eval_steps=max(1, steps // (record.num_evals or chosen.config.training.num_evals)),
    )


def whole_alpha(record: TrialRecord) -> tuple[int, bool] | None:
    """(alpha, use_rslora), alpha whole, with which PEFT's factor is gamma_r to the last bit.

    With the rule's own exponent it is the trial's alpha; with another one there may be none.
    """
    own = record.scaling_rule == "rslora"
    for use_rslora in (own, not own):
        divisor = math.sqrt(record.rank) if use_rslora else record.rank
        alpha = round(record.gamma_r * divisor)
        if alpha >= 1 and alpha / divisor == record.gamma_r:
            return alpha, use_rslora
    return None


def _scaling(record: TrialRecord) -> tuple[int, bool] | None:
    """As `whole_alpha`, or, where modules differ in rank, by the rule alone."""
    if record.scaling_exponent is None:
        return record.alpha, record.scaling_rule == "rslora"
    return None if record.rank_pattern else whole_alpha(record)


def _require_lora(chosen: Chosen, abilities: Abilities) -> None:
    record = chosen.record
    if record.method not in ADALORA_METHODS:
        return
    refit = chosen.refit
    number = "N (this study has none: set adalora.refit)" if refit is None else refit.number
    able = abilities.name if abilities.rank_pattern else "axolotl, or --to peft,"
    raise InputError(
        f"--to {abilities.name}: trial {record.number} was trained with {record.method}, and "
        f"{abilities.name} cannot place rank as rsauto does. Exact is the trained adapter, folded "
        f"to plain LoRA: --to lora --trial {record.number}; or the refit, its rank pattern as "
        f"rsLoRA: --to {able} --trial {number}."
    )


def _require_expressible(chosen: Chosen, abilities: Abilities, is_exact: bool) -> None:
    record = chosen.record
    problems = []
    folded = f"--to lora --trial {record.number}"
    peft = f"--to peft --trial {record.number}"
    if record.lr_ratio != 1.0 and not abilities.lora_plus:
        problems.append(f"LoRA+ (lr_ratio {record.lr_ratio:g}). Exact is {peft}, or {folded}")
    elif record.lr_ratio != 1.0 and record.weight_decay and not abilities.lora_plus_decay:
        problems.append(
            f"LoRA+ together with weight_decay {record.weight_decay:g}. Exact is {peft}, "
            f"or {folded}"
        )
    if not is_exact and not abilities.any_scaling:
        problems.append(
            f"gamma_r = {record.gamma_r:.6g} (scaling_exponent {record.scaling_exponent}), which "
            f"no whole alpha gives at rank {record.rank}. Exact is {peft}, or {folded}"
        )
    if record.init_scale is not None and not abilities.init_scale:
        problems.append(f"init_scale {record.init_scale:g}. Exact is {peft}, or {folded}")
    if record.rank_pattern and not abilities.rank_pattern:
        problems.append(
            f"ranks that differ between modules. Exact is --to axolotl, {peft}, or {folded}"
        )
    if chosen.config.data.task == "SEQ_CLS" and not abilities.classifiers:
        problems.append(f"a sequence classifier. Exact is {peft}, or {folded}")
    if problems:
        raise InputError([f"--to {abilities.name}: it cannot express {p}." for p in problems])


def full_steps(chosen: Chosen) -> int:
    """Optimizer steps of a full-length run, also of a trial that was stopped before."""
    record, training = chosen.record, chosen.config.training
    if training.steps is not None:
        return training.steps
    epochs = training.epochs or 1.0
    return max(1, math.ceil(epochs * len(chosen.data.train) / record.batch_size))


def _micro_batch_size(record: TrialRecord) -> int:
    """The trial's, or the largest below it that divides the batch, for one device."""
    most = min(record.micro_batch_size or record.batch_size, record.batch_size)
    return next(size for size in range(most, 0, -1) if record.batch_size % size == 0)


def _short(skeleton: Any, names: list[str]) -> tuple[str, ...]:
    """Last names of modules, where they select these and no other ones, else the full names."""
    last = sorted({name.rpartition(".")[2] for name in names})
    selected = {
        name
        for name, _ in skeleton.named_modules()
        if any(name == one or name.endswith(f".{one}") for one in last)
    }
    return tuple(last if selected == set(names) else names)
