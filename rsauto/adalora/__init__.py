"""AdaLoRA rebuilt on rsLoRA: triplets, their importance, the rank budget. A tuner of PEFT.

Importing it makes PEFT know `RsAdaLoraConfig`.
"""

from rsauto.adalora.callback import RsAdaLoraCallback
from rsauto.adalora.config import RsAdaLoraConfig
from rsauto.adalora.model import RsAdaLoraModel, rank_allocator

__all__ = ["RsAdaLoraCallback", "RsAdaLoraConfig", "RsAdaLoraModel", "rank_allocator"]
