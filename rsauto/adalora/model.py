"""`RsAdaLoraModel`: AdaLoRA on rsLoRA as a tuner of PEFT.

    from rsauto import RsAdaLoraConfig
    model = get_peft_model(base, RsAdaLoraConfig(target_r=8, init_r=12, total_step=1000, ...))
    ...
    loss.backward()
    optimizer.step()
    model.base_model.update_and_allocate(step, optimizer)    # step from 1
    optimizer.zero_grad()

`save_pretrained` writes the allocation's state with the tensors, so that training can go on from a
checkpoint as if it had not stopped; `from_pretrained` for inference drops inactive triplets.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rsauto.adalora.allocator import RankAllocator
from rsauto.adalora.config import RsAdaLoraConfig, register
from rsauto.adalora.layer import SvdLayer, SvdLinear, svd_layers
from rsauto.adalora.saved import factor_tensors, pop_saved, saved_tensors
from rsauto.adalora.stepping import follow_optimizers


class RsAdaLoraModel(LoraModel):
    """Holds the adapted base model; at most one of its adapters is trained."""

    tuner_layer_cls: Any = SvdLayer

    def __init__(self, model: nn.Module, config: Any, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(model, config, adapter_name, **kwargs)
        follow_optimizers(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        follow_optimizers(self)  # a copy is another model

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        trained = [name for name, one in self.peft_config.items() if not one.inference_mode]
        if len(trained) > 1:
            raise ValueError(
                f"AdaLoRA trains one adapter at a time, but {', '.join(trained)} would all be "
                "trained. Load the others with is_trainable=False."
            )

    def _create_and_replace(  # type: ignore[override]  # as PEFT's own LoraModel has it
        self,
        lora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        config: RsAdaLoraConfig = lora_config
        self._allocators.pop(adapter_name, None)
        rank = config.init_r
        if config.recovery == "none" and config.inference_mode:
            # What was saved has no more than was kept; not to be used for a new run.
            rank = (config.rank_pattern or {}).get(current_key, rank)
        if isinstance(target, SvdLayer):
            target.update_layer(adapter_name, rank, config.lora_alpha, config=config)
            return
        layer = _layer_class(target, current_key)(target, adapter_name, config, rank)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        replace_module: Callable[..., None] = self._replace_module
        replace_module(parent, target_name, layer, target)

    # ------------------------------------------------------------------------- training

    @property
    def trained_adapter(self) -> str:
        """Name of the adapter that is trained. Raises ValueError where none is."""
        trained = self._trained_adapters()
        if not trained:
            raise ValueError("No adapter is trained: all were loaded for inference (is_trainable).")
        return trained[0]

    def allocator(self, adapter_name: str | None = None) -> RankAllocator:
        """The rank allocator of an adapter, of the trained one unless told otherwise."""
        name = adapter_name or self.trained_adapter
        known = self._allocators
        if name not in known:
            known[name] = RankAllocator.of(self.model, name)
        return known[name]

    @property
    def _allocators(self) -> dict[str, RankAllocator]:
        """Made when they are first asked for, because finding the layers takes time."""
        found: dict[str, RankAllocator] = self.__dict__.setdefault("_allocators_by_adapter", {})
        return found

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes the adapter and what its allocation knows."""
        super().delete_adapter(adapter_name)
        self._allocators.pop(adapter_name, None)

    def config_of(self, adapter_name: str) -> RsAdaLoraConfig:
        """The configuration of an adapter."""
        config = self.peft_config[adapter_name]
        assert isinstance(config, RsAdaLoraConfig)
        return config

    def update_and_allocate(self, global_step: int, optimizer: Any = None) -> None:
        """See `RankAllocator.update_and_allocate`."""
        self.allocator().update_and_allocate(global_step, optimizer)

    def set_total_step(self, total_step: int) -> None:
        """Sets the number of optimizer steps of the whole run, before its first.

        Raises ValueError where tinit and tfinal leave no step to allocate ranks in.
        """
        config = self.config_of(self.trained_adapter)
        before, config.total_step = config.total_step, total_step
        try:
            config.schedule(num_modules=1)
        except ValueError:
            config.total_step = before
            raise

    def rank_pattern(self, adapter_name: str | None = None) -> dict[str, int]:
        """Active triplets of every module, of the trained adapter unless told otherwise."""
        names = [adapter_name] if adapter_name else [*self._trained_adapters(), *self.peft_config]
        return self.allocator(str(names[0])).rank_pattern

    def before_step(self, stepped: set[int], loss_scale: Any) -> None:
        """See `RankAllocator.before_step`; called by the optimizer."""
        if not self._is_stepped(stepped):
            return
        for name in self._trained_adapters():
            self.allocator(name).before_step(stepped, loss_scale)

    def after_step(self, stepped: set[int], found_inf: Any) -> None:
        """See `RankAllocator.after_step`; called by the optimizer."""
        if not self._is_stepped(stepped):
            return
        for name in self._trained_adapters():
            self.allocator(name).after_step(stepped, found_inf)

    def _is_stepped(self, stepped: set[int]) -> bool:
        return any(id(parameter) in stepped for parameter in self.parameters())

    def _trained_adapters(self) -> list[str]:
        return [str(n) for n, config in self.peft_config.items() if not config.inference_mode]

    # ------------------------------------------------------------------------- saving, loading

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        inherited: Callable[..., dict[str, Tensor]] = super()._get_adapter_state_dict
        tensors = inherited(model, config, adapter_name, state_dict, unwanted_adapter_names)
        layers = {n: m for n, m in svd_layers(model) if adapter_name in m.triplets}
        _warn_where_ranks_were_never_allocated(layers, adapter_name)
        config.rank_pattern = {
            name.removeprefix("base_model.model."): layer.triplets[adapter_name].active_rank
            for name, layer in layers.items()
        }
        inside = tuple(f"{name}." for name in layers)
        others = {
            key: tensor
            for key, tensor in tensors.items()
            if not (key.startswith(inside) and ".lora_" in key)  # trained biases stay
        }
        factors = factor_tensors(layers, adapter_name, state_dict)
        return {**others, **factors, **saved_tensors(layers, adapter_name)}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        layers = {n: m for n, m in svd_layers(model) if adapter_name in m.triplets}
        tensors = pop_saved(layers, adapter_name, state_dict, drop_inactive=config.inference_mode)
        inherited: Callable[..., dict[str, Tensor]] = super()._remap_adapter_state_dict_for_load
        return inherited(model, config, adapter_name, tensors)

    def add_weighted_adapter(self, *_args: Any, **_kwargs: Any) -> None:
        """Not defined for triplets."""
        raise TypeError("add_weighted_adapter: export the adapters as plain LoRA, and weigh those.")


def rank_allocator(model: nn.Module, adapter_name: str = "default") -> RankAllocator:
    """The allocator of an adapter on any model.

    Of a model that an adapter was injected into (transformers' ``add_adapter``), which PEFT leaves
    without a tuner: from now on, and for as long as what is returned is kept, P and Q are also kept
    near orthogonal. Raises ValueError where no layer has the adapter.
    """
    tuner = getattr(model, "base_model", None)
    if isinstance(tuner, RsAdaLoraModel):
        return tuner.allocator(adapter_name)
    allocator = RankAllocator.of(model, adapter_name)
    follow_optimizers(allocator)
    return allocator


def _warn_where_ranks_were_never_allocated(layers: dict[str, SvdLayer], adapter_name: str) -> None:
    states = [layer.triplets[adapter_name] for layer in layers.values()]
    untouched = all(s.importance is not None and not s.importance.sensitivity for s in states)
    trained = any(bool(layer.lora_E[adapter_name].any()) for layer in layers.values())
    learns = any(layer.lora_E[adapter_name].requires_grad for layer in layers.values())
    if untouched and trained and learns:
        warnings.warn(
            "update_and_allocate was never called, so every module keeps its initial rank. Call it "
            "after every optimizer step (transformers' Trainer: add RsAdaLoraCallback).",
            stacklevel=2,
        )


def _layer_class(target: nn.Module, name: str) -> type[SvdLayer]:
    """Raises ValueError for a layer that is not linear."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if is_bnb_available() and is_bnb_4bit_available():
        from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

        from rsauto.adalora.quantised import SvdLinear4bit, SvdLinear8bitLt

        if isinstance(base, Linear8bitLt):
            return SvdLinear8bitLt
        if isinstance(base, Linear4bit):
            return SvdLinear4bit
    if isinstance(base, (nn.Linear, Conv1D)):
        return SvdLinear
    raise ValueError(
        f"target_modules: {name!r} is of type {type(base).__name__}. AdaLoRA adapts nn.Linear, "
        "Conv1D and bitsandbytes' linear layers."
    )


register(RsAdaLoraModel)
