"""Predictions against measurements that know nothing of the recorder: the allocations that
torch.profiler reports for a plain training loop, and the high-water mark of a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from planning import kind_of, planner_of
from test_memory import GPT2, LLAMA, QWEN2, error, plain_evaluation, plain_step, random_batch
from test_quantised import LLAMA as WIDE
from test_quantised import quantised, write
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import BertConfig, LlamaConfig, PretrainedConfig

from rsauto.base import prepare
from rsauto.memory.kinds import Bits, StepKind
from rsauto.memory.measure import PeakMeter
from rsauto.memory.methods import adapt
from rsauto.memory.trace import build_model
from rsauto.memory.traced_optimizers import planned_optimizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

LENGTH = 48
CPU = torch.device("cpu")
ADALORA: dict[str, Any] = {"method": "peft_adalora"}
BERT = BertConfig(
    hidden_size=64, num_hidden_layers=2, intermediate_size=160, vocab_size=512,
    num_attention_heads=2, num_labels=3,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch_of(kind: StepKind, num_sequences: int, length: int) -> dict[str, Tensor]:
    batch = random_batch(num_sequences, length)
    return {**batch, "labels": batch["labels"][:, 0] % 3} if kind.task == "SEQ_CLS" else batch


def importance(model: PeftModel) -> dict[str, Tensor]:
    """What PEFT's AdaLoRA keeps beside its parameters: three numbers for each of them."""
    allocator: Any = getattr(model.base_model, "rankallocator", None)
    names = ("ipt", "exp_avg_ipt", "exp_avg_unc") if allocator is not None else ()
    tables = [getattr(allocator, name) for name in names]
    return {f"{n}.{key}": table[key] for n, table in enumerate(tables) for key in table}


def adalora_step(
    model: PeftModel, optimizer: Optimizer, batches: list[dict[str, Tensor]], number: int
) -> None:
    """As PEFT's documentation has it."""
    for batch in batches:
        model(**batch).loss.backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    tuner: Any = model.base_model
    tuner.update_and_allocate(number)
    optimizer.zero_grad()


def measured_peak(model: PeftModel, kind: StepKind, num_sequences: int, eval_length: int) -> int:
    """Of the second step, whose optimizer has its states, and of an evaluation."""
    optimizer = planned_optimizer(model, kind.optimizer, "cpu")
    meter = PeakMeter(CPU, model, optimizer)
    batches = [batch_of(kind, num_sequences, LENGTH) for _ in range(2 if kind.accumulate else 1)]
    model.train()
    for number in (1, 2):
        optimizer.state["importance"] = importance(model)
        with meter.watch(heavy=number == 2):
            del optimizer.state["importance"]  # counted as resident, but not kept alive
            with torch.autocast("cpu", enabled=kind.autocast is not None):
                if kind.method == "peft_adalora":
                    adalora_step(model, optimizer, batches, number)
                else:
                    plain_step(model, optimizer, batches)
    model.eval()
    optimizer.state["importance"] = importance(model)
    with meter.watch(), torch.autocast("cpu", enabled=kind.autocast is not None):
        plain_evaluation(model, batch_of(kind, num_sequences, eval_length))
    assert meter.peak_bytes is not None
    return meter.peak_bytes


def predicted_peak(
    kind: StepKind, config: PretrainedConfig, rank: int, num_sequences: int, eval_length: int
) -> int:
    changes = {name: getattr(kind, name) for name in kind.__slots__ if name != "model_config"}
    planner = planner_of(config, LENGTH, eval_length, **changes)
    batch_size = 2 * num_sequences if kind.accumulate else num_sequences
    return planner.predict(rank, batch_size=batch_size, micro_batch_size=num_sequences).peak_bytes


CASES: list[tuple[PretrainedConfig, dict[str, Any], int]] = [
    (LLAMA, {}, 4),
    (LLAMA, {}, 256),
    (LLAMA, {"accumulate": True}, 64),
    (LLAMA, {"lora_dropout": 0.1}, 16),
    (LLAMA, {"dtype": "bfloat16"}, 16),
    (LLAMA, {"dtype": "bfloat16", "adapter_dtype": "bfloat16"}, 64),
    (LLAMA, {"autocast": "bfloat16"}, 16),
    (LLAMA, {"dtype": "bfloat16", "autocast": "bfloat16", "lora_dropout": 0.1}, 64),
    (LLAMA, {"attn_implementation": "eager"}, 8),
    (LLAMA, {"target_modules": "attention"}, 32),
    (LLAMA, {"optimizer": "adamw_foreach"}, 256),
    (LLAMA, {"optimizer": "adamw_loop"}, 128),
    (LLAMA, {"optimizer": "adafactor"}, 128),
    (LLAMA, {"optimizer": "sgd"}, 128),
    (LLAMA, {"method": "dora"}, 16),
    (LLAMA, {"method": "dora", "lora_dropout": 0.1, "accumulate": True}, 64),
    (LLAMA, ADALORA, 8),
    (LLAMA, {**ADALORA, "dtype": "bfloat16", "lora_dropout": 0.1}, 64),
    (LLAMA, {**ADALORA, "accumulate": True}, 256),
    (GPT2, {"optimizer": "adamw_loop"}, 32),
    (GPT2, {**ADALORA}, 16),
    (QWEN2, {"method": "dora", "optimizer": "sgd"}, 16),
    (BERT, {"task": "SEQ_CLS"}, 16),
    (BERT, {"task": "SEQ_CLS", "optimizer": "adafactor", "lora_dropout": 0.1}, 128),
]


@pytest.mark.parametrize("config, changes, rank", CASES)
@pytest.mark.sample(6)
def test_the_profiler_sees_what_was_predicted(
    config: PretrainedConfig, changes: dict[str, Any], rank: int
) -> None:
    kind = kind_of(config, **changes)
    num_sequences, eval_length = (4, LENGTH) if rank % 3 else (1, 64)
    predicted = predicted_peak(kind, config, rank, num_sequences, eval_length)
    measured = measured_peak(build_model(kind, rank), kind, num_sequences, eval_length)
    assert abs(error(predicted, measured)) < 0.005


@pytest.mark.parametrize(
    "bits, changes",
    [
        (8, {"lora_dropout": 0.1}),
        (4, {"dtype": "bfloat16", "lora_dropout": 0.1}),
        (4, {"method": "dora"}),
        (4, {"method": "dora", "lora_dropout": 0.1}),
        (8, {**ADALORA, "lora_dropout": 0.1}),
        (4, ADALORA),
    ],
)
@pytest.mark.sample(2)
def test_bitsandbytes_allocates_what_was_predicted(
    tmp_path: Path, bits: Bits, changes: dict[str, Any]
) -> None:
    kind = kind_of(WIDE, quant_bits=bits, **changes)
    dtype = getattr(torch, kind.dtype)
    base = prepare(quantised(write(tmp_path, WIDE), bits, dtype), gradient_checkpointing=False)
    measured = measured_peak(adapt(base, kind, 18), kind, 4, LENGTH)
    predicted = predicted_peak(kind, WIDE, 18, 4, LENGTH)
    assert abs(error(predicted, measured)) < 0.005


# The process as the operating system sees it.

REFERENCES = Path("/proc/self/clear_refs")
LARGE = LlamaConfig(
    hidden_size=1024, num_hidden_layers=8, intermediate_size=2816, vocab_size=32000,
    num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=False,
)  # fmt: skip
NUM_SEQUENCES, NUM_TOKENS = 2, 128


def _status(key: str) -> int:
    """Bytes of an entry of /proc/self/status, which counts in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _train(config: LlamaConfig, rank: int) -> None:
    """Two steps; the mark of the second stays."""
    kind = kind_of(config)
    model = build_model(kind, rank).train()
    optimizer = planned_optimizer(model, kind.optimizer, "cpu")
    for _ in range(2):
        REFERENCES.write_text("5")  # sets the high-water mark to what is resident now
        plain_step(model, optimizer, [random_batch(NUM_SEQUENCES, NUM_TOKENS)])


def _print_high_water(rank: int) -> None:
    torch.set_num_threads(1)
    _train(LLAMA, 4)  # libraries load on first use
    before = _status("VmRSS")
    _train(LARGE, rank)
    print(_status("VmHWM") - before)


def _is_writable() -> bool:
    try:
        REFERENCES.write_text("5")
    except OSError:
        return False
    return True


@pytest.mark.skipif(not _is_writable(), reason="needs a writable /proc/self/clear_refs")
@pytest.mark.parametrize("rank", [32, 512])
@pytest.mark.sample(1)
def test_the_high_water_mark_of_a_process_is_near(rank: int) -> None:
    """With 0.18 B parameters. Small blocks are given back at once, so that freed is free."""
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    child = subprocess.run(
        [sys.executable, __file__, str(rank)],
        env={**os.environ, **settings, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    measured = int(child.stdout.split()[-1])
    planner = planner_of(LARGE, NUM_TOKENS, 1)
    predicted = planner.predict(
        rank, batch_size=NUM_SEQUENCES, micro_batch_size=NUM_SEQUENCES
    ).peak_bytes
    assert abs(error(predicted, measured)) < 0.02


if __name__ == "__main__":
    _print_high_water(int(sys.argv[1]))
