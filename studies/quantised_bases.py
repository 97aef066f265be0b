"""8-bit and 4-bit bases on a CPU: what they cost in loss, and whether their memory is predicted.

    python studies/quantised_bases.py [--out reports/quantised-bases]

Every trial is one of a study on the embedded task: same data, steps, learning rate (the centre of
the search range at its rank) and seed; only the base's precision differs. Predicted and measured
peaks share no code: a trace without weights, and torch.profiler's allocator events of the run.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

import pandas as pd

from rsauto import study_file
from rsauto.search.setup import Setup, set_up
from rsauto.training.loop import evaluate_all
from rsauto.training.trial import Bench, Trial

BASES = {"embedded": 64, "studies/base-10m": 32}
"""Base models, and the optimizer steps of a trial on each."""

RANKS = (8, 64)
SEEDS = (0, 1, 2)
PRECISIONS = (("float32", "null"), ("8 bit", "8"), ("4 bit (nf4)", "4"))


def open_setup(base: str, steps: int, bits: str, adapter_dtype: str) -> Setup:
    """The embedded study on `base` in some precision."""
    sets = {
        "model.name": base,
        "model.dtype": "float32",
        "model.quant_bits": bits,
        "model.adapter_dtype": adapter_dtype,
        "memory_budget": "4GiB",
        "training.steps": steps,
        "search.rank": list(RANKS),
    }
    return set_up(study_file.load(sets=[f"{key}={value}" for key, value in sets.items()]))


def run(base: str, precision: str, bits: str, adapter_dtype: str) -> list[dict[str, object]]:
    """One row a trial, all ranks and seeds on one loaded base."""
    setup = open_setup(base, BASES[base], bits, adapter_dtype)
    bench = Bench(
        model=setup.load_model().model, base_name=base, data=setup.data, device=setup.device
    )
    untouched = evaluate_all(bench.model, bench.data, batch_size=16, device=bench.device)
    rows: list[dict[str, object]] = []
    for rank, seed in itertools.product(RANKS, SEEDS):
        spec = replace(setup.space.middle(rank), seed=seed)
        prediction = setup.predict(spec)
        assert prediction is not None
        with Trial(bench, replace(spec, micro_batch_size=prediction.micro_batch_size)) as trial:
            for _ in trial.steps():
                pass
            rows.append(
                {
                    "base": base,
                    "precision": precision,
                    "adapter_dtype": adapter_dtype,
                    "rank": rank,
                    "seed": seed,
                    "untouched_loss": untouched.eval_loss,
                    "eval_loss": trial.curve[-1].eval_loss,
                    "predicted_peak_bytes": prediction.peak_bytes,
                    "measured_peak_bytes": trial.measured_peak_bytes,
                    "train_seconds": round(trial.train_seconds, 2),
                }
            )
            print(rows[-1], flush=True)
    return rows


def summary(trials: pd.DataFrame) -> str:
    """A Markdown table: a base, a precision and a rank a row."""
    lines = [
        "| base | precision | adapters | rank | untouched loss | loss after | predicted MiB | "
        "measured MiB | error | s |",
        "|:--|:--|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    keys = ["base", "precision", "adapter_dtype", "rank"]
    for (base, precision, adapters, rank), group in trials.groupby(keys, sort=False):
        predicted, measured = group.predicted_peak_bytes.max(), group.measured_peak_bytes.max()
        lines.append(
            f"| {base} | {precision} | {adapters} | {rank} | {group.untouched_loss.mean():.3f} | "
            f"{group.eval_loss.mean():.3f} ± {group.eval_loss.std():.3f} | "
            f"{predicted / 2**20:.2f} | {measured / 2**20:.2f} | "
            f"{predicted / measured - 1:+.2%} | {group.train_seconds.mean():.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description="Compare precisions of the base.")
    parser.add_argument("--out", type=Path, default=Path("reports/quantised-bases"))
    out: Path = parser.parse_args().out
    rows = []
    for base in BASES:
        for precision, bits in PRECISIONS:
            rows += run(base, precision, bits, "float32")
        rows += run(base, "4 bit (nf4)", "4", "bfloat16")
    trials = pd.DataFrame(rows)
    out.mkdir(parents=True, exist_ok=True)
    trials.to_csv(out / "trials.csv", index=False)
    text = (
        "# 8-bit and 4-bit bases on a CPU\n\n"
        f"Loss: mean ± standard deviation over seeds {SEEDS} on the embedded task's validation "
        "rows, rsLoRA on all linear layers. Memory: the largest trial of each row; tensors only. "
        "Made by `python studies/quantised_bases.py`; every trial is in trials.csv.\n\n"
    )
    (out / "README.md").write_text(text + summary(trials) + "\n", encoding="utf-8")
    print(summary(trials))


if __name__ == "__main__":
    main()
