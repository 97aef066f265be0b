"""The layer itself: W x + gamma_r P diag(lambda) Q x, however the base is stored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.integrations import dequantize_module_weight
from test_adalora_parity import (
    GPT2_TARGETS,
    LLAMA_TARGETS,
    adamw,
    adapted,
    batch,
    config_of,
    logits_of,
    tiny_gpt2,
    tiny_llama,
    train,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from rsauto.adalora.layer import SvdLayer
from rsauto.adalora.model import svd_layers

GAMMA = 8 / math.sqrt(2)
"""Of `config_of`: alpha 8, target rank 2."""


def random_lambda(base: Any = None, **changes: Any) -> PeftModel:
    """An adapter that does something without being trained."""
    return adapted(base, init_lora_weights=False, **changes)


def layers_of(model: Any) -> list[SvdLayer]:
    return [layer for _, layer in svd_layers(model)]


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def delta_by_hand(layer: SvdLayer, gamma: float = GAMMA, adapter: str = "default") -> Tensor:
    """gamma_r P diag(lambda) Q, (d_out, d_in), in float64."""
    p, values, q = (
        table[adapter].detach().double() for table in (layer.lora_B, layer.lora_E, layer.lora_A)
    )
    return gamma * p @ torch.diag(values.flatten()) @ q


def assert_near(one: Tensor, other: Tensor, tolerance: float) -> None:
    """As numbers of any two dtypes."""
    torch.testing.assert_close(one.double(), other.double(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_delta_is_the_product_of_the_paper(kind: str) -> None:
    base, targets = (
        (tiny_llama(), LLAMA_TARGETS) if kind == "llama" else (tiny_gpt2(), GPT2_TARGETS)
    )
    model = random_lambda(base, target_modules=targets)
    layers = layers_of(model)
    assert len(layers) == (6 if kind == "llama" else 8)
    for layer in layers:
        weight = layer.get_base_layer().weight
        delta = layer.get_delta_weight("default")
        by_hand = delta_by_hand(layer)
        is_conv = isinstance(layer.get_base_layer(), Conv1D)
        assert is_conv == (kind == "gpt2")
        assert delta.shape == weight.shape and delta.dtype == torch.float32
        assert_near(delta, by_hand.T if is_conv else by_hand, 1e-5)
        x = torch.randn(2, 3, layer.in_features)
        expected = layer.get_base_layer()(x).double() + x.double() @ by_hand.T
        assert_near(layer(x), expected, 2e-5)
        assert float((x.double() @ by_hand.T).abs().mean()) > 0.3


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (0, 3)], ids=str)
def test_inputs_may_have_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    layer = layers_of(random_lambda())[0]
    x = torch.randn(*shape, layer.in_features)
    expected = layer.get_base_layer()(x).double() + x.double() @ delta_by_hand(layer).T
    assert_near(layer(x), expected, 2e-5)


def test_an_input_may_be_one_vector() -> None:
    layer = layers_of(random_lambda())[0]
    x = torch.randn(layer.in_features)
    expected = layer.get_base_layer()(x).double() + x.double() @ delta_by_hand(layer).T
    assert_near(layer(x), expected, 2e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_changes_nothing_and_can_be_undone(kind: str, safe_merge: bool) -> None:
    base, targets = (
        (tiny_llama(), LLAMA_TARGETS) if kind == "llama" else (tiny_gpt2(), GPT2_TARGETS)
    )
    model = random_lambda(base, target_modules=targets)
    before = logits_of(model)
    weights = [layer.get_base_layer().weight.clone() for layer in layers_of(model)]
    model.merge_adapter(safe_merge=safe_merge)
    assert all(layer.merged for layer in layers_of(model))
    assert_near(logits_of(model), before, 2e-4)
    model.unmerge_adapter()
    for layer, weight in zip(layers_of(model), weights, strict=True):
        assert_near(layer.get_base_layer().weight, weight, 1e-5)
    assert_near(logits_of(model), before, 2e-4)
    plain = model.merge_and_unload(safe_merge=safe_merge)
    assert not layers_of(plain)
    assert_near(logits_of(plain), before, 2e-4)


def test_switching_off_a_merged_adapter_takes_it_out_of_the_weights() -> None:
    model = random_lambda()
    model.merge_adapter()
    with model.disable_adapter():
        assert_near(logits_of(model), logits_of(tiny_llama()), 1e-4)


# --- dtypes

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.15, torch.float16: 0.02}


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_dtype_of_the_base(dtype: torch.dtype, autocast_adapter_dtype: bool) -> None:
    """With and without factors in float32; results have the base's dtype."""
    torch.manual_seed(1)
    model = get_peft_model(
        tiny_llama().to(dtype),
        config_of(init_lora_weights=False),
        autocast_adapter_dtype=autocast_adapter_dtype,
    )
    kept_dtype = torch.float32 if autocast_adapter_dtype else dtype
    for layer in layers_of(model):
        assert {p.dtype for p in layer.factors("default").values()} == {kept_dtype}
        x = torch.randn(2, 3, layer.in_features, dtype=dtype)
        exact = x.double() @ layer.get_base_layer().weight.double().T
        exact += x.double() @ delta_by_hand(layer).T
        result = layer(x)
        assert result.dtype == dtype
        assert_near(result, exact, TOLERANCE[dtype])
    before = logits_of(model)
    model.merge_adapter()
    assert_near(logits_of(model), before, 20 * TOLERANCE[dtype])
    model.unmerge_adapter()
    train(model, torch.optim.SGD(trained_parameters(model), lr=1e-3), 1, 20)
    assert sum(model.base_model.rank_pattern().values()) == 12
    assert logits_of(model).isfinite().all()


def test_autocast_computes_in_its_own_dtype() -> None:
    model = random_lambda()
    exact = logits_of(model)
    layer = layers_of(model)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 3, layer.in_features)).dtype == torch.bfloat16
        loss = model(**batch(1)).loss
        assert_near(logits_of(model), exact, 0.4)
    loss.backward()
    for layer in layers_of(model):
        for parameter in layer.factors("default").values():
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all() and parameter.grad.any()


def test_dropout_leaves_the_base_alone_and_stops_in_evaluation() -> None:
    model = random_lambda(lora_dropout=0.5)
    layer = layers_of(model)[0]
    x = torch.ones(4000, layer.in_features)
    base = layer.get_base_layer()(x)
    model.train()
    noisy = layer(x) - base
    assert noisy.std(dim=0).min() > 0.1
    assert_near(noisy.mean(dim=0), x[0].double() @ delta_by_hand(layer).T, 0.5)
    model.eval()
    assert_near(layer(x) - base, x.double() @ delta_by_hand(layer).T, 1e-4)


# --- several adapters


def test_two_adapters_take_turns() -> None:
    model = random_lambda()
    first = logits_of(model)
    settings: dict[str, Any] = {"init_lora_weights": False, "inference_mode": True}
    model.add_adapter("other", config_of(**settings, init_r=4, target_r=4, lora_alpha=3))
    assert torch.equal(logits_of(model), first)
    model.set_adapter("other")
    second = logits_of(model)
    layer = layers_of(model)[0]
    x = torch.randn(3, layer.in_features)
    base = layer.get_base_layer()(x).double()
    delta = delta_by_hand(layer, 3 / 2, "other")
    assert_near(layer(x), base + x.double() @ delta.T, 2e-5)
    assert (second - first).abs().max() > 0.1
    model.base_model.set_adapter(["default", "other"])
    both = base + x.double() @ (delta + delta_by_hand(layer)).T
    assert_near(layer(x), both, 2e-5)
    model.set_adapter("default")
    assert torch.equal(logits_of(model), first)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(tiny_llama()))
    assert model.base_model.rank_pattern("other")["model.layers.0.self_attn.q_proj"] == 4


def test_batches_of_several_adapters_are_refused() -> None:
    model = random_lambda()
    with pytest.raises(ValueError, match="adapter_names: batches of several adapters"):
        layers_of(model)[0](torch.randn(1, 32), adapter_names=["default"])


def test_whole_modules_are_trained_and_saved_beside_it(tmp_path: Path) -> None:
    model = adapted(modules_to_save=["lm_head"], deltaT=3)
    head = tiny_llama().lm_head.weight
    train(model, adamw(model), 1, 11)
    assert not torch.equal(model.base_model.model.lm_head.weight, head)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    assert_near(logits_of(loaded), logits_of(model), 2e-6)


# --- rank and factor


@pytest.mark.parametrize("recovery", ["paper", "none"])
@pytest.mark.parametrize("scale_rank", ["target", "init", "live"])
def test_the_factor_follows_its_reference_rank(scale_rank: str, recovery: str) -> None:
    model = adapted(scale_rank=scale_rank, recovery=recovery)
    optimizer = adamw(model)
    for step in range(1, 21):
        train(model, optimizer, step, step)
        for layer in layers_of(model):
            live = layer.triplets["default"].active_rank
            rank = {"target": 2, "init": 6, "live": max(1, live)}[scale_rank]
            assert layer.scaling["default"] == pytest.approx(8 / math.sqrt(rank), rel=1e-15)
            assert layer.r["default"] == (live if recovery == "none" else 6)
            assert_near(
                layer.get_delta_weight("default"), delta_by_hand(layer, 8 / math.sqrt(rank)), 1e-6
            )
    assert len({layer.triplets["default"].active_rank for layer in layers_of(model)}) > 1


def test_a_module_without_triplets_is_its_base_layer() -> None:
    model = random_lambda(recovery="none")
    layer = layers_of(model)[0]
    layer.resize("default", 0)
    x = torch.randn(2, 3, layer.in_features)
    assert torch.equal(layer(x), layer.get_base_layer()(x))
    assert layer.get_delta_weight("default").shape == layer.get_base_layer().weight.shape
    assert not layer.get_delta_weight("default").any()
    train(model, adamw(model), 1, 20)
    assert layer.r["default"] == 0
    before = logits_of(model)
    assert_near(logits_of(model.merge_and_unload()), before, 1e-4)


def test_only_the_factors_are_trained() -> None:
    model = adapted()
    train(model, adamw(model), 1, 20)
    untouched = tiny_llama().state_dict()
    for name, value in model.base_model.model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, untouched[name.replace(".base_layer", "")]), name


# --- ways of training and loading


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = random_lambda()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        model(**batch(1)).loss.backward()
        factors = (layer.factors("default") for layer in layers_of(model))
        gradients.append([p.grad for table in factors for p in table.values()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None and one.any()
        torch.testing.assert_close(one, other, atol=1e-7, rtol=0)


def test_an_adapter_without_values_can_be_made() -> None:
    with torch.device("meta"):
        on_meta = get_peft_model(tiny_llama(), config_of())
    with init_empty_weights():
        empty = get_peft_model(tiny_llama(), config_of())
    for model in (on_meta, empty):
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert set(model.base_model.rank_pattern().values()) == {6}


# --- quantised bases


def quantised(bits: int, folder: Path) -> nn.Module:
    """A Llama of two blocks whose layers are wide enough for bitsandbytes."""
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    if not (folder / "config.json").exists():
        tiny_llama(**sizes).save_pretrained(folder)
    settings = BitsAndBytesConfig(
        load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map={"": "cpu"}, dtype=torch.float32
    )
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)


@pytest.mark.parametrize("recovery", ["paper", "none"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base_is_trained_and_loaded(tmp_path: Path, bits: int, recovery: str) -> None:
    base: Any = quantised(bits, tmp_path / "base")
    model = adapted(base, recovery=recovery, target_r=2)
    names = {type(layer).__name__ for layer in layers_of(model)}
    assert names == {"SvdLinear8bitLt" if bits == 8 else "SvdLinear4bit"}
    untrained = logits_of(model)
    train(model, adamw(model), 1, 20)
    assert sum(model.base_model.rank_pattern().values()) == 12
    trained = logits_of(model)
    assert (trained - untrained).abs().mean() > 0.05
    layer = next(one for one in layers_of(model) if one.r["default"] > 0)
    x = torch.randn(2, 3, layer.in_features)
    assert_near(layer(x) - layer.get_base_layer()(x), x.double() @ delta_by_hand(layer).T, 2e-5)
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(quantised(bits, tmp_path / "base"), tmp_path / "adapter")
    assert_near(logits_of(loaded), trained, 2e-5)


@pytest.mark.filterwarnings("ignore:Merge lora module", "ignore:Unmerge lora module")
@pytest.mark.parametrize("bits", [8, 4])
def test_a_merge_into_a_quantised_base_quantises_the_sum(tmp_path: Path, bits: int) -> None:
    """How much of the delta is in the weights, as a share; each weight is off by its rounding."""
    base: Any = quantised(bits, tmp_path)
    model = random_lambda(base, target_r=6, lora_alpha=2)
    layers = layers_of(model)
    before = [dequantize_module_weight(layer.get_base_layer()).double() for layer in layers]

    def shares() -> list[float]:
        found = []
        for layer, weight in zip(layers, before, strict=True):
            delta = delta_by_hand(layer, 2 / math.sqrt(6))
            moved = dequantize_module_weight(layer.get_base_layer()).double() - weight
            found.append(float((moved * delta).sum() / delta.square().sum()))
        return found

    model.merge_adapter()
    assert shares() == pytest.approx([1] * 6, abs=0.1)
    model.unmerge_adapter()
    assert shares() == pytest.approx([0] * 6, abs=0.1)
