"""Presets against transformers' own models of them, and configurations from files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rsauto.errors import InputError
from rsauto.memory.presets import (
    MAX_CONFIG_BYTES,
    PRESET_NAMES,
    is_preset,
    model_preset,
    preset_num_params,
    read_model_config,
)

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
}


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_a_preset_builds_the_published_model(name: str) -> None:
    fields = model_preset(name)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == preset_num_params(name)
    assert [type(model).__name__] == fields["architectures"]
    assert str(model.dtype) == f"torch.{fields['dtype']}"
    rope = getattr(config, "rope_parameters", None)
    assert rope == fields.get("rope_parameters")


def test_grouped_queries_and_gated_layers_are_counted_by_hand_too() -> None:
    hidden, inner, layers, vocab, key_values = 4096, 14336, 32, 128256, 8 * 128
    layer = 2 * hidden * hidden + 2 * hidden * key_values + 3 * hidden * inner + 2 * hidden
    assert preset_num_params("llama-3.1-8b") == 2 * vocab * hidden + layers * layer + hidden


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("GPT2", "gpt-2"),
        ("gpt-j", "gpt-j-6b"),
        ("Llama_3.1_8B", "llama-3.1-8b"),
        ("Qwen/Qwen2.5-7B", "qwen2.5-7b"),
        ("mistralai/Mistral-7B-v0.3", "mistral-7b"),
        (" qwen3-4b ", "qwen3-4b"),
    ],
)
def test_a_preset_is_found_by_other_spellings(spelling: str, name: str) -> None:
    assert is_preset(spelling)
    assert model_preset(spelling) == model_preset(name)
    assert preset_num_params(spelling) == preset_num_params(name)


def test_a_preset_is_a_copy() -> None:
    config = model_preset("llama-3.1-8b")
    config["rope_parameters"]["factor"] = 99
    config.clear()
    assert model_preset("llama-3.1-8b")["rope_parameters"]["factor"] == 8.0


def test_an_unknown_preset_is_refused_with_the_nearest() -> None:
    assert not is_preset("llama-3.1-9b")
    with pytest.raises(InputError, match=r"model: 'llama-3.1-9b' .* mean 'llama-3.1-8b'\?"):
        model_preset("llama-3.1-9b")
    with pytest.raises(InputError, match=r"give its config\.json"):
        preset_num_params("bert")


def config_file(folder: Path, content: Any) -> Path:
    file = folder / "config.json"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_a_file_and_its_folder_give_the_same_configuration(tmp_path: Path) -> None:
    file = config_file(tmp_path, LLAMA)
    assert read_model_config(file) == read_model_config(str(tmp_path)) == LLAMA


@pytest.mark.parametrize(
    "config",
    [
        *(model_preset(name) for name in ("gpt-2", "llama-3.1-70b", "pythia-1.4b")),
        {"model_type": "gpt2", "n_embd": 8, "n_inner": None},
        {"model_type": "mamba", "hidden_size": 8, "time_step_limit": [0.0, float("inf")]},
        {"model_type": "gemma3", "text_config": {"hidden_size": 8, "num_hidden_layers": 2}},
        {"model_type": "openelm", "num_key_value_heads": [3, 4], "auto_map": {"AutoConfig": "a.b"}},
        {"model_type": "t5", "d_model": 8},
    ],
    ids=lambda config: config["model_type"],
)
def test_real_configurations_are_read(tmp_path: Path, config: dict[str, Any]) -> None:
    assert read_model_config(config_file(tmp_path, config)) == config


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        ("[" * 100_000, "is not JSON (nested too deeply)"),
        ('{"model_type": ' + '{"a": ' * 100_000, "is not JSON (nested too deeply)"),
        ('{"model_type": "llama", "vocab_size": ' + "9" * 5000 + "}", "is not JSON"),
        ("[1, 2]", "holds no JSON object"),
        ("null", "holds no JSON object"),
        ("{}", "has no model_type"),
        ({"model_type": 7}, "has no model_type"),
        (" " * (MAX_CONFIG_BYTES + 1), "larger than 1 MiB"),
        ({**LLAMA, "hidden_size": 0}, "hidden_size must be a whole number from 1 to 10^14, "
                                      "but is 0."),
        ({**LLAMA, "hidden_size": -64}, "but is -64"),
        ({**LLAMA, "num_hidden_layers": 2.5}, "num_hidden_layers must be a whole number"),
        ({**LLAMA, "num_attention_heads": "4"}, "but is '4'"),
        ({**LLAMA, "vocab_size": True}, "but is True"),
        ({**LLAMA, "num_key_value_heads": [4, 0]}, "num_key_value_heads must be"),
        ({**LLAMA, "intermediate_size": []}, "but is []"),
        ({**LLAMA, "vocab_size": float("nan")}, "but is nan"),
        ({**LLAMA, "hidden_size": float("inf")}, "but is inf"),
        ({**LLAMA, "vocab_size": 10**400}, "vocab_size must be a whole number from 1 to 10^14"),
        ({**LLAMA, "hidden_size": 10**7}, "more than 10^14 parameters"),
        ({**LLAMA, "vocab_size": 10**13}, "more than 10^14 parameters"),
        ({**LLAMA, "num_hidden_layers": 10**13}, "more than 10^14 parameters"),
        ({"model_type": "gemma3", "text_config": {"hidden_size": -1}}, "but is -1"),
        ({"model_type": "gpt2", "n_embd": -1}, "n_embd must be"),
    ],
)  # fmt: skip
def test_what_is_no_model_configuration_is_refused(tmp_path: Path, content: Any, says: str) -> None:
    file = config_file(tmp_path, content)
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        read_model_config(file)
    assert str(caught.value).startswith(f"model: {str(file)!r}")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "config.json", Path("/dev/zero"), "a\0b"):
        with pytest.raises(InputError, match="model: "):
            read_model_config(path)
