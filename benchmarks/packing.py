"""Trials that share one pass over the base beside stock PEFT's one after the other.

    python benchmarks/packing.py [--quick] [--json] [--threads N] [--device cuda]
                                 [--out reports/benchmarks/packing.json]

A row is one shape, one set of ranks and K trials. In every round each of four takes its turn, so
that whatever else the machine does falls on all of them; a ratio is the median over rounds of the
quotient of two times of one round, and above 1 where packing is faster.

stock     K steps of stock PEFT, one trial after the other in one process: fused AdamW, gradients
          clipped, one base loaded once, batches ready as tensors
packed    one step of `rsauto.training.packed.Pack` with K trials, all that a study's step does
base      forward and backward of the frozen base alone, with the rows of K trials
products  the products with A and B that K adapters need, equal ranks batched, without padding

ratio         stock / packed
ceiling       stock / (base + products)
ceiling_base  stock / base
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from rsauto.atomic import write_text
from rsauto.base import prepare
from rsauto.data import Example, TokenisedData
from rsauto.data.tokens import Fit
from rsauto.embedded import MODEL_DIR
from rsauto.environment import describe_environment
from rsauto.records import TrialSpec
from rsauto.training.loss import cross_entropy_of_trials
from rsauto.training.packed import Pack
from rsauto.training.trial import Bench

COUNTS = (1, 2, 4, 8, 16, 32)
RANKS = {"16": (16,), "2..64": (2, 64, 16, 8, 4, 32, 8, 16)}
"""Of trial after trial, from the beginning again where there are more."""

MANY_STEPS = 600
"""More than are ever measured."""


@dataclass(frozen=True)
class Shape:
    """A Llama with random weights, and what one trial brings to a step."""

    hidden_size: int
    num_layers: int
    num_rows: int
    length: int
    intermediate_size: int = 0
    vocab_size: int = 1024
    num_heads: int = 4
    name: str = ""

    @property
    def label(self) -> str:
        return f"{self.name or f'h{self.hidden_size} L{self.num_layers}'} x {self.tokens}"

    @property
    def tokens(self) -> int:
        return self.num_rows * self.length


SHAPES = (
    Shape(64, 2, 1, 16, vocab_size=512),
    Shape(128, 2, 1, 64),
    Shape(256, 4, 1, 64, vocab_size=2048),
    Shape(128, 4, 16, 25, name="embedded"),
    Shape(256, 4, 1, 256, vocab_size=2048),
)

CUDA_SHAPES = tuple(
    Shape(896, 24, 1, tokens, 4864, 151_936, 14, "0.5B") for tokens in (128, 512, 2048, 8192)
) + tuple(Shape(4096, 32, 1, tokens, 11_008, 32_000, 32, "7B") for tokens in (128, 512, 2048, 8192))


def base_of(shape: Shape, device: torch.device) -> Any:
    """The base, frozen; in bfloat16 on a GPU."""
    torch.manual_seed(0)
    if shape.name == "embedded":
        config = AutoConfig.from_pretrained(MODEL_DIR)
    else:
        config = AutoConfig.for_model(
            "llama",
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size or shape.hidden_size * 11 // 4,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_heads,
            max_position_embeddings=max(512, shape.length),
        )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        return prepare(AutoModelForCausalLM.from_config(config, dtype=dtype), False)


def examples(shape: Shape) -> tuple[Example, ...]:
    """Random sequences, all of one length."""
    generator = torch.Generator().manual_seed(1)
    size = (4 * shape.num_rows, shape.length)
    ids = torch.randint(2, shape.vocab_size, size, generator=generator)
    return tuple(Example(tuple(row), 0) for row in ids.tolist())


class Stock:
    """A trial in stock PEFT, on a base whose weights are everybody's."""

    def __init__(self, base: nn.Module, rank: int, batch: Tensor) -> None:
        own = copy.deepcopy(base, {id(p): p for p in base.parameters()})
        config = LoraConfig(
            r=rank,
            lora_alpha=16,
            use_rslora=True,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        self.model: Any = get_peft_model(own, config).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.0, fused=True)
        self.inputs = {"input_ids": batch, "attention_mask": torch.ones_like(batch)}

    def step(self) -> None:
        loss = self.model(**self.inputs, labels=self.inputs["input_ids"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()


def step_all(trials: Sequence[Stock]) -> None:
    for trial in trials:
        trial.step()


def packed(base: Any, shape: Shape, ranks: Sequence[int], device: torch.device) -> Pack:
    """A pack with a trial of every rank."""
    rows = examples(shape)
    data = TokenisedData(
        train=rows,
        validation=rows[:1],
        train_fit=Fit(lengths=(), num_truncated=0, num_dropped=0),
        validation_fit=Fit(lengths=(), num_truncated=0, num_dropped=0),
        pad_token_id=0,
        train_length=shape.length,
        validation_length=shape.length,
        fingerprint="",
    )
    bench = Bench(model=base, base_name="benchmark", data=data, device=device)
    pack = Pack(bench, optimizer="adamw", rows=shape.num_rows)
    for rank in ranks:
        pack.admit(
            TrialSpec(
                role="search",
                method="rslora",
                scaling_rule="rslora",
                rank=rank,
                alpha=16,
                learning_rate=1e-4,
                batch_size=shape.num_rows,
                micro_batch_size=shape.num_rows,
                max_length=shape.length,
                steps=MANY_STEPS,
                num_evals=1,
            )
        )
    return pack


def base_alone(base: Any, batch: Tensor, count: int) -> Callable[[], None]:
    """Forward and backward with the rows of ``count`` trials, no further down than adapters are."""
    own = copy.deepcopy(base, {id(p): p for p in base.parameters()}).train()
    for layer in _adapted(own).values():
        layer.register_forward_hook(
            lambda _layer, _inputs, y: y if y.requires_grad else y.requires_grad_()
        )
    rows = batch.repeat(count, 1)
    inputs = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}

    def step() -> None:
        loss = cross_entropy_of_trials(own(**inputs).logits, rows, count).sum()
        loss.backward()
        loss.item()

    return step


def products(base: Any, tokens: int, ranks: Sequence[int], like: Tensor) -> Callable[[], None]:
    """The six products of every adapted layer; the first layers need no gradient of their input."""
    layers = [
        (layer.in_features, layer.out_features, ".0.self_attn." in name and "o_proj" not in name)
        for name, layer in _adapted(base).items()
    ]
    groups: list[list[Any]] = []
    for (d_in, d_out, first), (rank, count) in itertools.product(layers, Counter(ranks).items()):
        sizes = ((tokens, d_in), (tokens, d_out), (rank, d_in), (d_out, rank))
        groups.append([like.new_ones(count, *size) for size in sizes] + [first])

    @torch.no_grad()
    def step() -> None:
        for x, y, a, b, first in groups:
            h = torch.bmm(x, a.mT)
            y.baddbmm_(h, b.mT)
            dh = torch.bmm(y, b)
            torch.bmm(y.mT, h)
            torch.bmm(dh.mT, x)
            if not first:
                x.baddbmm_(dh, a)
            y.fill_(1e-3), x.fill_(1e-3)  # so that nothing grows without end

    return step


def _adapted(base: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: layer
        for name, layer in base.named_modules()
        if isinstance(layer, nn.Linear) and "lm_head" not in name
    }


def seconds_of(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def row(
    base: Any, shape: Shape, kind: str, count: int, seconds: float, device: torch.device
) -> dict[str, Any] | None:
    """One measurement of about ``seconds``; None where the device has no room for so many."""
    ranks = list(itertools.islice(itertools.cycle(RANKS[kind]), count))
    batch = torch.tensor([e.input_ids for e in examples(shape)[: shape.num_rows]], device=device)
    stock = {rank: Stock(base, rank, batch) for rank in set(ranks)}
    like = torch.zeros((), device=device)
    with packed(base, shape, ranks, device) as pack:
        turns: dict[str, Callable[[], object]] = {
            "stock": lambda: step_all([stock[rank] for rank in ranks]),
            "packed": pack.advance,
            "base": base_alone(base, batch, count),
            "products": products(base, shape.tokens, ranks, like),
        }
        peaks = {}
        for name, turn in turns.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            for _ in range(3 if name == "packed" else 1):  # its second measures memory
                turn()
            if pack.parked:
                return None
            if device.type == "cuda":
                peaks[f"{name}_peak_bytes"] = torch.cuda.max_memory_allocated()
        rounds: list[dict[str, float]] = []
        end = time.perf_counter() + seconds
        while len(rounds) < 3 or (time.perf_counter() < end and len(rounds) < MANY_STEPS - 10):
            rounds.append({name: seconds_of(turn, device) for name, turn in turns.items()})
        sizes = [len(table) for table in pack._model.tables]

    def ratio(*names: str) -> float:
        return statistics.median(one["stock"] / sum(one[n] for n in names) for one in rounds)

    return {
        "shape": shape.label,
        "tokens_per_trial": shape.tokens,
        "ranks": kind,
        "k": count,
        "ratio": ratio("packed"),
        "ceiling": ratio("base", "products"),
        "ceiling_base": ratio("base"),
        **{f"{name}_seconds": statistics.median(one[name] for one in rounds) for name in turns},
        "stack_sizes": sizes,
        "rounds": len(rounds),
        "num_threads": torch.get_num_threads(),
        **peaks,
    }


def rows(
    shapes: Sequence[Shape],
    kinds: Sequence[str],
    counts: Sequence[int],
    seconds: float,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """Of every shape and set of ranks, up to as many trials as there is room for."""
    for shape in shapes:
        base = base_of(shape, device)
        for kind in kinds:
            for count in counts:
                try:
                    found = row(base, shape, kind, count, seconds, device)
                except torch.OutOfMemoryError:
                    found = None
                if found is None:
                    break
                yield found


def plot(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Ratio against K by shape with the ceiling dashed, one panel for every set of ranks."""
    kinds = list(dict.fromkeys(one["ranks"] for one in found))
    with rc_context({"svg.hashsalt": "rsauto", "svg.fonttype": "none"}):
        figure = Figure(figsize=(5.2 * len(kinds), 4.2), layout="constrained")
        panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        for panel, kind in zip(panels, kinds, strict=True):
            for n, label in enumerate(dict.fromkeys(one["shape"] for one in found)):
                points = [o for o in found if o["ranks"] == kind and o["shape"] == label]
                counts = [one["k"] for one in points]
                panel.plot(counts, [o["ratio"] for o in points], "o-", color=f"C{n}", label=label)
                panel.plot(counts, [o["ceiling"] for o in points], "--", color=f"C{n}", alpha=0.5)
            panel.axhline(1.0, color="0.6", linewidth=0.8)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            panel.xaxis.set_major_formatter("{x:.0f}")
            panel.yaxis.set_major_formatter("{x:g}")
            panel.set_title(f"ranks {kind}")
            panel.set_xlabel("trials at once, K")
        panels[0].set_ylabel("stock PEFT one by one / packed; ceiling dashed")
        panels[0].legend(title="shape x tokens of a trial", frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def summary(found: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'shape':<20} {'ranks':>6} {'K':>3} {'ratio':>6} {'ceiling':>8} {'of it':>6}"]
    for one in found:
        lines.append(
            f"{one['shape']:<20} {one['ranks']:>6} {one['k']:>3} {one['ratio']:>6.2f} "
            f"{one['ceiling']:>8.2f} {one['ratio'] / one['ceiling']:>6.0%}"
        )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Command line of the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two small shapes, K = 1 and 8")
    parser.add_argument("--json", action="store_true", help="rows as one JSON object")
    parser.add_argument("--out", type=Path, default=None, help="file to write the rows to")
    parser.add_argument("--threads", type=int, default=None, help="of torch, default its own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(words)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    shapes = CUDA_SHAPES if device.type == "cuda" else SHAPES
    kinds, seconds = tuple(RANKS), 1.5
    counts: tuple[int, ...] = COUNTS
    if arguments.quick:
        shapes, kinds, counts, seconds = shapes[:2], kinds[:1], (1, 8), 1.0
    found = []
    for one in rows(shapes, kinds, counts, seconds, device):
        found.append(one)
        print(json.dumps(one), file=sys.stderr, flush=True)
    result = {
        "rows": found,
        "environment": describe_environment(device),
        "command": " ".join(["python", *sys.argv]),
    }
    print(json.dumps(result) if arguments.json else summary(found))
    out = arguments.out or (None if arguments.quick else Path("reports/benchmarks/packing.json"))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(result, indent=1) + "\n")
        plot(found, out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
