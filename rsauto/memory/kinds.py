"""What a training step is, to the planner: what runs in it, and how large it is.

Plain values without torch, so that a plan that was made before is read in no time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from rsauto.config import TaskType
from rsauto.errors import InputError, nearest
from rsauto.records import ProductOrder, RankPattern

Targets = str | tuple[str, ...]
DtypeName = Literal["float32", "bfloat16", "float16"]
Bits = Literal[4, 8]

PlannedMethod = Literal["lora", "rslora", "adalora", "rsadalora", "dora", "peft_adalora"]
"""lora and rslora need the same memory, as do adalora and rsadalora: they differ by a number.
peft_adalora is PEFT's own. The rank of the three is the initial one, where their memory peaks."""

Score = Literal["full", "lambda"]
"""What adalora and rsadalora gather importance of."""

PlannedOptimizer = Literal[
    "adamw", "adamw_foreach", "adamw_loop", "adamw_8bit", "adafactor", "sgd"
]  # fmt: skip
"""adamw is torch's fused one; adamw_8bit that of bitsandbytes."""

Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
"""auto is sdpa where the architecture has it, else eager."""

DeviceType = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepKind:
    """Everything that changes which operations a step runs. Equal kinds run the same ones."""

    model_config: str
    """The Hugging Face configuration as `configuration_text` gives it."""
    task: TaskType = "CAUSAL_LM"
    method: PlannedMethod = "lora"
    target_modules: Targets = "all-linear"
    rank_pattern: RankPattern | None = None
    """Rank of each module, where they differ; the rank of a `StepSize` then says nothing."""
    product_order: ProductOrder = "factors"
    """Of lora and rslora: how B A x is computed."""
    score: Score = "full"
    """Of adalora and rsadalora: what their importance is gathered of."""
    orth_reg: bool = True
    """Of adalora and rsadalora: whether P and Q are kept near orthogonal."""
    lora_dropout: float = 0.0
    dtype: DtypeName
    """Of the base weights."""
    adapter_dtype: DtypeName = "float32"
    autocast: Literal["bfloat16", "float16"] | None = None
    """Mixed precision, as Trainer's bf16=True and fp16=True set it up."""
    quant_bits: Bits | None = None
    """Of the base's linear layers; None where they are in `dtype`."""
    attn_implementation: Attention = "sdpa"
    gradient_checkpointing: bool = False
    use_reentrant: bool | None = None
    """Of checkpointing; None chooses as `rsauto study` does."""
    optimizer: PlannedOptimizer = "adamw"
    clip: bool = True
    """Whether gradients are clipped by their norm."""
    pack_size: int = 1
    """Trials that are trained together, see `rsauto.packing`; a `StepSize` is that of each."""
    accumulate: bool = False
    """Whether gradients of an earlier micro-batch are alive in the forward pass."""
    padded: bool = True
    """Whether some sequence of the micro-batch is shorter than the longest."""
    has_token_types: bool = False
    """Whether batches carry token_type_ids."""
    device_type: DeviceType = "cuda"


_OF_NO_STEP = ("_name_or_path", "transformers_version", "id2label", "label2id")
"""Fields of a configuration: where it was read, what wrote it, how classes are called."""


def configuration_text(fields: Mapping[str, Any]) -> str:
    """The `model_config` of a `StepKind`, without what changes no step. So a model that was moved
    is not traced again.

    Raises TypeError or ValueError for what is not plain JSON.
    """
    kept = {name: value for name, value in fields.items() if name not in _OF_NO_STEP}
    if isinstance(labels := fields.get("id2label"), Mapping):
        kept["num_labels"] = len(labels)
    return json.dumps(kept, sort_keys=True)


class StepSize(NamedTuple):
    """The numbers that the bytes of a step are polynomials of."""

    rank: int
    micro_batch_size: int
    """Sequences per forward pass, in training and in evaluation."""
    train_length: int
    """Tokens of the longest training sequence."""
    eval_length: int
    """Tokens of the longest evaluation sequence; 0 where nothing is evaluated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """Memory of one optimizer step and one evaluation at one size."""

    rank: int
    micro_batch_size: int
    peak_bytes: int
    """Highest number of bytes in use."""
    reserved_bytes: int
    """The least that the CUDA caching allocator can do with; on a CPU the same as in use."""
    num_trainable_params: int
    flops_per_token: float
    """Of forward and backward, as `rsauto.training.flops` counts them."""
    breakdown: Mapping[str, int]
    """Bytes at the peak by what they are for; they sum to peak_bytes."""
    phase: str
    """Where the peak is: forward, backward, optimizer or evaluation."""
    operation: str = ""
    """The operation that makes it, such as aten._log_softmax_backward_data."""
    product_order: ProductOrder = "factors"
    """What it holds for."""
    estimate_reason: str = ""
    """Why this is an estimate by a closed form, where the step cannot be traced; else empty."""

    @property
    def estimated(self) -> bool:
        return bool(self.estimate_reason)


_ALLOWED: dict[str, tuple[Any, ...]] = {
    "task": get_args(TaskType),
    "method": get_args(PlannedMethod),
    "product_order": get_args(ProductOrder),
    "score": get_args(Score),
    "dtype": get_args(DtypeName),
    "adapter_dtype": get_args(DtypeName),
    "autocast": (None, "bfloat16", "float16"),
    "quant_bits": (None, *get_args(Bits)),
    "attn_implementation": get_args(Attention),
    "optimizer": get_args(PlannedOptimizer),
    "device_type": get_args(DeviceType),
}


_SWITCHES = (
    "orth_reg",
    "gradient_checkpointing",
    "use_reentrant",
    "clip",
    "padded",
    "has_token_types",
)


def require_known(kind: StepKind) -> None:
    """Raises InputError with every setting of ``kind`` that has a value it cannot have."""
    problems = []
    for name, allowed in _ALLOWED.items():
        value = getattr(kind, name)
        if value not in allowed or isinstance(value, (bool, float)):
            words = [str(word) for word in allowed if word is not None]
            field = name.removesuffix("_type")
            problems.append(
                f"{field}: {value!r} is not known.{nearest(str(value), words)} "
                f"Choose one of {', '.join(words)}."
            )
    dropout = kind.lora_dropout
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        problems.append(f"lora_dropout: {dropout!r} is not a number of at least 0 and below 1.")
    for name in _SWITCHES:
        value = getattr(kind, name)
        if not isinstance(value, bool) and not (name == "use_reentrant" and value is None):
            problems.append(f"{name}: {value!r} is neither true nor false.")
    if problems:
        raise InputError(problems)
