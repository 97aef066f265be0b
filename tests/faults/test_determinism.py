"""One worker on one machine: the same study gives the same records, alone and in packs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from forked import PUBLISHING, Undisturbed, require_equal, run_to, tiny
from processes import in_child
from tiny_study import environment, records

from rsauto.config import StudyConfig
from rsauto.search import pack_size


def weights_in(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("adapter_model.safetensors"))
    }


def repeated(config: StudyConfig, out: Path, stage: str | None = None) -> Path:
    code, said = in_child(lambda: run_to(config, out, stage), out.with_suffix(".log"))
    assert code == 0, said
    return out


def test_a_process_of_its_own_gives_the_same_records_and_adapters(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Another process has another hash seed, and random generators that stand elsewhere."""
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(undisturbed.config.model_dump(mode="json")), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "rsauto", "study", file, "--out", out],
        capture_output=True,
        text=True,
        env={**environment(), "PYTHONHASHSEED": "7"},
    )
    assert done.returncode == 0, done.stderr
    require_equal(out, undisturbed.out, set())
    assert weights_in(out) == weights_in(undisturbed.out)


def test_packs_of_equal_size_give_the_same_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many are trained together is found by the clock; equal K is what the promise is about."""
    monkeypatch.setattr(pack_size, "_seconds_alone", lambda *_: 1.0)
    monkeypatch.setattr(pack_size, "_seconds_packed", lambda *_: 1.0)
    grid = {"rank": [2, 4], "alpha": [8], "learning_rate": [1e-3, 1e-2]}
    config = tiny(tmp_path / "study", packed=3, trials=6, strategy="grid", pruner="none", **grid)
    one, other = (repeated(config, tmp_path / name, PUBLISHING) for name in ("one", "other"))
    assert max(record["pack_size"] or 1 for record in records(one)) == 3
    require_equal(one, other, set())
    assert weights_in(one) == weights_in(other)


def test_another_seed_gives_other_records(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """So that the comparison can fail."""
    config = undisturbed.config
    training = config.training.model_copy(update={"seed": config.training.seed + 1})
    other = config.model_copy(update={"training": training})
    out = repeated(other, tmp_path / "out", PUBLISHING)
    with pytest.raises(AssertionError, match="eval_loss"):
        require_equal(out, undisturbed.out, {"seed"})


def test_the_environment_says_what_would_explain_a_difference(undisturbed: Undisturbed) -> None:
    known = json.loads((undisturbed.out / "environment.json").read_text(encoding="utf-8"))
    named = {"torch", "transformers", "peft", "optuna", "numpy", "tokenizers", "safetensors"}
    assert named <= known["packages"].keys()
    for name in (
        "python", "platform", "device", "cpu", "cpu_instructions", "num_cpus", "num_threads",
        "num_interop_threads", "matmul_precision", "ram_bytes", "num_processes", "seed",
        "memory_budget_bytes", "model",
    ):  # fmt: skip
        assert known[name] not in (None, ""), name
    assert known["deterministic_algorithms"] is False
    assert known["fingerprints"].keys() == {"model", "data"}
