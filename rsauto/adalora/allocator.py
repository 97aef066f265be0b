"""The rank allocator: after every optimizer step it decides which triplets are active.

With ``recovery: paper`` the lambdas of all others are zero after every step, but P and Q stay and
go on being scored, so a triplet can come back. (The optimizer moves a masked lambda; what it would
become is scored before it is set to zero again.) With ``recovery: none`` they are gone for good.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rsauto.adalora.budget import keep_best
from rsauto.adalora.compaction import compact, require_compactable, require_owner
from rsauto.adalora.config import RsAdaLoraConfig
from rsauto.adalora.importance import RANK_DIM, SCORED, Factor
from rsauto.adalora.layer import SvdLayer, Triplets, svd_layers
from rsauto.adalora.orthogonality import add_gradients


class RankAllocator:
    """Places the rank of one adapter. Its state lives in the layers, so it can be made anew."""

    def __init__(
        self, layers: Mapping[str, SvdLayer], config: RsAdaLoraConfig, adapter_name: str = "default"
    ) -> None:
        """``layers`` are the adapted layers by name, in model order."""
        self.layers = layers
        self.config = config
        self.adapter_name = adapter_name
        self.num_skipped = 0
        """Steps whose gradients were not finite; they say nothing about importance."""
        self.has_buckets = True
        """Whether gradients of several processes lie in buckets, as in DistributedDataParallel."""
        self._is_checked = False

    @classmethod
    def of(cls, model: nn.Module, adapter_name: str = "default") -> RankAllocator:
        """The allocator of an adapter on any model. Raises ValueError where no layer has it."""
        layers = {n: layer for n, layer in svd_layers(model) if adapter_name in layer.triplets}
        if not layers:
            raise ValueError(f"adapter {adapter_name!r}: no layer has it, so there is no rank.")
        config = next(iter(layers.values())).triplets[adapter_name].config
        return cls(layers, config, adapter_name)

    def update_and_allocate(self, step: int, optimizer: Any = None) -> None:
        """Call after ``optimizer.step()`` and before ``zero_grad()``.

        ``step`` counts the steps done, this one included; counted from 0, as in PEFT's example, all
        comes a step later. From ``total_step - tfinal`` on the pattern is fixed. ``optimizer`` is
        needed for ``recovery: none``. Raises ValueError without it, for one that does not train the
        factors, and where the schedule is not known.
        """
        if step < 0:
            raise ValueError(f"step: {step} must be the number of optimizer steps done, from 1.")
        schedule = self.config.schedule(len(self.layers))
        if not self.finished:
            self._require_room(_unwrapped(optimizer))
            if step < schedule.final_step:
                self._gather_if_finite()
            if step >= schedule.final_step or schedule.allocates(step):
                self._allocate(schedule.budget(step), _unwrapped(optimizer))
            if step >= schedule.final_step:
                for state in self._states():
                    state.importance = None
        self.hold()

    def before_step(self, stepped: set[int], loss_scale: Any) -> None:
        """Adds the orthogonality's gradient to the factors that are about to be stepped."""
        config = self.config
        if config.orth_reg_weight == 0:
            return
        factors = self.regularised()
        share = config.orth_reg_weight
        if config.orth_reg_form == "norm":
            share /= len(factors)
        add_gradients(
            (one for one in factors if id(one[0]) in stepped),
            share=share,
            form=config.orth_reg_form,
            loss_scale=loss_scale,
        )

    def after_step(self, stepped: set[int], found_inf: Any) -> None:
        """Keeps a fixed pattern, also where nobody calls `update_and_allocate` any more."""
        if self.finished:
            self.hold()
        elif found_inf is not None:
            # The step was left out, and its gradients are still scaled: they say nothing.
            factors = [p for _, p in self.factors() if id(p) in stepped]
            for gradient in [p.grad for p in factors if p.grad is not None]:
                gradient.mul_(torch.where(found_inf > 0, torch.nan, 1.0).to(gradient))

    def hold(self) -> None:
        """Sets the lambdas of all triplets that are not active to zero."""
        for layer in self.layers.values():
            layer.hold(self.adapter_name)

    @property
    def finished(self) -> bool:
        """Whether the pattern is fixed."""
        return all(state.importance is None for state in self._states())

    @property
    def rank_pattern(self) -> dict[str, int]:
        """Active triplets of every module; all of the initial rank before the first allocation."""
        active = {name: layer.triplets[self.adapter_name] for name, layer in self.layers.items()}
        return {name: state.active_rank for name, state in active.items()}

    def gather(self) -> None:
        """Takes this step's gradients into the importance of every triplet."""
        for layer in self.layers.values():
            factors = layer.factors(self.adapter_name)
            scored = {name: factors[name] for name in SCORED[self.config.score]}
            # A module that took no part in the step has a gradient of zero.
            gradients = {
                name: torch.zeros_like(p) if p.grad is None else p.grad
                for name, p in scored.items()
            }
            importance = layer.triplets[self.adapter_name].importance
            assert importance is not None, "importance is gathered until the pattern is fixed"
            importance.update(scored, gradients, self.config.beta1, self.config.beta2)

    def tensors(self) -> Iterator[Tensor]:
        """What the allocation keeps from step to step."""
        for state in self._states():
            if state.importance is not None:
                yield from state.importance.tensors()

    def factors(self) -> Iterator[tuple[Factor, nn.Parameter]]:
        """Every factor of every layer."""
        for layer in self.layers.values():
            yield from layer.factors(self.adapter_name).items()

    def regularised(self) -> list[tuple[nn.Parameter, int]]:
        """P and Q of every layer, each with the dimension its triplets lie along."""
        return [(p, RANK_DIM[name]) for name, p in self.factors() if name != "E"]

    def _states(self) -> list[Triplets]:
        return [layer.triplets[self.adapter_name] for layer in self.layers.values()]

    def _gather_if_finite(self) -> None:
        gradients = [p.grad for _, p in self.factors() if p.grad is not None]
        if not gradients:
            raise ValueError(
                "update_and_allocate found no gradients. Call it after optimizer.step() and before "
                "optimizer.zero_grad()."
            )
        norms = torch._foreach_norm(gradients, dtype=torch.float32)
        if torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite().all():
            self.gather()
        else:
            self.num_skipped += 1

    def _require_room(self, optimizer: Any) -> None:
        """At the first step, not at the first pruning, which may be hours later."""
        if self.config.recovery == "none" and not self._is_checked:
            require_compactable(self.factors(), optimizer, self.has_buckets)
            self._is_checked = True

    def _allocate(self, budget: int, optimizer: Optimizer | None) -> None:
        freed = self.config.recovery == "none"
        if freed:
            require_compactable(self.factors(), optimizer, self.has_buckets)
            require_owner(self.factors(), optimizer)
        scores = [self._score(layer) for layer in self.layers.values()]
        active = [state.mask for state in self._states()]
        # After triplets are gone for good there may be fewer than a budget asks for.
        budget = min(budget, sum(map(len, scores)))
        masks = keep_best(scores, active, budget)
        # One transfer for all modules.
        counts = torch.stack([mask.sum() for mask in masks]).tolist()
        for layer, mask, count in zip(self.layers.values(), masks, counts, strict=True):
            if not freed:
                layer.activate(self.adapter_name, mask, int(count))
            elif count < len(mask):
                assert optimizer is not None
                compact(layer, self.adapter_name, mask, optimizer)

    def _score(self, layer: SvdLayer) -> Tensor:
        """Importance of a layer's triplets, all the same where no gradient was ever seen."""
        importance = layer.triplets[self.adapter_name].importance
        if importance is None or not importance.sensitivity:
            values = layer.lora_E[self.adapter_name]
            return torch.zeros(len(values), device=values.device)
        return importance.of_triplets()


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer inside of accelerate's wrapper, which Trainer hands around."""
    return getattr(optimizer, "optimizer", optimizer)
