"""An adapter of ours as PEFT's own AdaLoRA, which loads where rsauto is not installed.

PEFT multiplies by lora_alpha / (init_r + 1e-5), so ``lora_alpha`` is written as what makes that our
gamma_r. Its files hold the active triplets only, with a list of booleans a module.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft import AdaLoraConfig, LoraConfig, PeftModel
from torch import Tensor

from rsauto.adalora.config import RsAdaLoraConfig
from rsauto.adalora.importance import RANK_DIM
from rsauto.adalora.layer import SvdLayer, svd_layers
from rsauto.adapters.export import (
    Exported,
    other_tensors,
    warn_where_ranks_are_not_final,
    whole_modules,
    write_adapter,
)
from rsauto.adapters.lora import ADAPTER_NAME, short_target_names

_EPSILON = 1e-5
"""What PEFT adds to the initial rank before it divides by it."""


def export_adalora(
    model: PeftModel, folder: Path | str, *, adapter_name: str = ADAPTER_NAME, card: str = ""
) -> Exported:
    """Writes an adapter of `RsAdaLoraConfig` in the format of PEFT's AdaLoRA, all or nothing.

    PEFT cannot load pruned AdaLoRA adapters with low_cpu_mem_usage, nor call them with labels
    while they are not trained; `export_lora` has no such limits. Raises ValueError for other
    adapters.
    """
    trained = model.peft_config.get(adapter_name)
    if not isinstance(trained, RsAdaLoraConfig):
        raise ValueError(
            f"adapter_name: {adapter_name!r} is not an adapter of RsAdaLoraConfig. Plain LoRA "
            "leaves through export_lora."
        )
    warn_where_ranks_are_not_final(model, adapter_name)
    layers = {n: m for n, m in svd_layers(model.get_base_model()) if adapter_name in m.triplets}
    ranks = {name: layer.triplets[adapter_name].active_rank for name, layer in layers.items()}
    r_max = max(1, *ranks.values())
    gamma = trained.gamma_r(trained.target_r)
    config = stock_config(trained, ranks, gamma, min(trained.target_r, r_max))
    config.modules_to_save = whole_modules(model, adapter_name) or None
    config.target_modules = short_target_names(model, ranks)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors |= _active_factors(name, layer, adapter_name, gamma)
    tensors |= other_tensors(model, adapter_name, ranks)
    return Exported(write_adapter(Path(folder), tensors, config, card), ranks)


def stock_config(
    trained: LoraConfig, ranks: Mapping[str, int], gamma: float, target_rank: int
) -> AdaLoraConfig:
    """PEFT's configuration of active triplets alone, ``ranks`` of them in each module.

    What ``trained`` says of the model is kept; layers and modules trained whole are still to name.
    """
    r_max = max(1, *ranks.values())
    config = AdaLoraConfig(
        init_r=r_max,
        target_r=target_rank,
        lora_alpha=gamma * (r_max + _EPSILON),  # type: ignore[arg-type]  # PEFT takes floats
        # PEFT asks for a schedule, also of adapters that are never trained again.
        total_step=1,
        fan_in_fan_out=trained.fan_in_fan_out,
        bias=trained.bias,
        task_type=trained.task_type,
        base_model_name_or_path=trained.base_model_name_or_path,
        inference_mode=True,
    )
    config.rank_pattern = {
        f"{name}.lora_E": [index < rank for index in range(r_max)] for name, rank in ranks.items()
    }
    return config


def _active_factors(
    name: str, layer: SvdLayer, adapter_name: str, gamma: float
) -> dict[str, Tensor]:
    """The active triplets, float32, in PEFT's naming.

    PEFT has one factor for all modules, so what a module's own differs by (scale_rank: live) goes
    into its lambdas.
    """
    index = layer.triplets[adapter_name].mask.nonzero().flatten()
    tensors = {}
    for factor, parameter in layer.factors(adapter_name).items():
        kept = parameter.detach().float()
        kept = kept.index_select(RANK_DIM[factor], index.to(kept.device))
        if factor == "E":
            kept = kept * (layer.scaling[adapter_name] / gamma)
        tensors[f"base_model.model.{name}.lora_{factor}"] = kept.cpu().contiguous()
    return tensors
