"""The same layer on bitsandbytes' quantised linear layers. Imported only where those are there."""

from __future__ import annotations

from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

from rsauto.adalora.layer import SvdLayer


class SvdLinear8bitLt(SvdLayer, Linear8bitLt):
    """Of LLM.int8 layers; merging quantises anew, as PEFT's LoRA layer does."""


class SvdLinear4bit(SvdLayer, Linear4bit):
    """Of 4-bit layers; merging quantises anew, as PEFT's LoRA layer does."""
