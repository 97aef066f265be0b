"""The base of the studies is the one that its script and its provenance record describe."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rsauto.base import load_weights, open_base
from rsauto.config import ModelConfig

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "studies" / "base-10m"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "studies" / "pretrain_base_10m.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where its dataclasses look for their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def provenance() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "PROVENANCE.json").read_text(encoding="utf-8"))
    return found


def test_every_file_has_the_hash_that_was_recorded(provenance: dict[str, Any]) -> None:
    there = {path.name for path in FOLDER.iterdir()} - {"PROVENANCE.json"}
    assert there == provenance["sha256"].keys()
    for name, expected in provenance["sha256"].items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == expected, name
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 20 * 10**6


def test_the_script_would_make_it_from_the_same(
    script: ModuleType, provenance: dict[str, Any]
) -> None:
    assert provenance["config"] == vars(script.BASE)
    assert provenance["data"]["distributions"] == [vars(source) for source in script.SOURCES]


def test_a_download_with_another_hash_is_refused(script: ModuleType, tmp_path: Path) -> None:
    source = script.SOURCES[0]
    (tmp_path / source.path.rsplit("/", 1)[-1]).write_bytes(b"not it")
    with pytest.raises(SystemExit, match="SHA-256"):
        script.fetch(source, tmp_path)


def test_it_loads_and_has_learnt_english(provenance: dict[str, Any]) -> None:
    source = open_base(ModelConfig(name=str(FOLDER), dtype="float32"))
    model = load_weights(source, ModelConfig(name=str(FOLDER)), torch.device("cpu")).model
    assert model.num_parameters() == provenance["num_parameters"]
    text = "This function returns the number of elements in the list, and raises an error if the"
    ids = torch.tensor([source.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    # A uniform guess among 2560 tokens has 7.8; the held-out loss is 2.96.
    assert loss < 4.0
