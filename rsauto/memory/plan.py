"""`rsauto.plan`: what every rank needs on a GPU, before anything is loaded or trained.

Nothing but the model's configuration is read. What was planned before is answered from disk, and
then no torch is imported.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rsauto.config import AdaLoraSettings, TaskType
from rsauto.devices import Budget, card_of, outside_bytes, parse_budget
from rsauto.errors import InputError
from rsauto.memory.changes import Change, cheapest_change
from rsauto.memory.checks import (
    checked_ranks,
    checked_targets,
    require_device_size,
    require_init_ratio,
    require_micro_batch,
    require_positive,
)
from rsauto.memory.kinds import (
    Attention,
    Bits,
    DeviceType,
    DtypeName,
    PlannedMethod,
    PlannedOptimizer,
    Prediction,
    Score,
    StepKind,
    Targets,
    require_known,
)
from rsauto.memory.planner import MemoryPlanner, MicroBatch
from rsauto.memory.profiles import Profiles
from rsauto.memory.shape import model_shape
from rsauto.records import ADALORA_METHODS

if TYPE_CHECKING:
    import pandas as pd

ALLOCATION = AdaLoraSettings()
"""How AdaLoRA is planned unless told otherwise: as a study trains it."""

RANKS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Planned unless others are asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRank:
    """One row of a plan."""

    rank: int
    """Of every module; AdaLoRA's is its target, the mean over the modules at the end."""
    init_rank: int | None = None
    """Of every module at the start, which decides the memory; None but for AdaLoRA."""
    prediction: Prediction
    needed_bytes: int
    """Reserved memory, the allowance, and what CUDA keeps for itself."""
    fits: bool | None
    """None without a budget."""

    @property
    def adapter_bytes(self) -> int:
        """Of the saved adapter, in float32; of AdaLoRA as if nothing were pruned."""
        return 4 * self.prediction.num_trainable_params


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What each rank needs, and what fits."""

    model: str
    ranks: tuple[PlannedRank, ...]
    """Ascending."""
    memory_budget: Budget | None
    largest_rank: int | None
    """The largest that fits, asked for or not; 0 when none does, None without a budget."""
    batch_size: int
    micro_batch_size: MicroBatch
    max_length: int
    planner: MemoryPlanner

    @property
    def memory_budget_bytes(self) -> int | None:
        return None if self.memory_budget is None else self.memory_budget.total_bytes

    def at(self, rank: int) -> PlannedRank:
        """The row of any rank, also one that was not asked for."""
        known = {row.rank: row for row in self.ranks}
        return known.get(rank) or _row(self, rank)

    def cheapest_change(self, rank: int) -> Change | None:
        """What makes `rank` fit for the least loss in time and quality; None if nothing does.

        Tried in this order: smaller micro-batches, gradient checkpointing, 8-bit and 4-bit bases,
        shorter sequences. Raises ValueError without a budget, or where the rank fits as it is.
        """
        row = self.at(rank)
        if self.memory_budget_bytes is None:
            raise ValueError("cheapest_change needs a plan with a memory_budget")
        if row.fits:
            raise ValueError(f"rank {rank} fits as it is")
        return cheapest_change(
            self.planner, row, self.memory_budget_bytes, self.batch_size, self.max_length
        )

    def feasible(
        self,
        *,
        ranks: Iterable[int] | None = None,
        micro_batch_sizes: Iterable[int] | None = None,
        max_lengths: Iterable[int] | None = None,
        gradient_checkpointing: Iterable[bool] | None = None,
        quant_bits: Iterable[Bits | None] | None = None,
    ) -> pd.DataFrame:
        """A row for every combination, with what it needs and whether it fits.

        What is not given stays as in the plan. Every combination of checkpointing, quantisation
        and "one sequence, or several" is traced, seconds each for a large model, and once more for
        lengths outside of those known by then: give the longest first.
        """
        from rsauto.memory.tables import feasible_frame

        kind = self.planner.kind

        def given(values: Iterable[Any] | None, own: Any) -> list[Any]:
            return [own] if values is None else list(values)

        lengths = given(max_lengths, self.max_length)
        bits = given(quant_bits, kind.quant_bits)
        checkpointing = given(gradient_checkpointing, kind.gradient_checkpointing)
        for one, other in itertools.product(bits, checkpointing):
            require_known(replace(kind, quant_bits=one, gradient_checkpointing=other))
        require_positive(**{f"max_lengths[{i}]": n for i, n in enumerate(lengths)})
        asked = [row.rank for row in self.ranks] if ranks is None else checked_ranks(list(ranks))
        sizes = given(micro_batch_sizes, self.micro_batch_size)
        for size in sizes:
            require_micro_batch(size, self.batch_size)
        return feasible_frame(self, itertools.product(bits, checkpointing, lengths, sizes, asked))

    def to_frame(self) -> pd.DataFrame:
        """One row a rank, indexed by it; bytes, and the breakdown of the peak."""
        from rsauto.memory.tables import plan_frame

        return plan_frame(self)

    def to_json(self) -> dict[str, Any]:
        """What `rsauto plan --json` prints."""
        return {
            "model": self.model,
            "method": self.planner.kind.method,
            "memory_budget_bytes": self.memory_budget_bytes,
            "ranks": [_json_row(row) for row in self.ranks],
            "largest_rank": self.largest_rank,
            "batch_size": self.batch_size,
            "micro_batch_size": self.micro_batch_size,
            "max_length": self.max_length,
            "outside_bytes": self.planner.outside_bytes,
            "allowance": self.planner.allowance,
        }


def plan(
    model: str | Path | Mapping[str, Any] | Any,
    *,
    memory_budget: int | str | None = None,
    ranks: Sequence[int] = RANKS,
    batch_size: int = 1,
    micro_batch_size: MicroBatch | None = None,
    max_length: int = 512,
    eval_length: int | None = None,
    method: PlannedMethod = "rslora",
    init_ratio: float = ALLOCATION.init_ratio,
    score: Score = ALLOCATION.score,
    orth_reg: bool = ALLOCATION.orth_reg_weight > 0,
    target_modules: Targets = "all-linear",
    lora_dropout: float = 0.0,
    optimizer: PlannedOptimizer = "adamw",
    dtype: DtypeName | Literal["auto"] = "auto",
    adapter_dtype: DtypeName = "float32",
    autocast: Literal["bfloat16", "float16"] | None = None,
    quant_bits: Bits | None = None,
    attn_implementation: Attention = "auto",
    gradient_checkpointing: bool = False,
    use_reentrant: bool | None = None,
    padded: bool = True,
    clip: bool = True,
    task: TaskType = "CAUSAL_LM",
    num_labels: int | None = None,
    revision: str | None = None,
    device: DeviceType = "cuda",
    profiles: Profiles | None = None,
) -> Plan:
    """Peak memory of every rank on a GPU, without one, and the largest rank that fits.

    ``model`` is the name of a well-known shape ('llama-2-7b'), a folder or config.json, a hub id,
    'embedded', a configuration as a dict or of transformers, or a loaded model. ``memory_budget``
    is a size ('24GiB'), a GPU ('rtx4090'), 'auto' for the GPU of this machine, or None.
    ``micro_batch_size`` is the whole batch unless given; 'auto' takes the largest that fits.
    ``max_length`` are the tokens of the longest training sequence, ``eval_length`` (as long unless
    given, 0 for no evaluation) of the longest in evaluation. ``padded`` says that sequences differ
    in length. Everything else is named as in transformers and PEFT.

    With ``method`` 'adalora' and 'rsadalora' a rank is the target, and its memory that of the
    initial rank, ``init_ratio`` times as high and rounded up; ``score`` and ``orth_reg`` say what
    importance is gathered of ('full', 'lambda'), and whether P and Q are kept near orthogonal. All
    three are of no account to other methods. A rank of 'peft_adalora', PEFT's own, is its initial
    one.

    Raises InputError for what is wrong or cannot be built.
    """
    chosen_ranks = checked_ranks(ranks)
    require_positive(batch_size=batch_size, max_length=max_length)
    if num_labels is not None:
        require_positive(num_labels=num_labels)
    micro = batch_size if micro_batch_size is None else micro_batch_size
    require_micro_batch(micro, batch_size)
    require_init_ratio(init_ratio)
    require_device_size(batch_size if micro == "auto" else micro, max_length, eval_length)
    shape = model_shape(model, task=task, num_labels=num_labels, revision=revision)
    budget = None if memory_budget is None else resolve_budget(memory_budget)
    kind = StepKind(
        model_config=shape.config_json,
        task=task,
        method=method,
        score=score,
        orth_reg=orth_reg,
        target_modules=checked_targets(target_modules),
        lora_dropout=lora_dropout,
        optimizer=optimizer,
        dtype=shape.dtype if dtype == "auto" else dtype,
        adapter_dtype=adapter_dtype,
        autocast=autocast,
        quant_bits=shape.quant_bits or quant_bits,
        attn_implementation=attn_implementation,
        gradient_checkpointing=gradient_checkpointing,
        use_reentrant=use_reentrant if gradient_checkpointing else None,
        padded=padded,
        clip=clip,
        device_type=device,
    )
    require_known(kind)
    planner = MemoryPlanner(
        kind,
        train_lengths=(max_length,),
        eval_length=max_length if eval_length is None else eval_length,
        profiles=profiles or Profiles.on_disk(),
        # On a CPU only tensors count.
        outside_bytes=0 if device == "cpu" else outside_bytes(budget.device if budget else None),
        init_ratio=init_ratio,
    )
    return _planned(
        shape.name, planner, budget, chosen_ranks, batch_size=batch_size, micro=micro,
        max_length=max_length,
    )  # fmt: skip


def _planned(
    name: str,
    planner: MemoryPlanner,
    budget: Budget | None,
    ranks: tuple[int, ...],
    *,
    batch_size: int,
    micro: MicroBatch,
    max_length: int,
) -> Plan:
    empty = Plan(
        model=name,
        ranks=(),
        memory_budget=budget,
        largest_rank=None,
        batch_size=batch_size,
        micro_batch_size=micro,
        max_length=max_length,
        planner=planner,
    )
    rows = tuple(_row(empty, rank) for rank in ranks)
    largest = None
    if budget is not None:
        largest = planner.largest_rank(
            memory_budget_bytes=budget.total_bytes,
            batch_size=batch_size,
            micro_batch_size=micro,
            known={row.rank: bool(row.fits) for row in rows},
        )
    return replace(empty, ranks=rows, largest_rank=largest)


def _row(plan: Plan, rank: int) -> PlannedRank:
    """At the largest micro-batch that fits, or the smallest allowed where none does."""
    planner, budget = plan.planner, plan.memory_budget_bytes
    found = planner.largest_or_smallest(
        rank,
        memory_budget_bytes=budget,
        batch_size=plan.batch_size,
        micro_batch_size=plan.micro_batch_size,
    )
    needed = planner.needed_bytes(found)
    return PlannedRank(
        rank=rank,
        init_rank=planner.initial_rank(rank) if planner.kind.method in ADALORA_METHODS else None,
        prediction=found,
        needed_bytes=needed,
        fits=None if budget is None else needed <= budget,
    )


def resolve_budget(memory_budget: int | str) -> Budget:
    """A size, a GPU's name, or 'auto': the whole memory of this machine's GPU.

    Raises InputError for anything else, and for 'auto' where there is no GPU.
    """
    if memory_budget != "auto":
        return parse_budget(str(memory_budget))
    import torch

    if not torch.cuda.is_available():
        raise InputError(
            "memory_budget: auto asks the GPU of this machine, and it has none that PyTorch can "
            "use. Give a size such as 24GiB, or a GPU such as rtx4090."
        )
    card = card_of(torch.cuda.get_device_properties(torch.cuda.current_device()))
    return Budget(card.total_bytes, card, card.name)


def _json_row(row: PlannedRank) -> dict[str, Any]:
    found = row.prediction
    return {
        "rank": row.rank,
        "init_rank": row.init_rank,
        "peak_bytes": found.peak_bytes,
        "reserved_bytes": found.reserved_bytes,
        "needed_bytes": row.needed_bytes,
        "fits": row.fits,
        "micro_batch_size": found.micro_batch_size,
        "num_trainable_params": found.num_trainable_params,
        "adapter_bytes": row.adapter_bytes,
        "flops_per_token": found.flops_per_token,
        "breakdown": dict(found.breakdown),
        "phase": found.phase,
        "operation": found.operation,
        "estimated": found.estimated,
    }
