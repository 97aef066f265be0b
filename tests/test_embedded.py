"""The embedded model is the one that was recorded, and the task is frozen."""

from __future__ import annotations

import hashlib
import math
import mimetypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rsauto import embedded
from rsauto.embedded import task

# At most this many tokens per row: prompt, completion and end of text.
MAX_ROW_TOKENS = 64


def test_shipped_files_match_their_recorded_hashes() -> None:
    embedded.verify()
    recorded = set(embedded.provenance()["sha256"])
    assert recorded == {p.name for p in embedded.MODEL_DIR.iterdir()} - {"PROVENANCE.json"}


def test_verify_names_a_changed_and_a_missing_file(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(embedded.MODEL_DIR, folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors has SHA-256"):
        embedded.verify(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        embedded.verify(folder)


def test_import_loads_no_heavy_library() -> None:
    code = (
        "import sys, rsauto.embedded as e; e.load_split('train'); e.verify(); "
        "assert not {'torch', 'transformers', 'peft', 'optuna'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_model_predicts_text_it_was_not_trained_on() -> None:
    # The module's text differs a little between Python versions; the bound leaves room for that. A
    # model that knows nothing scores ln(1024) = 6.93.
    assert "mimetypes.py" in embedded.provenance()["data"]["held_out_files"]
    tokenizer = AutoTokenizer.from_pretrained(embedded.MODEL_DIR)
    model = AutoModelForCausalLM.from_pretrained(embedded.MODEL_DIR)
    text = Path(mimetypes.__file__).read_text(encoding="utf-8")
    sequences = torch.tensor(tokenizer(text)["input_ids"][: 32 * 128]).view(32, 128)
    with torch.no_grad():
        loss = model(input_ids=sequences, labels=sequences).loss.item()
    assert loss < 0.55 * math.log(tokenizer.vocab_size)


def test_splits_are_frozen_and_share_no_prompt() -> None:
    prompts: set[str] = set()
    for split in task.SPLITS:
        rows = task.load_split(split)
        assert task.split_sha256(rows) == task.SPLIT_SHA256[split]
        assert len({row["prompt"] for row in rows}) == len(rows)
        assert prompts.isdisjoint(row["prompt"] for row in rows)
        prompts.update(row["prompt"] for row in rows)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="holdout"):
        task.load_split("holdout")  # type: ignore[arg-type]


@pytest.mark.parametrize("hash_seed", ["0", "4711"])
def test_generation_does_not_depend_on_the_hash_seed(hash_seed: str) -> None:
    code = (
        "from rsauto.embedded import task; print(task.split_sha256(task.load_split('validation')))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    assert printed == task.SPLIT_SHA256["validation"]


def test_rows_survive_the_tokenizer_and_are_short() -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.MODEL_DIR)
    for split in task.SPLITS:
        for row in task.load_split(split):
            prompt = tokenizer(row["prompt"])["input_ids"]
            completion = tokenizer(row["completion"])["input_ids"]
            assert tokenizer.decode(prompt) == row["prompt"]
            assert tokenizer.decode(completion) == row["completion"]
            assert tokenizer.eos_token_id not in prompt + completion
            # Encoding the two apart is encoding the whole: no token spans the border.
            whole = tokenizer(row["prompt"] + row["completion"])["input_ids"]
            assert whole == prompt + completion
            assert len(whole) + 1 <= MAX_ROW_TOKENS


def test_validation_uses_no_word_that_training_lacks() -> None:
    def words(split: task.Split) -> set[str]:
        rows = task.load_split(split)
        return {word for row in rows for word in (row["prompt"] + row["completion"]).split()}

    assert words("validation") | words("test") <= words("train")


def test_hash_distinguishes_where_a_prompt_ends() -> None:
    left = [{"prompt": "ab", "completion": "c"}]
    right = [{"prompt": "a", "completion": "bc"}]
    assert task.split_sha256(left) != task.split_sha256(right)
    assert len(task.split_sha256(left)) == hashlib.sha256().digest_size * 2
