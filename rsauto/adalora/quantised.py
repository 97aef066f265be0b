"""The same layer on bitsandbytes' quantised linear layers. Imported only where those are there."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from torch import nn

from rsauto.adalora.config import RsAdaLoraConfig
from rsauto.adalora.layer import SvdLayer


class SvdLinear8bitLt(SvdLayer, Linear8bitLt):
    """Of LLM.int8 layers; merging quantises anew, as PEFT's LoRA layer does."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: RsAdaLoraConfig,
        rank: int,
        **kwargs: Any,
    ) -> None:
        SvdLayer.__init__(self, base_layer, adapter_name, config, rank, **kwargs)


class SvdLinear4bit(SvdLayer, Linear4bit):
    """Of 4-bit layers; merging quantises anew, as PEFT's LoRA layer does."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: RsAdaLoraConfig,
        rank: int,
        **kwargs: Any,
    ) -> None:
        SvdLayer.__init__(self, base_layer, adapter_name, config, rank, **kwargs)
