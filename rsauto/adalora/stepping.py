"""What has to happen right before and after an optimizer steps the factors, whoever calls it.

Hooks on all optimizers, because PEFT's way of training has no other moment that is there in every
loop, comes once a step, and after the last micro-batch. They do nothing for optimizers of other
models.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


class Follower(Protocol):
    """A model that wants to know when its factors are stepped. `stepped` are ids of parameters."""

    def before_step(self, stepped: set[int], loss_scale: Any) -> None:
        """``loss_scale``: what gradients are still multiplied by, where the optimizer divides."""

    def after_step(self, stepped: set[int], found_inf: Any) -> None:
        """``found_inf``: above zero where the optimizer left the step out, else None or zero."""


_TORCH_FILE = register_optimizer_step_pre_hook.__code__.co_filename
"""Where torch wraps every optimizer's step, in a function called "wrapper"."""

_followers: WeakSet[Any] = WeakSet()
_hooks: list[Any] = []


def follow_optimizers(follower: Follower) -> None:
    """Calls ``follower`` from now on, for as long as it lives."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before))
        _hooks.append(register_optimizer_step_post_hook(_after))
    _followers.add(follower)


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    if not _followers or _is_inside_another():
        return None
    # The optimizer itself comes first among its arguments.
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        _tell_before(optimizer)
        return None

    @torch.enable_grad()
    def told() -> Any:
        """The gradients are only there once the closure has run."""
        loss = closure()
        _tell_before(optimizer)
        return loss

    return (args[0], told, *args[2:]), {k: v for k, v in kwargs.items() if k != "closure"}


def _is_inside_another() -> bool:
    """Whether the step is part of another one's: ZeRO, SAM, or a subclass that calls its parent's.

    Asked of the call stack, which no step that failed leaves anything on, and which is the thread's
    own.
    """
    depth = 0
    frame = sys._getframe()
    while frame is not None and depth < 2:
        code = frame.f_code
        depth += code.co_name == "wrapper" and code.co_filename == _TORCH_FILE
        frame = frame.f_back  # type: ignore[assignment]
    return depth > 1


def _tell_before(optimizer: Optimizer) -> None:
    stepped = _stepped(optimizer)
    for follower in list(_followers):
        # A fused optimizer is handed gradients that are still scaled, and the scale.
        follower.before_step(stepped, getattr(optimizer, "grad_scale", None))


def _after(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    if _followers and not _is_inside_another():
        stepped = _stepped(optimizer)
        for follower in list(_followers):
            follower.after_step(stepped, getattr(optimizer, "found_inf", None))


def _stepped(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
