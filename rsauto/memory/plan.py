"""Peak memory as a function of the rank, and what fits a budget; before anything is loaded.

Every storage of a step has a size that is affine in the rank r: a + b r bytes. Two traces give a
and b of every event, and the peak at any rank is the highest running sum of the events,

    peak(r) = max_i sum_{k <= i} round_up(a_k + b_k r)

which is the upper envelope of straight lines (up to the allocator's rounding), not a straight line
through two peaks: at low ranks the peak is where the loss is, at high ranks where backward ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import PretrainedConfig

from rsauto.config import TaskType
from rsauto.errors import InputError
from rsauto.memory.caching import reserved_bytes
from rsauto.memory.recorder import StorageEvent
from rsauto.memory.trace import StepShape, StepTrace, trace_step
from rsauto.quantisation import Bits
from rsauto.scaling import OptimizerName

Targets = str | tuple[str, ...]
MicroBatch = int | Literal["auto"]

TRACED_RANKS = (8, 24)
"""Any two would do; these meet no dimension of a usual model."""

GRANULE_BYTES = {"cpu": 64, "cuda": 512}
"""Allocators round up to a multiple: c10's alignment on the CPU, kMinBlockSize on CUDA."""

ALLOWANCE = 0.02
"""Share added before a prediction is compared to the budget: kernels' own scratch is not seen."""

CUDA_CONTEXT_BYTES = 512 * 2**20
"""Driver context and loaded kernels of one process; 0.3 to 0.6 GiB depending on the card."""

CUBLAS_WORKSPACE_BYTES = 2 * 32 * 2**20
"""One for the forward and one for the backward thread; 32 MiB each on Hopper, less elsewhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """Memory of one optimizer step and one evaluation at one rank."""

    rank: int
    micro_batch_size: int
    peak_bytes: int
    """Highest number of bytes in use."""
    reserved_bytes: int
    """What the CUDA caching allocator holds for them; on a CPU the same as in use."""
    num_trainable_params: int
    breakdown: dict[str, int]
    """Bytes at the peak by what they are for; they sum to peak_bytes."""
    phase: str
    """Where the peak is: forward, backward, optimizer or evaluation."""


class RankProfile:
    """The events of one step as a function of the rank."""

    def __init__(self, low: StepTrace, high: StepTrace, granule: int) -> None:
        """Two traces of one shape at different ranks; `granule` is what sizes are rounded to."""
        if _order(low) != _order(high):
            raise RuntimeError(
                f"The step at rank {low.rank} runs other operations than at rank {high.rank}, "
                "so its memory cannot be predicted for every rank from these two."
            )
        at_low = np.array([e.nbytes for e in low.events], dtype=np.int64)
        at_high = np.array([e.nbytes for e in high.events], dtype=np.int64)
        distance = high.rank - low.rank
        assert not ((at_high - at_low) % distance).any(), "event sizes are not affine in the rank"
        self._slopes = (at_high - at_low) // distance
        self._constants = at_low - self._slopes * low.rank
        self._granule = granule
        self._params_per_rank = (high.num_trainable_params - low.num_trainable_params) // distance
        self._first = low

    def sizes(self, rank: int) -> npt.NDArray[np.int64]:
        """Bytes that each event allocates (positive) or frees, as the allocator rounds them."""
        exact = self._constants + self._slopes * rank
        rounded: npt.NDArray[np.int64] = -(-np.abs(exact) // self._granule) * self._granule
        signed: npt.NDArray[np.int64] = np.sign(exact) * rounded
        return signed

    def num_trainable_params(self, rank: int) -> int:
        first = self._first
        return first.num_trainable_params + (rank - first.rank) * self._params_per_rank

    def predict(self, rank: int, shape: StepShape) -> Prediction:
        sizes = self.sizes(rank)
        in_use = sizes.cumsum()
        top = int(in_use.argmax())
        breakdown: dict[str, int] = {}
        for event, size in zip(self._first.events[: top + 1], sizes, strict=False):
            breakdown[event.tag] = breakdown.get(event.tag, 0) + int(size)
        peak = int(in_use[top])
        on_cuda = shape.device_type == "cuda"
        storages = [event.storage for event in self._first.events]
        changes = zip(storages, sizes.tolist(), strict=True)
        return Prediction(
            rank=rank,
            micro_batch_size=shape.micro_batch_size,
            peak_bytes=peak,
            reserved_bytes=reserved_bytes(changes) if on_cuda else peak,
            num_trainable_params=self.num_trainable_params(rank),
            breakdown=breakdown,
            phase=self._first.events[top].phase,
        )


class MemoryPlanner:
    """Predicts the memory of LoRA trials on one model and dataset. Traces are made when needed.

    `model_config` is the configuration of the model that is trained; lengths are the longest
    sequences in tokens. Evaluation runs in batches of micro_batch_size sequences.
    """

    def __init__(
        self,
        *,
        model_config: PretrainedConfig,
        dtype: torch.dtype,
        attn_implementation: str = "sdpa",
        gradient_checkpointing: bool = False,
        train_length: int,
        eval_length: int,
        device_type: str = "cpu",
        task: TaskType = "CAUSAL_LM",
        has_token_types: bool = False,
        quant_bits: Bits | None = None,
        adapter_dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        if device_type not in GRANULE_BYTES:
            raise ValueError(f"device_type must be 'cpu' or 'cuda', but got {device_type!r}.")
        self._model_config: str = model_config.to_json_string(use_diff=False)
        self._dtype = dtype
        self._attn_implementation = attn_implementation
        self._gradient_checkpointing = gradient_checkpointing
        self._train_length = train_length
        self._eval_length = eval_length
        self._device_type = device_type
        self._task = task
        self._has_token_types = has_token_types
        self._quant_bits = quant_bits
        self._adapter_dtype = adapter_dtype
        self._profiles: dict[StepShape, RankProfile] = {}

    def predict(
        self,
        rank: int,
        *,
        target_modules: Targets,
        optimizer: OptimizerName,
        batch_size: int,
        micro_batch_size: int,
        clip: bool = True,
    ) -> Prediction:
        """Memory at `rank` with `batch_size` sequences a step, `micro_batch_size` at a time."""
        if rank < 1:
            raise ValueError(f"rank must be at least 1, but got {rank=}.")
        if micro_batch_size < 1 or batch_size % micro_batch_size:
            raise ValueError(
                f"micro_batch_size must divide batch_size, but got {micro_batch_size=} and "
                f"{batch_size=}. Use one of {_divisors(batch_size)}."
            )
        shape = StepShape(
            model_config=self._model_config,
            dtype=self._dtype,
            attn_implementation=self._attn_implementation,
            gradient_checkpointing=self._gradient_checkpointing,
            target_modules=target_modules,
            optimizer=optimizer,
            clip=clip,
            micro_batch_size=micro_batch_size,
            accumulate=micro_batch_size < batch_size,
            train_length=self._train_length,
            eval_length=self._eval_length,
            device_type=self._device_type,
            task=self._task,
            has_token_types=self._has_token_types,
            quant_bits=self._quant_bits,
            adapter_dtype=self._adapter_dtype,
        )
        return self._profile(shape).predict(rank, shape)

    def needed_bytes(self, prediction: Prediction) -> int:
        """What a budget must hold: reserved memory, an allowance, and CUDA's own on CUDA.

        On a CPU only tensors count, not the interpreter and its libraries.
        """
        own = CUDA_CONTEXT_BYTES + CUBLAS_WORKSPACE_BYTES if self._device_type == "cuda" else 0
        return own + int(prediction.reserved_bytes * (1 + ALLOWANCE))

    def largest_micro_batch(
        self,
        rank: int,
        *,
        memory_budget_bytes: int,
        target_modules: Targets,
        optimizer: OptimizerName,
        batch_size: int,
        micro_batch_size: MicroBatch = "auto",
        clip: bool = True,
    ) -> Prediction | None:
        """The prediction for the largest micro-batch that fits the budget, None if none does.

        "auto" chooses among the divisors of `batch_size`, so that gradient accumulation holds the
        global batch; a number allows only itself.
        """

        def fitting(size: int) -> Prediction | None:
            prediction = self.predict(
                rank,
                target_modules=target_modules,
                optimizer=optimizer,
                batch_size=batch_size,
                micro_batch_size=size,
                clip=clip,
            )
            return prediction if self.needed_bytes(prediction) <= memory_budget_bytes else None

        if micro_batch_size != "auto":
            return fitting(micro_batch_size)
        *smaller, whole = _divisors(batch_size)
        # The whole batch stands apart: without accumulation it may need less than a part of it.
        return fitting(whole) or _last_that_fits(smaller, fitting)

    def largest_rank(
        self,
        *,
        memory_budget_bytes: int,
        target_modules: Targets,
        optimizer: OptimizerName,
        batch_size: int,
        micro_batch_size: MicroBatch = "auto",
        clip: bool = True,
    ) -> int:
        """The largest rank that fits with any allowed micro-batch; 0 when not even rank 1 does."""

        def fits(rank: int) -> bool:
            prediction = self.largest_micro_batch(
                rank,
                memory_budget_bytes=memory_budget_bytes,
                target_modules=target_modules,
                optimizer=optimizer,
                batch_size=batch_size,
                micro_batch_size=micro_batch_size,
                clip=clip,
            )
            return prediction is not None

        fitting, too_large = 0, 1
        while fits(too_large):  # ends: memory grows with the rank without bound
            fitting, too_large = too_large, 2 * too_large
        while too_large - fitting > 1:
            middle = (fitting + too_large) // 2
            fitting, too_large = (middle, too_large) if fits(middle) else (fitting, middle)
        return fitting

    def _cannot_plan(self, error: Exception) -> str:
        model_type = json.loads(self._model_config).get("model_type")
        reason = str(error).strip().split("\n")[0]
        return (
            f"model.name: a training step of this {model_type} model cannot be followed without "
            f"data, so its memory cannot be planned and no trial is started "
            f"({type(error).__name__}: {reason}). Choose another architecture."
        )

    def _profile(self, shape: StepShape) -> RankProfile:
        if shape not in self._profiles:
            try:
                low, high = (trace_step(shape, rank) for rank in TRACED_RANKS)
                profile = RankProfile(low, high, GRANULE_BYTES[self._device_type])
            except (RuntimeError, NotImplementedError, AttributeError) as error:
                # Steps that depend on values, such as a count of end-of-text tokens.
                raise InputError(self._cannot_plan(error)) from error
            self._profiles[shape] = profile
        return self._profiles[shape]


def _order(trace: StepTrace) -> list[StorageEvent]:
    """What is allocated and freed when; not how much, nor what it is taken for.

    Logits are told by their size, which something else may have at one rank and not at another.
    """
    return [event._replace(nbytes=0, tag="activations") for event in trace.events]


def _last_that_fits(
    sizes: list[int], fitting: Callable[[int], Prediction | None]
) -> Prediction | None:
    """The prediction of the largest of ascending `sizes` that fits; by halves, traces are slow."""
    best: Prediction | None = None
    while sizes:
        middle = len(sizes) // 2
        prediction = fitting(sizes[middle])
        best = prediction or best
        sizes = sizes[middle + 1 :] if prediction else sizes[:middle]
    return best


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
