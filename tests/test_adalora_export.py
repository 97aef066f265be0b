"""AdaLoRA leaves as plain LoRA of scale 1, or as PEFT's own AdaLoRA, with the logits it had."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
)

import rsauto
from rsauto import RsAdaLoraConfig
from rsauto.adapters.lora import lora_layers

LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
GPT2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
BERT = BertConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
STEPS = 30


@dataclass(frozen=True)
class Trained:
    """A trained adapter, the base it was trained on, and what both compute."""

    model: Any
    base: PreTrainedModel
    logits: Tensor

    def fresh(self) -> PreTrainedModel:
        return copy.deepcopy(self.base)

    def difference(self, other: Any) -> float:
        return float((logits_of(other) - self.logits).abs().max())


def logits_of(model: Any) -> Tensor:
    ids = torch.randint(0, 64, (4, 11), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=ids).logits
    return logits.float()


def build(which: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if which == "bert":
        return AutoModelForSequenceClassification.from_config(BERT)
    return AutoModelForCausalLM.from_config({"llama": LLAMA, "gpt2": GPT2}[which])


@cache
def trained(which: str = "llama", **options: Any) -> Trained:
    """Thirty steps through the whole schedule, with some modules left without a triplet."""
    base = build(which)
    config = RsAdaLoraConfig(
        init_r=6,
        target_r=2,
        tinit=5,
        tfinal=5,
        total_step=STEPS,
        lora_alpha=16,
        target_modules="all-linear",
        task_type="SEQ_CLS" if which == "bert" else "CAUSAL_LM",
        **options,
    )
    model: Any = get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    generator = torch.Generator().manual_seed(3)
    for step in range(1, STEPS + 1):
        ids = torch.randint(0, 64, (4, 9), generator=generator)
        labels = torch.randint(0, 3, (4,), generator=generator) if which == "bert" else ids
        model.train()(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
    found = Trained(model, base, logits_of(model))
    ranks = model.base_model.rank_pattern().values()
    assert sum(ranks) == 2 * len(ranks) and min(ranks) < 2 < max(ranks)
    assert float((logits_of(base) - found.logits).abs().max()) > 0.1, "the adapter does something"
    return found


VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", {}),
    ("llama", {"recovery": "none"}),
    ("llama", {"use_rslora": False}),
    ("llama", {"scale_rank": "live"}),
    ("llama", {"scale_rank": "init", "recovery": "none"}),
    ("gpt2", {}),
    ("gpt2", {"recovery": "none"}),
    ("bert", {"recovery": "none"}),
)
NAMES = [f"{which} {' '.join(map(str, o.values()))}".strip() for which, o in VARIANTS]


@pytest.fixture(params=VARIANTS, ids=NAMES)
def one(request: pytest.FixtureRequest) -> Trained:
    which, options = request.param
    return trained(which, **options)


@pytest.mark.parametrize("padded", [False, True], ids=["compact", "padded"])
@pytest.mark.sample(6)
def test_plain_lora_has_the_logits(one: Trained, padded: bool, tmp_path: Path) -> None:
    written = rsauto.export_lora(one.model, tmp_path / "lora", padded=padded)
    loaded = PeftModel.from_pretrained(one.fresh(), tmp_path / "lora")
    assert one.difference(loaded) < 1e-5
    assert one.difference(copy.deepcopy(loaded).merge_and_unload()) < 1e-5
    low = PeftModel.from_pretrained(one.fresh(), tmp_path / "lora", low_cpu_mem_usage=True)
    assert one.difference(low) < 1e-5
    active = {n: r for n, r in one.model.base_model.rank_pattern().items() if r}
    if padded:
        assert set(written.rank_pattern.values()) == {max(active.values())}
    else:
        assert written.rank_pattern == active
    assert written.r_max == max(active.values())
    assert written.num_bytes == (tmp_path / "lora/adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("padded", [False, True], ids=["compact", "padded"])
def test_the_scale_is_exactly_one_in_every_module(
    one: Trained, padded: bool, tmp_path: Path
) -> None:
    rsauto.export_lora(one.model, tmp_path / "lora", padded=padded)
    config = LoraConfig.from_pretrained(tmp_path / "lora")
    assert config.r == config.lora_alpha and not config.use_rslora
    assert config.rank_pattern == config.alpha_pattern
    assert bool(config.rank_pattern) != padded
    loaded = PeftModel.from_pretrained(one.fresh(), tmp_path / "lora")
    layers = list(lora_layers(loaded))
    assert {layer.scaling["default"] for layer in layers} == {1.0}
    assert len(layers) == sum(r > 0 for r in one.model.base_model.rank_pattern().values())


def test_stock_adalora_has_the_logits(one: Trained, tmp_path: Path) -> None:
    written = rsauto.export_adalora(one.model, tmp_path / "adalora")
    loaded = PeftModel.from_pretrained(one.fresh(), tmp_path / "adalora")
    assert type(loaded.peft_config["default"]) is AdaLoraConfig
    assert one.difference(loaded) < 1e-5
    assert one.difference(loaded.merge_and_unload()) < 1e-5
    assert written.rank_pattern == one.model.base_model.rank_pattern()


@pytest.mark.parametrize("follows_rslora", [True, False])
def test_servers_that_read_less_of_the_config_compute_the_same(
    follows_rslora: bool, tmp_path: Path
) -> None:
    """vLLM reads r, lora_alpha and use_rslora, and takes ranks from the tensors; SGLang does not
    even read use_rslora. Both multiply by one factor for all modules."""
    one = trained("llama", scale_rank="live")
    rsauto.export_lora(one.model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    root = config["use_rslora"] and follows_rslora
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if root else config["r"])
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    model = one.fresh()
    with torch.no_grad():
        for key, a in tensors.items():
            if key.endswith("lora_A.weight"):
                b = tensors[key.replace("lora_A", "lora_B")]
                name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                model.get_submodule(name).weight += scale * b @ a
    assert one.difference(model) < 1e-5


def test_both_load_where_rsauto_is_not_installed(tmp_path: Path) -> None:
    one = trained("llama")
    one.base.save_pretrained(tmp_path / "base")
    rsauto.export_lora(one.model, tmp_path / "lora")
    rsauto.export_adalora(one.model, tmp_path / "adalora")
    code = """
import sys
sys.modules["rsauto"] = None  # any import of it fails
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
for name in ("lora", "adalora"):
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/base")
    model = PeftModel.from_pretrained(base, sys.argv[1] + "/" + name).eval()
    ids = torch.randint(0, 64, (4, 11), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        torch.save(model(input_ids=ids).logits, sys.argv[1] + "/" + name + ".pt")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for name in ("lora", "adalora"):
        logits = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert float((logits - one.logits).abs().max()) < 1e-5, name


def test_a_trained_head_goes_with_the_adapter(tmp_path: Path) -> None:
    one = trained("bert", recovery="none")
    for export, name in ((rsauto.export_lora, "lora"), (rsauto.export_adalora, "adalora")):
        export(one.model, tmp_path / name)
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        assert [key for key in tensors if key.endswith("classifier.weight")], name


def test_factors_share_what_multiplies_them_evenly(tmp_path: Path) -> None:
    """A file in half precision then rounds least: both factors of a triplet are of like size."""
    one = trained("llama", init_std=0.1)
    rsauto.export_lora(one.model, tmp_path / "lora")
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    layers = dict(one.model.base_model.model.named_modules())
    for key, a in tensors.items():
        if not key.endswith("lora_A.weight"):
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        layer = layers[name]
        keep = layer.triplets["default"].mask
        weight = (layer.lora_E["default"].detach().flatten() * layer.scaling["default"])[keep].abs()
        unit = layer.lora_A["default"].detach()[keep].norm(dim=1)
        torch.testing.assert_close(a.norm(dim=1), unit * weight.sqrt())


def test_exporting_twice_replaces_the_folder_whole(tmp_path: Path) -> None:
    one = trained("llama")
    rsauto.export_lora(one.model, tmp_path / "lora")
    before = {p.name: p.read_bytes() for p in (tmp_path / "lora").iterdir()}
    rsauto.export_lora(one.model, tmp_path / "lora")
    assert {p.name: p.read_bytes() for p in (tmp_path / "lora").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["lora"]


def test_another_adapter_is_refused_in_words(tmp_path: Path) -> None:
    plain = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(
        ValueError, match=r"'default' is not an adapter of RsAdaLoraConfig.*export_"
    ):
        rsauto.export_adalora(plain, tmp_path / "adalora")
    with pytest.raises(ValueError, match="'other' has nothing to write; the model has 'default'"):
        rsauto.export_lora(plain, tmp_path / "lora", adapter_name="other")
    assert not list(tmp_path.iterdir())


def test_plain_lora_of_any_adapter_name_and_pattern_is_exported_alike(tmp_path: Path) -> None:
    base = build("llama")
    config = LoraConfig(
        r=4, use_rslora=True, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2},
        init_lora_weights=False,
    )  # fmt: skip
    model = get_peft_model(copy.deepcopy(base), config, adapter_name="mine")
    rsauto.export_lora(model, tmp_path / "lora", adapter_name="mine")
    loaded = PeftModel.from_pretrained(base, tmp_path / "lora")
    assert float((logits_of(loaded) - logits_of(model)).abs().max()) < 1e-5
