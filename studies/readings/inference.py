"""What a rank costs at inference, merged and unmerged: measured anew whenever it is read."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from rsauto.adapters.lora import add_adapter, lora_layers
from rsauto.base import load_weights, open_base, pick_device
from rsauto.memory.measure import PeakMeter
from rsauto.records import TrialRecord, TrialSpec

from .reading import Arms, Reading, Table, Verdict

ROWS, TOKENS = 4, 64
REPEATS = 30
ALIKE = 0.05
"""Relative differences of the median latency below this are those of the clock."""


def inference_cost(arms: Arms) -> Reading:
    """Sections 1 and 3: nothing, once it is merged."""
    study = arms[""]
    device = pick_device()
    base: Any = load_weights(open_base(study.config.model), study.config.model, device).model
    ids = torch.randint(base.config.vocab_size, (ROWS, TOKENS), device=device)
    files = {"base": _file_bytes(base)}
    adapters: dict[str, int] = {"base": 0}
    seconds = {"base": _latencies({"base": _pass_of(base, ids)})["base"]}
    peaks = {"base": _peak_bytes(base, ids, device)}
    ratios = {"base": 1.0}
    for record in sorted(study.records, key=lambda r: r.rank):
        # Never more than two models on the device, each timed in turn with the base.
        name = f"rank {record.rank}"
        own = _with_adapter(copy.deepcopy(base), record)
        trained = [p for p in own.parameters() if p.requires_grad]
        adapters[name] = sum(p.numel() * p.element_size() for p in trained)
        seconds[f"{name}, unmerged"], _ = _beside(base, own, ids)
        merged: Any = own.merge_and_unload()
        files[name], peaks[name] = _file_bytes(merged), _peak_bytes(merged, ids, device)
        seconds[name], ratios[name] = _beside(base, merged, ids)
    rows = [
        [
            name,
            f"{1000 * seconds[name]:.2f} ms",
            f"{(peaks[name] or 0) / 2**20:.2f} MiB",
            f"{files[name]:,}",
            f"{1000 * seconds.get(f'{name}, unmerged', seconds[name]):.2f} ms",
            f"{adapters[name] / 2**20:.2f} MiB",
        ]
        for name in files
    ]
    ranks = [name for name in files if name != "base"]
    slowest = max(abs(ratio - 1) for ratio in ratios.values())
    same_files = len(set(files.values())) == 1
    same_memory = len({peaks[name] for name in files}) == 1
    verdict: Verdict = (
        "reproduced" if same_files and same_memory and slowest <= ALIKE
        else "partly" if same_files and same_memory else "not reproduced"
    )  # fmt: skip
    unmerged = seconds[f"{ranks[-1]}, unmerged"] / seconds[ranks[-1]]
    return Reading(
        claim="Once the adapter is added to the weights a model costs the same at every rank "
        "(sections 1 and 3).",
        verdict=verdict,
        measured=f"Merged models of all ranks and the base: files "
        f"{'of the same size' if same_files else 'differ'}, peak memory "
        f"{'the same' if same_memory else 'differs'}, median latencies within {slowest:.1%} of the "
        f"base's. "
        f"Unmerged {ranks[-1]} takes {unmerged:.2f} times as long.",
        criterion=f"Reproduced where files and peak memory are equal to the byte and the median "
        f"latencies within {ALIKE:.0%}; partly where only the latter fails, which a busy machine "
        "does.",
        tables=[
            Table(
                title=f"One forward pass of {ROWS} rows of {TOKENS} tokens, median of {REPEATS} "
                "taken in turn.",
                headers=["", "merged", "peak memory", "file, bytes", "unmerged", "its adapter"],
                rows=rows,
            )
        ],
        remarks=[
            "The adapters are drawn at random: what they have learnt has no bearing on their cost.",
            "Rows of the table were timed at different moments; what is compared is each model and "
            "the base beside it, pass by pass in turn.",
        ],
    )


def _with_adapter(base: Any, record: TrialRecord) -> PeftModel:
    spec = TrialSpec(
        role="search",
        method=record.method,
        rank=record.rank,
        alpha=record.alpha,
        scaling_rule="rslora",
        learning_rate=record.learning_rate,
    )
    adapted = add_adapter(base, spec)
    for layer in lora_layers(adapted):
        nn.init.normal_(layer.lora_B["default"].get_parameter("weight"), std=0.01)
    return adapted.eval()


def _beside(base: nn.Module, model: nn.Module, ids: Tensor) -> tuple[float, float]:
    """Median seconds of a forward pass, and their ratio to the base's, taken in turn."""
    found = _latencies({"base": _pass_of(base, ids), "own": _pass_of(model, ids)})
    return found["own"], found["own"] / found["base"]


def _pass_of(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            model(input_ids=ids)
        if ids.device.type == "cuda":
            torch.cuda.synchronize()

    return run


def _latencies(passes: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Medians in seconds, taken in turn, so that a busy moment falls on all alike."""
    taken: dict[str, list[float]] = {name: [] for name in passes}
    for repeat in range(-2, REPEATS):
        for name, run in passes.items():
            begin = time.perf_counter()
            run()
            if repeat >= 0:
                taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in taken.items()}


def _peak_bytes(model: nn.Module, ids: Tensor, device: torch.device) -> int | None:
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    meter = PeakMeter(device, model, None)
    with meter.watch():
        _pass_of(model, ids)()
    peak = meter.peak_bytes
    # Of a GPU what else lies there, the base, is taken off.
    return peak if peak is None or not before else peak - (before - own)


def _file_bytes(model: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
