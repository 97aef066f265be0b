"""A study small enough to run in seconds: a random two-layer model, a few rows, few steps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rsauto.embedded import MODEL_DIR


def write_model(folder: Path, hidden_size: int = 32) -> Path:
    """A random Llama with the embedded tokenizer, saved as a local folder."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(count: int, first: int = 0) -> list[dict[str, str]]:
    """Rows of different lengths that can be learnt: count downwards."""
    return [
        {"prompt": f"{n} down:", "completion": " " + " ".join(str(n - k) for k in range(n % 4 + 1))}
        for n in range(first, first + count)
    ]


def write_data(folder: Path) -> Path:
    """A folder with train, validation and test files."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"train": rows(64), "validation": rows(12, 100), "test": rows(12, 200)}
    for name, content in splits.items():
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def study_values(folder: Path, **search: Any) -> dict[str, Any]:
    """A study of ten short trials whose budget leaves out the largest rank."""
    return {
        "name": "tiny",
        "memory_budget": "2MiB",
        "model": {"name": str(write_model(folder / "model"))},
        "data": {"name": str(write_data(folder / "data")), "max_length": 32},
        "training": {"steps": 6, "batch_size": 4, "num_evals": 3},
        "search": {
            "trials": 12,
            "rank": {"low": 2, "high": 256},
            "alpha": [8, 16],
            "learning_rate": {"low": 1e-3, "high": 1e-1},
            **search,
        },
    }


def write_study(folder: Path, **search: Any) -> Path:
    """The same as a study file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(study_values(folder, **search)), encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    """For subprocesses: offline, one thread, so that results are bit-equal."""
    inherited = dict(os.environ)
    inherited.pop("PYTHONDONTWRITEBYTECODE", None)  # compiling rsauto is a tenth of a start
    return {**inherited, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def records(out: Path) -> list[dict[str, Any]]:
    """Lines of trials.jsonl, read with nothing of rsauto."""
    path = out / "trials.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
