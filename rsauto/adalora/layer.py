"""A linear layer with an adapter in the form of a singular value decomposition.

    W x + gamma_r P diag(lambda) Q x

PEFT's names are kept, so that the tensors can be read as its AdaLoRA's: ``lora_A`` is Q (r x d_in),
``lora_E`` lambda (r x 1), ``lora_B`` P (d_out x r). A triplet is a lambda with its row of Q and
its column of P.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils import transpose
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from rsauto.adalora.config import RsAdaLoraConfig
from rsauto.adalora.importance import RANK_DIM, Factor, Importance


@dataclass
class Triplets:
    """What the allocation knows of one adapter on one layer."""

    config: RsAdaLoraConfig
    mask: Tensor
    """(r,) boolean, True for active triplets; the lambdas of all others are zero."""
    active_rank: int
    """How many are active."""
    importance: Importance | None = field(default_factory=Importance)
    """None once the pattern is fixed."""
    factor_scale: float = 1.0
    """What `set_scale` and its kin multiplied gamma_r by."""


class SvdLayer(nn.Module, LoraLayer):
    """The adapter itself, mixed into PEFT's layer of each kind of base layer."""

    adapter_layer_names = ("lora_A", "lora_E", "lora_B")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "triplets")
    # Tables of parameters by adapter; PEFT's LoRA has modules in two of them.
    lora_A: Any
    lora_E: Any
    lora_B: Any
    in_features: int
    out_features: int

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: RsAdaLoraConfig,
        rank: int,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.lora_A = nn.ParameterDict()
        self.lora_E = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.triplets: dict[str, Triplets] = {}
        # Of the layer, not of the configuration: a model may have layers of both kinds.
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, rank, config.lora_alpha, config=config)

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        config: Any,
        **_kwargs: Any,
    ) -> None:
        """Puts a fresh adapter of rank ``r`` on the layer; a rank of 0 is one that does nothing."""
        self.lora_alpha[adapter_name] = lora_alpha
        self.lora_bias[adapter_name] = False
        self.lora_dropout[adapter_name] = (
            nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        )
        self.lora_A[adapter_name] = nn.Parameter(torch.empty(r, self.in_features))
        self.lora_E[adapter_name] = nn.Parameter(torch.empty(r, 1))
        self.lora_B[adapter_name] = nn.Parameter(torch.empty(self.out_features, r))
        self.triplets[adapter_name] = Triplets(config, _all_active(r), r)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights is True)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.refresh(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool) -> None:
        """lambda = 0, and P and Q normal: their vectors of unit length on average, or init_std."""
        std = self.triplets[adapter_name].config.init_std
        lambda_std = 0.0 if init_lora_weights else 1.0
        nn.init.normal_(self.lora_E[adapter_name], std=lambda_std)
        nn.init.normal_(self.lora_A[adapter_name], std=std or self.in_features**-0.5)
        nn.init.normal_(self.lora_B[adapter_name], std=std or self.out_features**-0.5)

    def factors(self, adapter_name: str) -> dict[Factor, nn.Parameter]:
        """lambda, Q and P."""
        return {
            "E": self.lora_E[adapter_name],
            "A": self.lora_A[adapter_name],
            "B": self.lora_B[adapter_name],
        }

    def refresh(self, adapter_name: str) -> None:
        """Puts rank and gamma_r in keeping with the tensors and the mask."""
        state = self.triplets[adapter_name]
        self.r[adapter_name] = len(self.lora_E[adapter_name])
        gamma = state.config.gamma_r(state.active_rank)
        self.scaling[adapter_name] = gamma * state.factor_scale

    @torch.no_grad()
    def resize(self, adapter_name: str, rank: int) -> None:
        """Room for another number of triplets, values undefined; the parameters stay the same."""
        for name, parameter in self.factors(adapter_name).items():
            shape = list(parameter.shape)
            if shape[RANK_DIM[name]] != rank:
                shape[RANK_DIM[name]] = rank
                replace_data(parameter, parameter.data.new_empty(shape))
        self.activate(adapter_name, _all_active(rank), rank)

    def activate(self, adapter_name: str, mask: Tensor, active_rank: int) -> None:
        """Makes the triplets of ``mask`` the active ones; `hold` silences the others."""
        state = self.triplets[adapter_name]
        state.mask, state.active_rank = mask, active_rank
        self.refresh(adapter_name)

    def active_values(self, adapter_name: str) -> Tensor:
        """lambda, (r, 1), zero where a triplet is not active.

        What the optimizer made of the inactive ones is in the parameter until `hold`: their
        importance is what lets them come back.
        """
        state = self.triplets[adapter_name]
        values: Tensor = self.lora_E[adapter_name]
        if state.active_rank == self.r[adapter_name]:
            return values
        return values.masked_fill(~state.mask.to(values.device)[:, None], 0.0)

    @torch.no_grad()
    def hold(self, adapter_name: str) -> None:
        """Sets the lambdas of all triplets that are not active to zero."""
        state = self.triplets[adapter_name]
        if state.active_rank < self.r[adapter_name]:
            values = self.lora_E[adapter_name]
            state.mask = state.mask.to(values.device)
            values.masked_fill_(~state.mask[:, None], 0.0)

    def set_scale(self, adapter: str, scale: float) -> None:
        """gamma_r times ``scale``."""
        if adapter in self.triplets:
            self.triplets[adapter].factor_scale = scale
            self.refresh(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the factors of all active adapters."""
        for adapter in self._own_active_adapters():
            self.set_scale(adapter, self.triplets[adapter].factor_scale * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the factors of all active adapters; None puts them back to gamma_r."""
        for adapter in self._own_active_adapters():
            kept = 1.0 if scale is None else self.triplets[adapter].factor_scale / scale
            self.set_scale(adapter, kept)

    def _own_active_adapters(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.triplets]

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """gamma_r P diag(lambda) Q in the shape of the base weight and the factors' dtype."""
        values = self.active_values(adapter).float() * self._gamma(adapter)
        delta = self.lora_B[adapter].float() @ (self.lora_A[adapter].float() * values)
        return transpose(delta, self.fan_in_fan_out).to(self.lora_B[adapter].dtype)

    def _gamma(self, adapter: str) -> float:
        return float(self.scaling[adapter])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """W x + gamma_r P diag(lambda) Q x of all active adapters, in the base layer's dtype."""
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("adapter_names: batches of several adapters need them folded to LoRA.")
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for adapter in self._own_active_adapters():
            if self.r[adapter] > 0:
                result = self._add_product(result, x, adapter)
        return result

    def _add_product(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        # gamma_r and lambda are small beside the activations, so they go into Q.
        values = self.lora_E[adapter] if self.training else self.active_values(adapter)
        q = self.lora_A[adapter] * (values * self._gamma(adapter))
        p = self.lora_B[adapter]
        if not torch.is_autocast_enabled(x.device.type):
            x = self._cast_input_dtype(x, q.dtype)
        hidden = F.linear(self.lora_dropout[adapter](x), q)
        if hidden.dtype == p.dtype == result.dtype and result.ndim > 1:
            rows = torch.addmm(result.flatten(0, -2), hidden.flatten(0, -2), p.T)
            return rows.view(result.shape)
        return result + F.linear(hidden, p).to(result.dtype)


class SvdLinear(SvdLayer, LoraLinear):
    """Of nn.Linear and transformers' Conv1D; merges as PEFT's LoRA layer does."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's own conversion is by another decomposition; ours is exact, see `export`."""
        return True

    def __repr__(self) -> str:
        return "svd." + nn.Module.__repr__(self)


def svd_layers(model: nn.Module) -> Iterator[tuple[str, SvdLayer]]:
    """Names and adapted layers, in model order."""
    for name, module in model.named_modules():
        if isinstance(module, SvdLayer):
            yield name, module


def replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Puts other values, of another shape, into a parameter, which loses its gradient.

    A graph that is still alive, as of the step before, holds autograd's node of the parameter with
    its old shape. Autograd forgets that node when a parameter changes its dtype, so it does.
    """
    other = torch.int8 if data.dtype != torch.int8 else torch.int16
    parameter.grad = None
    needed_grad = parameter.requires_grad
    parameter.requires_grad_(False)
    parameter.data = torch.empty(0, dtype=other, device=data.device)
    parameter.data = data
    parameter.requires_grad_(needed_grad)


def _all_active(rank: int) -> Tensor:
    # Not a tensor of the model: a default device of "meta" must not swallow its values.
    return torch.ones(rank, dtype=torch.bool, device="cpu")
