"""Budgets by size and by GPU name; what CUDA keeps for itself; all of it without torch."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsauto.config import StudyConfig
from rsauto.devices import (
    DEVICES,
    GIB,
    MIB,
    context_bytes,
    find_device,
    parse_budget,
    workspace_bytes,
)
from rsauto.errors import InputError

BOXES = {
    "p100": 16, "v100-16": 16, "v100-32": 32, "t4": 16, "rtx2080ti": 11, "a30": 24, "a100-40": 40,
    "a100-80": 80, "a10": 24, "a10g": 24, "a40": 48, "a5000": 24, "a6000": 48, "rtx3060": 12,
    "rtx3080": 10, "rtx3090": 24, "l4": 24, "l40": 48, "l40s": 48, "rtx4070ti": 12, "rtx4080": 16,
    "rtx4090": 24, "rtx6000-ada": 48, "h100": 80, "h100-nvl": 94, "h200": 141, "b200": 192,
    "rtx5080": 16, "rtx5090": 32,
}  # fmt: skip
"""GB that the boxes say, from the makers' data sheets."""


def test_a_device_has_somewhat_less_than_its_box_says() -> None:
    assert BOXES.keys() == DEVICES.keys()
    for name, device in DEVICES.items():
        share = device.total_bytes / (BOXES[name] * GIB)
        assert 0.89 < share < 1, f"{name} has {share:.3f} of its box"
        assert device.name == name and device.source


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_is_found_by_its_name(name: str) -> None:
    for spelling in (name, name.upper(), name.replace("-", " "), name.replace("-", "_")):
        assert find_device(spelling) == DEVICES[name]
        assert parse_budget(f" {spelling} ").total_bytes == DEVICES[name].total_bytes


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("4090", "rtx4090"),
        ("RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4070 Ti", "rtx4070ti"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("Tesla V100-SXM2-16GB", "v100-16"),
        ("Tesla P100-PCIE-16GB", "p100"),
        ("Tesla T4", "t4"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000-ada"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_a_device_is_found_by_what_cuda_and_people_call_it(spelling: str, name: str) -> None:
    assert find_device(spelling) == DEVICES[name]


@pytest.mark.parametrize("text", ["24GiB", "500 MB", "100", "4090GB", "4090 MiB", "-4090", "ada"])
def test_sizes_and_other_words_are_no_devices(text: str) -> None:
    assert find_device(text) is None


def test_a_budget_says_what_it_is() -> None:
    size = parse_budget(" 24GiB ")
    assert (size.total_bytes, size.device, size.words) == (24 * GIB, None, "24GiB")
    card = parse_budget("RTX-4090")
    assert card.device == DEVICES["rtx4090"]
    assert card.words == "rtx4090 (23.52 GiB)"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lots", "memory_budget: 'lots': give a size such as 24GiB, 512MiB or a number of bytes, "
                 "or auto, or a GPU such as rtx4090 or a100-80."),
        ("rtx4091", "or a GPU such as rtx4090 or a100-80. Did you mean 'rtx4090'?"),
        ("3090ti", "or auto. Did you mean 'rtx3090'?"),
        ("a100", "memory_budget: 'a100': a100 comes in two sizes: give a100-40 or a100-80."),
        ("Tesla V100", "v100 comes in two sizes: give v100-16 or v100-32."),
        ("auto", "memory_budget: 'auto': auto asks a device"),
        ("0GiB", "memory_budget: '0GiB': must be more than zero bytes."),
        ("9" * 400, "must be at most 2^60 bytes."),
        ("", "memory_budget: ''"),
    ],
)  # fmt: skip
def test_a_budget_that_is_none_is_refused_with_what_is_allowed(text: str, says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        parse_budget(text)


@given(st.text(max_size=20))
def test_any_text_is_a_budget_or_an_input_error(text: str) -> None:
    try:
        assert parse_budget(text).total_bytes > 0
    except InputError as error:
        assert str(error).startswith("memory_budget: ")


@pytest.mark.parametrize("value", ["rtx4090", "RTX 4090", "4090", 4090])
def test_a_study_takes_a_device_as_its_budget(value: Any) -> None:
    assert StudyConfig(memory_budget=value).memory_budget == DEVICES["rtx4090"].total_bytes


def test_a_study_refuses_a_name_of_two_sizes() -> None:
    with pytest.raises(ValueError, match="give a100-40 or a100-80"):
        StudyConfig(memory_budget="a100")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "each"),
    [("a100-80", 8.125), ("t4", 8.125), ("rtx4090", 8.125), ("h100", 32), ("b200", 32),
     ("rtx5090", 32)],
)  # fmt: skip
def test_workspaces_are_one_for_forward_and_one_for_backward(name: str, each: float) -> None:
    assert workspace_bytes(DEVICES[name]) == 2 * each * MIB


def test_an_unknown_device_is_planned_with_the_largest_workspace() -> None:
    assert workspace_bytes(None) == max(workspace_bytes(device) for device in DEVICES.values())
    assert context_bytes(None) >= max(context_bytes(device) for device in DEVICES.values())
    assert 0.3 * GIB < context_bytes(None) < 0.7 * GIB


def test_budgets_presets_and_estimates_are_read_without_torch() -> None:
    code = (
        "import sys; import rsauto.devices, rsauto.memory.presets, rsauto.memory.estimate; "
        "print([m for m in ('torch', 'transformers', 'peft', 'pandas') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
