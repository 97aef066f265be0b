"""The packing benchmark on a tiny shape: what its rows and files hold, not how fast anything is."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "packing.py"
CONTRACT = {"shape", "tokens_per_trial", "ranks", "k", "ratio", "ceiling"}


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_packing", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def run(benchmark: ModuleType, patch: pytest.MonkeyPatch, out: Path) -> dict[str, Any]:
    """The script's quick run, on one shape that takes no time."""
    tiny = benchmark.Shape(16, 1, 2, 4, vocab_size=32, num_heads=2)
    patch.setattr(benchmark, "SHAPES", (tiny,))
    patch.setattr(benchmark, "MANY_STEPS", 13)
    benchmark.main(["--quick", "--json", "--device", "cpu", "--out", str(out)])
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def test_rows_say_what_the_contract_asks(
    benchmark: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = run(benchmark, monkeypatch, tmp_path / "packing.json")
    assert found == json.loads(capsys.readouterr().out)
    assert found.keys() == {"rows", "environment", "command"}
    assert [row["k"] for row in found["rows"]] == [1, 8]
    for row in found["rows"]:
        assert CONTRACT <= row.keys()
        assert row["tokens_per_trial"] == 8
        assert 0 < row["ratio"] and 0 < row["ceiling"] < row["ceiling_base"]
        assert sum(row["stack_sizes"]) == row["k"]


def test_the_same_rows_draw_the_same_plot(benchmark: ModuleType, tmp_path: Path) -> None:
    found = [
        {"shape": shape, "ranks": ranks, "k": k, "ratio": 0.5 + k, "ceiling": 1.0 + k}
        for shape in ("a x 1", "b x 2") for ranks in ("16", "2..64") for k in (1, 2, 4)
    ]  # fmt: skip
    for name in ("first.svg", "second.svg"):
        benchmark.plot(found, tmp_path / name)
    first = (tmp_path / "first.svg").read_bytes()
    assert first == (tmp_path / "second.svg").read_bytes()
    assert b"a x 1" in first and b"2..64" in first


def test_mixed_ranks_reach_from_2_to_64(benchmark: ModuleType) -> None:
    assert min(benchmark.RANKS["2..64"]) == 2 and max(benchmark.RANKS["2..64"]) == 64
    assert len(benchmark.RANKS["2..64"]) == 8
