"""Pickles and modules planted wherever one could be read: none of them runs."""

from __future__ import annotations

import json
import pickle
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny_study import rows, write_model

from rsauto.base import load_weights, open_base
from rsauto.config import ModelConfig
from rsauto.data.files import read_file
from rsauto.errors import InputError
from rsauto.exports.weights import _read
from rsauto.memory.profiles import _decoded
from rsauto.search.storage import open_storage
from rsauto.training.checkpoints import read_checkpoint

CPU = torch.device("cpu")


class Planted:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "the pickle ran"


@pytest.fixture
def planted(mark: Path) -> bytes:
    data = pickle.dumps(Planted(mark))
    pickle.loads(data)
    assert mark.exists(), "the pickle works"
    mark.unlink()
    return data


def test_a_base_model_of_pickles_is_refused(tmp_path: Path, mark: Path, planted: bytes) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin"):
        (folder / name).write_bytes(planted)
    with pytest.raises(InputError, match="pickles only"):
        open_base(ModelConfig(name=str(folder)))
    (folder / "model.safetensors").write_bytes(planted)
    with pytest.raises(InputError):
        load_weights(*_opened(folder), CPU)
    assert not mark.exists()


def _opened(folder: Path) -> tuple[Any, ModelConfig]:
    config = ModelConfig(name=str(folder))
    return open_base(config), config


def test_pickles_beside_good_weights_are_not_read(
    tmp_path: Path, mark: Path, planted: bytes
) -> None:
    folder = write_model(tmp_path / "model")
    for name in ("pytorch_model.bin", "adapter_model.bin", "optimizer.pt", "training_args.bin"):
        (folder / name).write_bytes(planted)
    load_weights(*_opened(folder), CPU)
    assert not mark.exists()


@pytest.mark.parametrize("model_type", ["llama", "nobody_knows"])
def test_a_model_brings_no_code(tmp_path: Path, mark: Path, model_type: str) -> None:
    folder = write_model(tmp_path / "model")
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
    (folder / "modeling_x.py").write_text(code, encoding="utf-8")
    for file, names in (
        ("config.json", {"AutoConfig": "modeling_x.C", "AutoModelForCausalLM": "modeling_x.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["modeling_x.T", "modeling_x.T"]}),
    ):
        values = json.loads((folder / file).read_text(encoding="utf-8"))
        values["auto_map"] = names
        if file == "config.json":
            values["model_type"] = model_type
        (folder / file).write_text(json.dumps(values), encoding="utf-8")
    try:
        load_weights(*_opened(folder), CPU)
    except InputError:
        assert model_type != "llama"
    assert not mark.exists()


def test_caches_checkpoints_and_data_are_no_pickles(
    tmp_path: Path, mark: Path, planted: bytes
) -> None:
    profile = tmp_path / "1-1.npz"
    profile.write_bytes(planted)
    with pytest.raises((ValueError, OSError)):
        _decoded(profile)
    step = tmp_path / "step-00000001"
    step.mkdir()
    progress = {"version": 1, "progress": {}, "plain_moments": {}}
    for name in ("adapter.safetensors", "optimizer.safetensors"):
        (step / name).write_bytes(planted)
    for data in (planted, json.dumps(progress).encode(), b"[" * 100_000):
        (step / "progress.json").write_bytes(data)
        with pytest.raises(ValueError, match="cannot be read"):
            read_checkpoint(step)
    for name in ("a.json", "a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(planted)
        with pytest.raises(InputError):
            read_file(tmp_path / name)
    shutil.rmtree(step)
    assert not mark.exists() and rows(1)


def test_adapters_and_journals_are_no_pickles(tmp_path: Path, mark: Path, planted: bytes) -> None:
    adapter = tmp_path / "adapter"
    LoraConfig(r=2, target_modules=["q_proj"]).save_pretrained(str(adapter))
    for name in ("adapter_model.bin", "adapter_model.pt", "training_args.bin"):
        (adapter / name).write_bytes(planted)
    with pytest.raises(InputError, match="the adapter cannot be read"):
        _read(adapter, None)
    (adapter / "adapter_model.safetensors").write_bytes(planted)
    with pytest.raises(InputError, match="the adapter cannot be read"):
        _read(adapter, None)
    for data in (planted, planted + b"\n", b"\x80\x04\x95\n"):
        (tmp_path / "journal.log").write_bytes(data)
        with suppress(InputError):
            open_storage(None, tmp_path / "journal.log").get_all_studies()
    assert not mark.exists()
