"""Adapters against stock PEFT: the same layers, the same factor, the same file, no trace left."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel
from transformers.optimization import Adafactor

from rsauto import atomic
from rsauto.adapters import export
from rsauto.adapters.export import export_lora
from rsauto.adapters.lora import (
    add_adapter,
    lora_layers,
    remove_adapter,
    short_target_names,
    target_module_names,
    trainable_parameters,
)
from rsauto.adapters.optimizers import build_optimizer, parameter_groups
from rsauto.base import prepare
from rsauto.errors import InputError
from rsauto.records import TrialSpec


def spec_of(**changes: Any) -> TrialSpec:
    rule = changes.pop("rule", "rslora")
    settings = {"rank": 4, "alpha": 8, "learning_rate": 1e-2, **changes}
    return TrialSpec(role="search", method=rule, scaling_rule=rule, **settings)


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    """A random GPT-2 of 2 blocks: Conv1D layers, tied output head."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    )
    prepare(model, gradient_checkpointing=False)
    return model.eval()


def tokens(batch_size: int = 3, length: int = 12) -> Tensor:
    return torch.randint(0, 64, (batch_size, length), generator=torch.Generator().manual_seed(1))


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=tokens()).logits
    return found


def train_a_little(model: nn.Module, steps: int = 5) -> None:
    """B is zero at the start, so an untrained adapter proves nothing."""
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=5e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()


def test_all_linear_takes_every_linear_layer_but_the_head(llama: LlamaForCausalLM) -> None:
    assert target_module_names(llama, "all-linear") == [
        f"model.layers.{block}.{layer}"
        for block in (0, 1)
        for layer in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        )
    ]  # fmt: skip


def test_all_linear_finds_the_convolutions_that_gpt2_calls_linear(gpt2: GPT2LMHeadModel) -> None:
    assert target_module_names(gpt2, "all-linear") == [
        f"transformer.h.{block}.{layer}"
        for block in (0, 1)
        for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]


def test_attention_takes_what_lies_inside_attention(
    llama: LlamaForCausalLM, gpt2: GPT2LMHeadModel
) -> None:
    assert target_module_names(gpt2, "attention") == [
        f"transformer.h.{block}.attn.{layer}" for block in (0, 1) for layer in ("c_attn", "c_proj")
    ]
    found = target_module_names(llama, "attention")
    assert len(found) == 8 and all(".self_attn." in name for name in found)


def test_a_list_takes_the_ends_of_names_in_model_order(
    llama: LlamaForCausalLM, gpt2: GPT2LMHeadModel
) -> None:
    assert target_module_names(llama, ("v_proj", "q_proj")) == [
        f"model.layers.{block}.self_attn.{layer}"
        for block in (0, 1)
        for layer in ("q_proj", "v_proj")
    ]
    assert target_module_names(gpt2, ("mlp.c_proj",)) == [
        "transformer.h.0.mlp.c_proj",
        "transformer.h.1.mlp.c_proj",
    ]
    # An end is a whole name: "proj" is none of them.
    with pytest.raises(InputError):
        target_module_names(llama, ("proj",))


def test_unknown_layers_are_all_named_with_what_there_is(llama: LlamaForCausalLM) -> None:
    with pytest.raises(InputError) as caught:
        target_module_names(llama, ("q_porj", "v_proj", "lm_head"))
    assert caught.value.problems == (
        "model.target_modules: the model has no linear layer named 'q_porj'. Did you mean "
        "'q_proj'? It has: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj.",
        "model.target_modules: the model has no linear layer named 'lm_head'. It has: "
        "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj.",
    )


def test_a_model_without_attention_or_linear_layers_says_so() -> None:
    with pytest.raises(InputError, match=r"no attention layers were recognised by name.*: 0\."):
        target_module_names(nn.Sequential(nn.Linear(2, 2)), "attention")
    with pytest.raises(InputError, match="has no linear layers"):
        target_module_names(nn.Sequential(nn.ReLU()), "all-linear")


@pytest.mark.parametrize("which", ["llama", "gpt2"])
def test_all_linear_is_what_peft_calls_all_linear(
    which: str, request: pytest.FixtureRequest
) -> None:
    model: PreTrainedModel = request.getfixturevalue(which)
    ours = target_module_names(model, "all-linear")
    theirs = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    ).get_base_model()
    assert ours == [n for n, m in theirs.named_modules() if isinstance(m, LoraLayer)]


@pytest.mark.parametrize("rule", ["lora", "rslora"])
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_the_factor_and_the_start_are_those_of_stock_peft(
    llama: LlamaForCausalLM, rule: str, rank: int
) -> None:
    stock = copy.deepcopy(llama)
    names = target_module_names(llama, "all-linear")
    torch.manual_seed(3)
    ours = add_adapter(llama, spec_of(rank=rank, rule=rule))
    torch.manual_seed(3)
    theirs = get_peft_model(
        stock,
        LoraConfig(
            r=rank,
            lora_alpha=8,
            use_rslora=rule == "rslora",
            target_modules=names,
            task_type="CAUSAL_LM",
        ),
    )
    pairs = list(zip(lora_layers(ours), lora_layers(theirs), strict=True))
    assert len(pairs) == len(names)
    for mine, stocks in pairs:
        assert mine.scaling["default"] == pytest.approx(stocks.scaling["default"], rel=1e-12)
        assert torch.equal(mine.lora_A["default"].weight, stocks.lora_A["default"].weight)
        assert not mine.lora_B["default"].weight.any()
    # In float64: Adam makes much of the last bits of float32, in which the two sums differ.
    train_a_little(ours.double())
    train_a_little(theirs.double())
    torch.testing.assert_close(logits_of(ours), logits_of(theirs), rtol=0, atol=1e-6)


def test_exponent_and_init_scale_are_applied_to_every_layer(llama: LlamaForCausalLM) -> None:
    def start(**changes: Any) -> list[tuple[float, Tensor]]:
        torch.manual_seed(3)
        adapted = add_adapter(llama, spec_of(**changes))
        found = [(x.scaling["default"], x.lora_A["default"].weight.clone())
                 for x in lora_layers(adapted)]  # fmt: skip
        remove_adapter(adapted)
        return found

    plain, changed = start(), start(scaling_exponent=-0.25, init_scale=0.5)
    assert len(plain) == 14
    for (factor, weight), (other_factor, other_weight) in zip(plain, changed, strict=True):
        assert factor == pytest.approx(8 * 4**-0.5)
        assert other_factor == pytest.approx(8 * 4**-0.25)
        assert torch.equal(other_weight, 0.5 * weight)


def test_only_the_adapter_learns_and_it_learns_in_float32(llama: LlamaForCausalLM) -> None:
    adapted = add_adapter(llama.to(torch.bfloat16), spec_of(rank=3, target_modules=("q_proj",)))
    trainable = trainable_parameters(adapted)
    assert {name.split(".")[-3] for name in trainable} == {"lora_A", "lora_B"}
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert sum(p.numel() for p in trainable.values()) == 2 * 3 * (32 + 32)


def test_parameter_groups_partition_the_trainable_parameters(llama: LlamaForCausalLM) -> None:
    adapted = add_adapter(llama, spec_of())
    groups = parameter_groups(adapted, learning_rate=1e-3, lr_ratio=16, weight_decay=0.1)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("A", 1e-3, 0.1),
        ("B", 16e-3, 0.1),
    ]
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in trainable_parameters(adapted).values())
    assert [p.shape[0] for p in groups[0]["params"]] == [4] * 14  # A is (rank, d_in)
    assert [p.shape[1] for p in groups[1]["params"]] == [4] * 14  # B is (d_out, rank)


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_learning_rates_are_those_of_pefts_lora_plus(llama: LlamaForCausalLM, ratio: float) -> None:
    adapted = add_adapter(llama, spec_of())
    ours = build_optimizer(adapted, name="adamw", learning_rate=2e-3, lr_ratio=ratio)
    theirs = create_loraplus_optimizer(
        adapted, optimizer_cls=torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=ratio
    )

    def rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
        return {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}

    assert rates(ours) == pytest.approx(rates(theirs))
    assert sorted(set(rates(ours).values())) == pytest.approx(sorted({2e-3, 2e-3 * ratio}))


def test_each_optimizer_is_the_one_it_is_called(llama: LlamaForCausalLM) -> None:
    adapted = add_adapter(llama, spec_of())
    for name, kind in (
        ("adamw", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        ("adafactor", Adafactor),
    ):
        optimizer = build_optimizer(
            adapted, name=name, learning_rate=1e-3, lr_ratio=4, weight_decay=0.01
        )  # type: ignore[arg-type]
        assert type(optimizer) is kind
        assert [g["initial_lr"] for g in optimizer.param_groups] == [1e-3, 4e-3]
        assert {g["weight_decay"] for g in optimizer.param_groups} == {0.01}


def state_of_model(model: nn.Module) -> dict[str, Any]:
    """Everything an adapter could leave behind, but for the values of weights."""
    return {
        name: (
            type(module),
            sorted(vars(module)),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._backward_hooks),
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("which", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_many_adapters_leave_the_base_model_as_it_was(
    which: str, checkpointing: bool, request: pytest.FixtureRequest
) -> None:
    model: PreTrainedModel = request.getfixturevalue(which)
    prepare(model, checkpointing)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before, logits, config = state_of_model(model), logits_of(model), model.config.to_dict()
    for rank in (2, 8, 3, 4):
        adapted = add_adapter(model, spec_of(rank=rank))
        train_a_little(adapted, steps=2)
        assert not torch.allclose(logits_of(adapted), logits, atol=1e-3)
        assert remove_adapter(adapted) is model
        assert state_of_model(model) == before
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert torch.equal(logits_of(model), logits)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    assert model.config.to_dict() == config


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_that_cannot_be_put_on_leaves_the_base_model_as_it_was(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    prepare(llama, checkpointing)
    before, logits = state_of_model(llama), logits_of(llama)
    original, calls = LoraLayer.update_layer, iter(range(100))

    def full_at_the_third(self: LoraLayer, *args: Any, **kwargs: Any) -> None:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        original(self, *args, **kwargs)

    monkeypatch.setattr("peft.tuners.lora.layer.Linear.update_layer", full_at_the_third)
    with pytest.raises(torch.OutOfMemoryError):
        add_adapter(llama, spec_of())
    assert state_of_model(llama) == before
    assert torch.equal(logits_of(llama), logits)
    monkeypatch.undo()
    assert len(list(lora_layers(add_adapter(llama, spec_of())))) == 14


@pytest.mark.parametrize("which", ["llama", "gpt2"])
@pytest.mark.parametrize("rule", ["lora", "rslora"])
def test_stock_peft_loads_what_was_saved_and_gives_the_same_logits(
    which: str, rule: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model: PreTrainedModel = request.getfixturevalue(which)
    fresh = copy.deepcopy(model)
    adapted = add_adapter(model, spec_of(rule=rule, alpha=16))
    train_a_little(adapted)
    num_bytes = export_lora(
        adapted, tmp_path / "best", base_name="embedded", card="# card\n"
    ).num_bytes
    base_logits, trained = logits_of(fresh), logits_of(adapted)
    loaded = logits_of(PeftModel.from_pretrained(fresh, tmp_path / "best"))
    assert float((trained - base_logits).abs().max()) > 0.5
    torch.testing.assert_close(loaded, trained, rtol=0, atol=1e-5)
    assert num_bytes == (tmp_path / "best" / "adapter_model.safetensors").stat().st_size


def test_the_saved_adapter_is_plain_lora_of_scale_one(
    llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    adapted = add_adapter(llama, spec_of(rank=4, alpha=32))
    train_a_little(adapted, steps=1)
    export_lora(adapted, tmp_path / "best", base_name="embedded", card="# card\n")
    text = (tmp_path / "best" / "adapter_config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert config["base_model_name_or_path"] == "embedded"
    assert config["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip
    assert str(Path.home()) not in text and str(tmp_path) not in text and "/" not in text
    assert (tmp_path / "best" / "README.md").read_text(encoding="utf-8") == "# card\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best"]


def fingerprint(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_saving_replaces_the_adapter_that_was_there(
    llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    adapted = add_adapter(llama, spec_of())
    export_lora(adapted, tmp_path / "best", base_name="embedded", card="first")
    old = fingerprint(tmp_path / "best")
    train_a_little(adapted)
    export_lora(adapted, tmp_path / "best", base_name="embedded", card="second")
    new = fingerprint(tmp_path / "best")
    assert new["README.md"] == b"second"
    assert new["adapter_model.safetensors"] != old["adapter_model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


@pytest.mark.parametrize("where", ["weights", "card", "rename"])
def test_a_save_that_fails_leaves_the_old_adapter(
    llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    adapted = add_adapter(llama, spec_of())
    export_lora(adapted, tmp_path / "best", base_name="embedded", card="first")
    old = fingerprint(tmp_path / "best")
    train_a_little(adapted, steps=1)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    original = atomic.os.replace

    def full_for_the_new_one(source: Any, target: Any) -> None:
        if Path(target).name == "best" and "partial" in Path(source).name:
            full()
        original(source, target)

    if where == "weights":
        monkeypatch.setattr(export, "sealed", full)
    elif where == "card":
        monkeypatch.setattr(Path, "write_text", full)
    else:
        monkeypatch.setattr(atomic.os, "replace", full_for_the_new_one)
    with pytest.raises(OSError, match="No space left"):
        export_lora(adapted, tmp_path / "best", base_name="embedded", card="second")
    monkeypatch.undo()
    assert fingerprint(tmp_path / "best") == old
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_short_names_are_used_where_they_select_exactly_the_adapted_layers(
    llama: LlamaForCausalLM,
) -> None:
    assert short_target_names(add_adapter(llama, spec_of(target_modules=("q_proj", "v_proj")))) == [
        "q_proj",
        "v_proj",
    ]


def test_full_names_are_used_where_a_short_one_would_select_more(
    llama: LlamaForCausalLM, gpt2: GPT2LMHeadModel, tmp_path: Path
) -> None:
    first = "model.layers.0.self_attn.q_proj"
    adapted = add_adapter(llama, spec_of(target_modules=(first,)))
    assert short_target_names(adapted) == [first]
    # In GPT-2 both attention and mlp have a c_proj.
    fresh = copy.deepcopy(gpt2)
    adapted = add_adapter(gpt2, spec_of(target_modules="attention"))
    assert short_target_names(adapted) == target_module_names(fresh, "attention")
    train_a_little(adapted)
    export_lora(adapted, tmp_path / "best", base_name="embedded", card="")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "best")
    assert len(list(lora_layers(loaded))) == 4
    torch.testing.assert_close(logits_of(loaded), logits_of(adapted), rtol=0, atol=1e-5)


def test_full_names_are_used_where_a_short_one_is_also_no_linear_layer() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = nn.ModuleDict({"proj": nn.Linear(4, 4)})
            self.patches = nn.ModuleDict({"proj": nn.Conv1d(4, 4, 1)})

    model = nn.ModuleDict({"block": Block()})
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["mixer.proj"]))  # type: ignore[arg-type]
    assert short_target_names(adapted) == ["block.mixer.proj"]


@pytest.fixture(autouse=True)
def no_warning_from_peft(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.WARNING, logger="peft"):
        yield
    assert not caplog.records
