"""Profiles that are kept: from disk the same answers as from a trace, whatever befalls the disk."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planning import kind_of
from transformers import LlamaConfig, MistralConfig, T5Config

from rsauto.errors import InputError
from rsauto.memory import profiles as module
from rsauto.memory import trace
from rsauto.memory.kinds import StepKind, StepSize
from rsauto.memory.profiles import Profiles

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
)
WINDOWED = MistralConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, sliding_window=30,
)  # fmt: skip
T5 = T5Config(
    vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, num_labels=3,
    decoder_start_token_id=0,
)  # fmt: skip
KIND = kind_of(CONFIG)
SIZE = StepSize(12, 3, 20, 16)


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[StepKind]:
    """The kinds that were traced."""
    found: list[StepKind] = []
    real = trace.trace_step

    def counted(kind: StepKind, *args: Any, **kwargs: Any) -> Any:
        found.append(kind)
        return real(kind, *args, **kwargs)

    monkeypatch.setattr(trace, "trace_step", counted)
    return found


def test_what_is_on_disk_answers_like_a_trace(tmp_path: Path, traces: list[StepKind]) -> None:
    first = Profiles(tmp_path).predict(KIND, SIZE)
    assert len(traces) == 2
    assert Profiles(tmp_path).predict(KIND, SIZE) == first
    other = StepSize(40, 5, 17, 9)
    from_disk = Profiles(tmp_path).predict(KIND, other)
    assert len(traces) == 2, "another rank, batch and length are no reason to trace again"
    assert from_disk == Profiles().predict(KIND, other)
    assert Profiles(tmp_path).fits(KIND, other, from_disk.reserved_bytes)


def test_what_changes_bytes_is_another_entry(
    tmp_path: Path, traces: list[StepKind], monkeypatch: pytest.MonkeyPatch
) -> None:
    Profiles(tmp_path).predict(KIND, SIZE)
    Profiles(tmp_path).predict(replace(KIND, optimizer="sgd"), SIZE)
    Profiles(tmp_path).predict(KIND, SIZE._replace(micro_batch_size=1))
    assert len(traces) == 6
    monkeypatch.setattr(module, "_versions", lambda: ["torch 99"])
    Profiles(tmp_path).predict(KIND, SIZE)
    assert len(traces) == 8


@pytest.mark.parametrize("lengths", [(64, 20, 31), (20, 64, 31), (31, 20, 64)])
@pytest.mark.sample(1)
def test_a_profile_is_not_used_across_a_window(lengths: tuple[int, ...]) -> None:
    """Of 30 tokens; what is asked first must not matter."""
    profiles, kind = Profiles(), kind_of(WINDOWED, padded=False)
    for length in lengths:
        size = StepSize(12, 1, length, length)
        in_use = itertools.accumulate(
            math.copysign(-(-abs(event.nbytes) // 64) * 64, event.nbytes)
            for event in trace.trace_step(kind, size).events
        )
        assert profiles.predict(kind, size).peak_bytes == max(in_use)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "junk"])
@pytest.mark.sample(2)
def test_broken_files_are_made_again(tmp_path: Path, damage: str) -> None:
    expected = Profiles(tmp_path).predict(KIND, SIZE)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".npz", ".json"}
    for path in files:
        data = path.read_bytes()
        middle = len(data) // 2
        path.write_bytes(
            {
                "flip": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
                "cut": data[:middle],
                "empty": b"",
                "junk": json.dumps([[1, 2], "x"]).encode(),
            }[damage]
        )
    assert Profiles(tmp_path).predict(KIND, SIZE) == expected
    assert Profiles(tmp_path).predict(KIND, SIZE._replace(rank=5)).rank == 5


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    profiles = Profiles(tmp_path / "file")
    assert profiles.predict(KIND, SIZE) == Profiles().predict(KIND, SIZE)


def test_old_kinds_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_KINDS", 2)
    for rate in (0.1, 0.2, 0.3):
        Profiles(tmp_path).predict(replace(KIND, lora_dropout=rate), SIZE)
    assert len(list(tmp_path.iterdir())) == 2


def test_estimates_are_kept_as_well(tmp_path: Path, traces: list[StepKind]) -> None:
    kind = kind_of(T5, task="SEQ_CLS")
    found = Profiles(tmp_path).predict(kind, SIZE)
    assert found.estimated and "DynamicOutputShape" in found.estimate_reason
    num_traces = len(traces)
    assert Profiles(tmp_path).predict(kind, SIZE) == found
    assert Profiles(tmp_path).predict(kind, SIZE._replace(rank=99)).estimated
    assert len(traces) == num_traces


def test_the_closed_form_is_for_lora_alone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dora cannot be planned .* Plan rslora"):
        Profiles(tmp_path).predict(kind_of(T5, task="SEQ_CLS", method="dora"), SIZE)
