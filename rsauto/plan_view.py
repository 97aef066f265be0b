"""What `rsauto plan` shows: a row for every rank, and what it means in sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rsauto.devices import DEVICES
from rsauto.memory.changes import SHORTEST, Change, trained_bytes
from rsauto.memory.cost import StudyCost
from rsauto.memory.kinds import StepKind, StepSize
from rsauto.memory.plan import Plan, PlannedRank
from rsauto.memory.plan_study import targets_text
from rsauto.records import ADALORA_METHODS
from rsauto.units import (
    METHOD_NAMES,
    bytes_text,
    count_text,
    percent_text,
    seconds_text,
)

PARTS = {
    "weights": ("W", "weights"),
    "adapters": ("A", "adapters"),
    "gradients": ("G", "gradients"),
    "optimizer": ("O", "optimizer"),
    "activations": (".", "activations"),
    "logits_and_loss": ("L", "logits and loss"),
}
"""How each part of the peak is drawn, and called."""

BAR_CELLS = 16
WIDE = 140
"""Columns of a terminal that shows every column of the table."""

METHODS = {**METHOD_NAMES, "dora": "DoRA", "peft_adalora": "PEFT's AdaLoRA"}


class Shown(NamedTuple):
    """A row of the table and the plan it belongs to."""

    row: PlannedRank
    plan: Plan

    @property
    def headroom_bytes(self) -> int:
        """Left of the budget; negative where it is exceeded."""
        assert self.plan.memory_budget_bytes is not None
        return self.plan.memory_budget_bytes - self.row.needed_bytes


class PlanColumn(NamedTuple):
    """A column of the table of ranks."""

    title: str
    text: Callable[[Shown], str]
    shown: Callable[[Plan], bool] = lambda _plan: True
    always: bool = True
    """Shown in a narrow terminal too."""
    justify: Literal["left", "right"] = "right"


def print_plan(plan: Plan, console: Console, notes: Iterable[str] = ()) -> None:
    """The table, its legend, and what was assumed."""
    console.print(_title(plan), markup=False, highlight=False, soft_wrap=True)
    console.print(ranks_as_table(plan, console.width))
    print_sentences([legend(), *assumptions(plan), *notes], console)


def print_sentences(sentences: Iterable[str], console: Console) -> None:
    """Each on lines of its own."""
    for sentence in sentences:
        console.print(sentence, markup=False, highlight=False)


def ranks_as_table(plan: Plan, width: int) -> Table:
    """What each rank needs; a narrow terminal shows the columns that decide."""
    table = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    columns = [c for c in COLUMNS if c.shown(plan) and (c.always or width >= WIDE)]
    for column in columns:
        table.add_column(column.title, justify=column.justify, no_wrap=True)
    for row in plan.ranks:
        table.add_row(*(column.text(Shown(row, plan)) for column in columns))
    return table


def breakdown_bar(breakdown: Mapping[str, int], cells: int = BAR_CELLS) -> str:
    """Letters in proportion to the parts of the peak, in the order of the legend.

    'WWWWW..L' for 5/8 weights, 2/8 activations and 1/8 logits: whole cells first, the others to the
    largest remainders.
    """
    total = sum(breakdown.values())
    if total == 0:
        return ""
    exact = {part: cells * breakdown.get(part, 0) / total for part in PARTS}
    counts = {part: int(share) for part, share in exact.items()}
    by_remainder = sorted(PARTS, key=lambda part: counts[part] - exact[part])
    for part in by_remainder[: cells - sum(counts.values())]:
        counts[part] += 1
    return "".join(PARTS[part][0] * count for part, count in counts.items())


def smallest_card(plan: Plan, row: PlannedRank) -> str:
    """The known card with the least memory that holds a rank; bfloat16 needs one since Ampere."""
    kind = plan.planner.kind
    oldest = (8, 0) if "bfloat16" in (kind.dtype, kind.autocast) else (0, 0)
    holding = [
        device
        for device in DEVICES.values()
        if device.total_bytes >= row.needed_bytes and device.compute_capability >= oldest
    ]
    return min(holding, key=lambda device: device.total_bytes).name if holding else "none"


def legend() -> str:
    """What the letters of the bars mean."""
    letters = ", ".join(f"{letter} {name}" for letter, name in PARTS.values())
    return f"Parts of the peak: {letters}; each letter is 1/{BAR_CELLS} of it."


def assumptions(plan: Plan) -> list[str]:
    """Sentences on what is trained, in which steps, and what "needs" means."""
    kind = plan.planner.kind
    sentences = [_training_sentence(kind), _step_sentence(plan)]
    if _allocates(plan):
        sentences.append(_allocation_sentence(kind, plan.planner.init_ratio))
    share = percent_text(plan.planner.allowance)
    outside = plan.planner.outside_bytes
    needs = f"Needs: what the allocator reserves and {share} for what kernels take themselves"
    if kind.device_type == "cpu":
        needs = f"Needs: the peak of all tensors and {share}, without the Python process"
    elif outside:
        needs += f", and {bytes_text(outside)} that CUDA keeps"
    sentences.append(f"{needs}.")
    reasons = {row.prediction.estimate_reason for row in plan.ranks if row.prediction.estimated}
    sentences += [
        "~ is an estimate by a closed form with a large allowance: the step cannot be traced "
        f"({reason})."
        for reason in sorted(reasons)
    ]
    return sentences


def budget_answer(plan: Plan) -> str:
    """Which ranks fit, for a plan with a budget."""
    budget = bytes_text(plan.memory_budget_bytes)
    if plan.largest_rank:
        return f"Rank {plan.largest_rank} is the largest that fits {budget}."
    weight_bytes = plan.ranks[0].prediction.breakdown.get("weights", 0)
    assert plan.memory_budget_bytes is not None
    if weight_bytes > plan.memory_budget_bytes:
        return (
            f"No rank fits: the weights alone need {bytes_text(weight_bytes)}, and the budget is "
            f"{budget}."
        )
    return f"No rank fits {budget}."


def _beside(plan: Plan) -> str:
    outside = plan.planner.outside_bytes
    return f", and CUDA keeps {bytes_text(outside)} for itself" if outside else ""


def fit_answer(plan: Plan, rank: int, change: Change | None) -> str:
    """What makes a rank fit that does not, or that nothing tried does."""
    row = plan.at(rank)
    if row.fits:
        return f"Rank {rank} fits as it is: it needs {bytes_text(row.needed_bytes)}."
    begin = f"Rank {rank} {_excess(plan, row)}."
    trained = trained_bytes(plan.planner.kind, row.prediction)
    if plan.planner.outside_bytes + trained > (plan.memory_budget_bytes or 0):
        return (
            f"{begin} No change makes it fit: the adapter and the optimizer's states alone need "
            f"{bytes_text(trained)}{_beside(plan)}."
        )
    if change is None:
        tried = ", ".join(_tried(plan.planner.kind))
        return f"{begin} Nothing tried makes it fit: {tried}, sequences down to {SHORTEST} tokens."
    words = str(change)
    return f"{begin} Cheapest change: {words}, in {bytes_text(change.needed_bytes)}."


def cost_answer(
    cost: StudyCost, *, steps: int, flops_per_second: float | None, price_per_hour: float | None
) -> str:
    """What a study over these ranks would take."""
    words = (
        f"A study of {cost.trials} trials of {steps} steps trains on at most "
        f"{count_text(cost.tokens)} tokens with about {count_text(cost.flops)} FLOPs"
    )
    if cost.seconds is not None:
        assert flops_per_second is not None
        words += f": {seconds_text(cost.seconds)} at {flops_per_second / 1e12:g} TFLOP/s"
    if cost.price is not None:
        words += f", a price of {cost.price:,.2f} at {price_per_hour:g} an hour"
    return f"{words}. Evaluation comes on top; pruned trials and shorter rows take less."


def tracing_line(model: str, kind: StepKind, size: StepSize) -> str:
    """Said before a step is traced, which takes seconds."""
    sequences = "sequence" if size.micro_batch_size == 1 else "sequences"
    parts = [f"{size.micro_batch_size} {sequences} of {size.train_length} tokens"]
    if kind.quant_bits:
        parts.append(f"{kind.quant_bits}-bit base")
    if kind.gradient_checkpointing:
        parts.append("gradient checkpointing")
    return f"tracing a training step of {model} ({', '.join(parts)}) ..."


def _title(plan: Plan) -> str:
    if plan.memory_budget is None:
        return f"{plan.model}: memory of a training step"
    budget = plan.memory_budget
    words = budget.words if budget.device else bytes_text(budget.total_bytes)
    return f"{plan.model}: memory of a training step, budget {words}"


def _training_sentence(kind: StepKind) -> str:
    task = "causal language model" if kind.task == "CAUSAL_LM" else "sequence classifier"
    base = f"base in {kind.quant_bits} bit" if kind.quant_bits else f"base in {kind.dtype}"
    mixed = f", autocast to {kind.autocast}" if kind.autocast else ""
    asked = kind.attn_implementation
    attention = "sdpa where the model has it" if asked == "auto" else asked
    checkpointing = "" if kind.gradient_checkpointing else "no "
    clip = "" if kind.clip else ", no clipping"
    return (
        f"Trained: {METHODS[kind.method]} on {targets_text(kind.target_modules)} of a {task}, "
        f"{base}, adapters in {kind.adapter_dtype}{mixed}; optimizer {kind.optimizer}{clip}; "
        f"attention {attention}; {checkpointing}gradient checkpointing; "
        f"on {'a CPU' if kind.device_type == 'cpu' else 'CUDA'}."
    )


def _allocation_sentence(kind: StepKind, init_ratio: float) -> str:
    score = "P, lambda and Q" if kind.score == "full" else "lambda alone"
    orthogonality = "" if kind.orth_reg else "; P and Q are not kept orthogonal"
    return (
        f"A rank is the target, and memory that of the initial one, {init_ratio:g} times as high; "
        f"importance from {score}{orthogonality}."
    )


def _step_sentence(plan: Plan) -> str:
    micro = plan.micro_batch_size
    if micro != "auto":
        parts = "at once" if micro == plan.batch_size else f"{micro} at a time"
    elif plan.memory_budget is None:
        parts = "at once, as there is no budget that could ask for micro-batches"
    else:
        parts = "in the largest micro-batches that fit"
    sequences = "sequence" if plan.batch_size == 1 else "sequences"
    return (
        f"A step: {plan.batch_size} {sequences} of up to {plan.max_length} tokens, {parts}; "
        "evaluation in batches of the same size."
    )


def _excess(plan: Plan, row: PlannedRank) -> str:
    over = bytes_text(-Shown(row, plan).headroom_bytes)
    at = f" at micro-batch {row.prediction.micro_batch_size}"
    return (
        f"needs {bytes_text(row.needed_bytes)}{at if plan.micro_batch_size == 'auto' else ''}, "
        f"{over} more than the budget"
    )


def _tried(kind: StepKind) -> list[str]:
    bases = [] if kind.method == "dora" else [b for b in (8, 4) if b < (kind.quant_bits or 16)]
    return [
        "micro-batches of 1",
        "gradient checkpointing",
        *(f"{'an' if bits == 8 else 'a'} {bits}-bit base" for bits in bases),
    ]


def _marked(shown: Shown, num_bytes: int) -> str:
    return ("~" if shown.row.prediction.estimated else "") + bytes_text(num_bytes)


def _bar(shown: Shown) -> str:
    return breakdown_bar(shown.row.prediction.breakdown)


def _place(shown: Shown) -> str:
    found = shown.row.prediction
    return f"{found.phase} {found.operation.removeprefix('aten.')}".rstrip()


def _has_budget(plan: Plan) -> bool:
    return plan.memory_budget is not None


def _has_parts(plan: Plan) -> bool:
    return plan.micro_batch_size != plan.batch_size


def _allocates(plan: Plan) -> bool:
    return plan.planner.kind.method in ADALORA_METHODS


def _names_card(plan: Plan) -> bool:
    return plan.memory_budget is None and plan.planner.kind.device_type == "cuda"


COLUMNS = (
    PlanColumn("rank", lambda s: str(s.row.rank)),
    PlanColumn("initial", lambda s: str(s.row.init_rank), _allocates, always=False),
    PlanColumn("micro", lambda s: str(s.row.prediction.micro_batch_size), _has_parts),
    PlanColumn("peak", lambda s: _marked(s, s.row.prediction.peak_bytes)),
    PlanColumn("needs", lambda s: _marked(s, s.row.needed_bytes)),
    PlanColumn("headroom", lambda s: bytes_text(s.headroom_bytes), _has_budget),
    PlanColumn("fits", lambda s: "yes" if s.row.fits else "no", _has_budget, justify="left"),
    PlanColumn("card", lambda s: smallest_card(s.plan, s.row), _names_card, justify="left"),
    PlanColumn("trained", lambda s: count_text(s.row.prediction.num_trainable_params)),
    PlanColumn("adapter", lambda s: bytes_text(s.row.adapter_bytes), always=False),
    PlanColumn("FLOPs/token", lambda s: count_text(s.row.prediction.flops_per_token), always=False),
    PlanColumn("parts of the peak", _bar, justify="left"),
    PlanColumn("peak in", _place, always=False, justify="left"),
)
