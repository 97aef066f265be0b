"""Peak memory in closed form, for architectures whose step cannot be traced. An estimate.

For a decoder with L layers of hidden size h, and b sequences of s tokens in 16 bits, activations
take after Korthikanti et al. (arXiv:2205.05198, sections 4.1 and 4.2, without dropout's masks of
attention)

    fused attention         34 s b h L                      bytes
    attention that is kept  (34 s b h + 5 a s^2 b) L        a heads
    checkpointed            2 s b h L, and one layer of the above

To these come the weights; the adapters with their gradients and optimizer states; and 12 bytes for
each logit: the loss holds three copies of them in 32 bits. All are added as if they were needed at
the same moment, which they are not, and layers are taken to be as in GPT-3: gated ones, and the
copies in 32 bits that adapters keep of their inputs, take more. Hence the allowance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rsauto.memory.kinds import Prediction, StepSize

Component = Literal[
    "weights", "adapters", "gradients", "optimizer", "activations", "logits_and_loss"
]
"""What memory is for, in the words of `rsauto.memory.recorder`."""

ESTIMATE_ALLOWANCE: Mapping[bool, float] = {False: 1.9, True: 1.8}
"""Share of the activations to add, by whether they are checkpointed.

Traced steps of Llama, Qwen, Gemma, GPT-2 and GPT-NeoX models with PEFT's own layers and float32
adapters on all linear layers needed up to 2.8 times the activations above (2.7 times when
checkpointed), so that the estimate alone was up to 47 % too low. Fused layers need less. DoRA's
copies of the weights are not covered."""

DROPOUT_ALLOWANCE = 1.4
"""Share of the activations to add for LoRA dropout, which keeps each adapter's input once more."""

IMPORTANCE_BYTES = 8.0
"""Of each adapter parameter that AdaLoRA gathers importance of: two averages in float32."""

LOGIT_BYTES = 12
"""log p, its gradient and the logits' own, each float32."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Memory of one training step, not traced."""

    breakdown: Mapping[Component, int]
    """Bytes by what they are for; they sum to `peak_bytes`."""
    allowance_bytes: int
    """To be added before the estimate is compared to a budget."""

    @property
    def peak_bytes(self) -> int:
        return sum(self.breakdown.values())

    @property
    def needed_bytes(self) -> int:
        return self.peak_bytes + self.allowance_bytes


def estimated_peak(
    *,
    weight_bytes: int,
    num_adapter_params: int,
    micro_batch_size: int,
    length: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_classes: int,
    per_token: bool = True,
    adapter_itemsize: int = 4,
    state_bytes_per_param: float = 8.0,
    activation_itemsize: int = 2,
    gradient_checkpointing: bool = False,
    keeps_attention: bool = False,
    lora_dropout: bool = False,
    scaled_adapters: bool = False,
) -> Estimate:
    """Memory of a step on `micro_batch_size` sequences of `length` tokens.

    `num_classes` is the vocabulary, or with `per_token=False` the classes of a sequence classifier.
    Item sizes are bytes of an element: of the adapters and their gradients, and of activations.
    `state_bytes_per_param` is 8 for AdamW and 0 for SGD. `keeps_attention` is for eager attention,
    which saves every weight; flash and fused (sdpa) kernels compute them again in backward.
    `scaled_adapters` is for AdaLoRA, whose forward pass multiplies Q by lambda and keeps the
    product: at most as much as the adapters.
    """
    sequences = micro_batch_size
    tokens = sequences * length
    layer = 17 * activation_itemsize * tokens * hidden_size
    if keeps_attention:
        layer += 5 * activation_itemsize * num_heads * tokens * length // 2
    if gradient_checkpointing:
        activations = activation_itemsize * tokens * hidden_size * num_layers + layer
    else:
        activations = layer * num_layers
    adapters = num_adapter_params * adapter_itemsize
    scaled = adapters // (num_layers if gradient_checkpointing else 1) if scaled_adapters else 0
    breakdown: dict[Component, int] = {
        "weights": weight_bytes,
        "adapters": adapters,
        "gradients": adapters,
        "optimizer": round(num_adapter_params * state_bytes_per_param),
        "activations": activations + scaled,
        "logits_and_loss": LOGIT_BYTES * num_classes * (tokens if per_token else sequences),
    }
    allowance = ESTIMATE_ALLOWANCE[gradient_checkpointing] + DROPOUT_ALLOWANCE * lora_dropout
    return Estimate(breakdown, round(allowance * activations))


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimatedProfile:
    """What `rsauto.memory.profile.StepProfile` tells of a step, estimated."""

    reason: str
    """Why the step could not be traced."""
    settings: Mapping[str, Any]
    """Of `estimated_peak`: all that do not follow from the step's size."""
    params: tuple[float, float]
    """Trainable parameters: (without rank, for each rank)."""
    frozen_linear_weights: int
    trainable_linear_weights: tuple[float, float]
    """(without rank, for each rank)."""
    size: StepSize | None = None
    """The one that failed; None where none can be traced."""

    @property
    def is_lasting(self) -> bool:
        """Whether other sizes would fail as well, so that it may be kept."""
        return self.size is None

    def covers(self, size: StepSize) -> bool:
        """Whether a step of `size` cannot be traced either."""
        return self.size is None or size[1:] == self.size[1:]

    def fits(self, size: StepSize, device_type: str, limit_bytes: int) -> bool:
        """Whether the estimate and its allowance stay below the limit."""
        return self.predict(size, device_type).reserved_bytes <= limit_bytes

    def predict(self, size: StepSize, _device_type: str) -> Prediction:
        """The estimated peak; its allowance counts as reserved."""
        num_trainable = round(self.params[0] + self.params[1] * size.rank)
        estimate = estimated_peak(
            num_adapter_params=num_trainable,
            micro_batch_size=size.micro_batch_size,
            length=max(size.train_length, size.eval_length),
            **self.settings,
        )
        trained = self.trainable_linear_weights[0] + self.trainable_linear_weights[1] * size.rank
        return Prediction(
            rank=size.rank,
            micro_batch_size=size.micro_batch_size,
            peak_bytes=estimate.peak_bytes,
            reserved_bytes=estimate.needed_bytes,
            num_trainable_params=num_trainable,
            flops_per_token=4.0 * self.frozen_linear_weights + 6.0 * trained,
            breakdown={str(tag): n for tag, n in estimate.breakdown.items()},
            phase="backward",
            estimate_reason=self.reason,
        )
