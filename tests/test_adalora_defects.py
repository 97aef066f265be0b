"""What goes wrong with AdaLoRA in PEFT does not go wrong here.

The two that need transformers' Trainer are in test_adalora_trainer.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, convert_to_lora, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)
from peft.utils import set_peft_model_state_dict
from test_adalora_parity import (
    LLAMA_TARGETS,
    adamw,
    adapted,
    batch,
    config_of,
    kept,
    logits_of,
    tiny_llama,
    train,
)
from torch import Tensor
from torch.nn import functional as F

from rsauto.adalora.model import svd_layers

TARGET = 2 * 2 * len(LLAMA_TARGETS)
"""Triplets at the end of `config_of`: 2 a module."""


def reloaded(model: PeftModel, folder: Path, **settings: Any) -> PeftModel:
    """Through a file, onto an untouched base."""
    model.save_pretrained(str(folder))
    return PeftModel.from_pretrained(tiny_llama(), str(folder), **settings)


def assert_same_logits(model: Any, other: Any, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(logits_of(model), logits_of(other), atol=tolerance, rtol=0)


def num_kept(model: PeftModel) -> int:
    return sum(sum(flags) for flags in kept(model).values())


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of the next token, mean over all."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


# --- the factor


def test_use_rslora_is_obeyed() -> None:
    gammas = {}
    for use_rslora in (True, False):
        model = adapted(use_rslora=use_rslora, init_lora_weights=False)
        (gammas[use_rslora],) = {layer.scaling["default"] for _, layer in svd_layers(model)}
    assert gammas == {True: pytest.approx(8 / math.sqrt(2)), False: pytest.approx(8 / 2)}
    stock = get_peft_model(
        tiny_llama(),
        AdaLoraConfig(init_r=16, target_r=8, lora_alpha=32, use_rslora=True, total_step=10,
                      target_modules=["q_proj"]),
    )  # fmt: skip
    layer = stock.base_model.model.model.layers[0].self_attn.q_proj
    assert float(layer.scaling["default"] / layer.ranknum["default"]) == pytest.approx(2.0), (
        "PEFT obeys use_rslora by now"
    )


def test_the_factor_can_be_scaled_and_put_back() -> None:
    model = adapted(init_lora_weights=False)
    untouched = logits_of(model)
    base = logits_of(tiny_llama())
    layers = [layer for _, layer in svd_layers(model)]
    gamma = 8 / math.sqrt(2)

    def scaled() -> float:
        (value,) = {layer.scaling["default"] for layer in layers}
        return value / gamma

    for layer in layers:
        layer.set_scale("default", 1.0)
    assert scaled() == pytest.approx(1)
    for layer in layers:
        layer.scale_layer(3.0)
        layer.scale_layer(2.0)
    assert scaled() == pytest.approx(6)
    for layer in layers:
        layer.unscale_layer(2.0)
    assert scaled() == pytest.approx(3)
    assert (logits_of(model) - untouched).abs().max() > 0.01
    for layer in layers:
        layer.unscale_layer()
    assert torch.equal(logits_of(model), untouched)
    for layer in layers:
        layer.set_scale("default", 0.0)
    torch.testing.assert_close(logits_of(model), base, atol=1e-6, rtol=0)


def test_a_scale_lasts_while_ranks_are_allocated() -> None:
    model = adapted(recovery="none")
    for _, layer in svd_layers(model):
        layer.set_scale("default", 0.5)
    train(model, adamw(model), 1, 20)
    for _, layer in svd_layers(model):
        assert layer.scaling["default"] == pytest.approx(4 / math.sqrt(2), rel=1e-15)


def test_peft_can_rescale_for_a_while() -> None:
    model = adapted(init_lora_weights=False)
    before = logits_of(model)
    with rescale_adapter_scale(model, 0.0):
        torch.testing.assert_close(logits_of(model), logits_of(tiny_llama()), atol=1e-6, rtol=0)
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("rank", [5, 255, 257, 300])
def test_the_factor_is_exact_beside_a_bf16_base(rank: int) -> None:
    """A factor kept as a bf16 tensor would be off by up to 0.4 %."""
    base = tiny_llama().to(torch.bfloat16)
    settings: dict[str, Any] = {"target_r": rank, "init_r": rank, "init_lora_weights": False}
    model = get_peft_model(
        base, config_of(**settings, target_modules=["q_proj"]), autocast_adapter_dtype=False
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(
        name.endswith(("lora_A.default", "lora_E.default", "lora_B.default")) for name in trained
    )
    for _, layer in svd_layers(model):
        assert layer.scaling["default"] == pytest.approx(8 / math.sqrt(rank), rel=1e-15)
        a, e, b = (p.double() for p in (layer.lora_A["default"], layer.lora_E["default"],
                                        layer.lora_B["default"]))  # fmt: skip
        exact = 8 / math.sqrt(rank) * b @ (e * a)
        delta = layer.get_delta_weight("default").double()
        assert float(((delta * exact).sum() / exact.square().sum()).detach()) == pytest.approx(
            1, abs=3e-4
        )


# --- masked triplets


@pytest.mark.parametrize("recovery", ["paper", "none"])
def test_memory_and_checkpoint_are_the_same_model_at_any_step(
    tmp_path: Path, recovery: str
) -> None:
    """Also between two allocations, where an optimizer moves masked lambdas."""
    model = adapted(deltaT=4, recovery=recovery)
    optimizer = adamw(model)
    for step in range(1, 21):
        train(model, optimizer, step, step)
        active = model.base_model.rank_pattern()
        if recovery == "paper":
            held = {name.removesuffix(".lora_E.default"): sum(k) for name, k in kept(model).items()}
            assert held == {f"base_model.model.{name}": rank for name, rank in active.items()}
        assert sum(active.values()) == 36 if step < 4 else sum(active.values()) < 36
        if step not in (1, 3, 4, 5, 7, 10, 13, 15, 18, 20):
            continue
        loaded = reloaded(model, tmp_path / str(step))
        assert_same_logits(loaded, model)
        assert loaded.base_model.rank_pattern() == active
        shapes = {name: len(layer.lora_E["default"]) for name, layer in svd_layers(loaded.model)}
        assert shapes == {name.removeprefix("base_model.model."): r for name, r in active.items()}
    assert sum(active.values()) == TARGET


def test_a_merge_between_two_allocations_is_the_same_model() -> None:
    model = adapted(deltaT=4)
    train(model, adamw(model), 1, 10)
    before = logits_of(model)
    assert num_kept(model) < 36
    torch.testing.assert_close(logits_of(model.merge_and_unload()), before, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "recovery",
    [
        "paper",
        "none",
    ],
)
def test_the_pattern_holds_when_nobody_calls_after_it_was_fixed(
    tmp_path: Path, recovery: str
) -> None:
    model = adapted(recovery=recovery)
    optimizer = adamw(model)
    train(model, optimizer, 1, 16)
    assert num_kept(model) == TARGET
    before = kept(model)
    for step in range(17, 27):
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert kept(model) == before
    assert_same_logits(reloaded(model, tmp_path), model)


@pytest.mark.parametrize("recovery", ["paper", "none"])
@pytest.mark.parametrize("every", [4, 6, 19])
def test_the_budget_is_reached_though_the_last_allocating_step_is_passed_over(
    every: int, recovery: str
) -> None:
    model = adapted(recovery=recovery, deltaT=5)
    optimizer = adamw(model)
    for step in range(1, 25):
        model(**batch(step)).loss.backward()
        optimizer.step()
        if step % every == 0:
            model.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
    assert sum(model.base_model.rank_pattern().values()) == TARGET


def test_equal_ranks_at_both_ends_prune_nothing() -> None:
    model = adapted(init_r=4, target_r=4)
    train(model, adamw(model), 1, 20)
    assert set(model.base_model.rank_pattern().values()) == {4}
    assert all(all(flags) for flags in kept(model).values())


# --- the loss


def test_a_loss_is_cross_entropy_alone() -> None:
    model = adapted(orth_reg_weight=5.0, init_lora_weights=False)
    for mode in (model.train(), model.eval()):
        out = mode(**batch(1))
        expected = cross_entropy(out.logits, batch(1)["labels"])
        assert out.loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_an_adapter_for_inference_takes_labels(tmp_path: Path) -> None:
    model = adapted()
    train(model, adamw(model), 1, 20)
    loaded = reloaded(model, tmp_path)
    loss = loaded(**batch(1)).loss.item()
    assert loss == pytest.approx(model(**batch(1)).loss.item(), abs=1e-5)
    assert not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(ValueError, match=r"No adapter is trained: .*is_trainable"):
        loaded.base_model.update_and_allocate(1)


def test_the_regulariser_works_on_copies_and_on_adapters_that_were_loaded(tmp_path: Path) -> None:
    def deviation(model: PeftModel) -> float:
        total = 0.0
        for _, layer in svd_layers(model):
            q = layer.lora_A["default"].detach()
            total += float((q @ q.T - torch.eye(len(q))).norm())
        return total

    model = adapted(orth_reg_weight=2.0)
    trained = [model, copy.deepcopy(model), reloaded(model, tmp_path, is_trainable=True)]
    before = deviation(model)
    for one in trained:
        train(one, adamw(one), 1, 20)
    after = [deviation(one) for one in trained]
    assert after[0] < before / 2
    assert after == pytest.approx([after[0]] * 3, rel=1e-5)


def test_the_regulariser_sees_gradients_of_a_closure() -> None:
    """Lightning, among others, hands the backward pass to the optimizer."""
    by_closure, by_hand = adapted(orth_reg_weight=2.0), adapted(orth_reg_weight=2.0)
    optimizer = adamw(by_closure)
    for step in range(1, 6):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = by_closure(**batch(step)).loss
            loss.backward()
            return loss

        optimizer.step(closure)
        by_closure.base_model.update_and_allocate(step, optimizer)
    train(by_hand, adamw(by_hand), 1, 5)
    assert_same_logits(by_closure, by_hand)


# --- allocation after loading, deleting, overflowing


@pytest.mark.parametrize("recovery", ["paper", "none"])
def test_a_pruned_adapter_can_be_loaded_and_allocated_further(
    tmp_path: Path, recovery: str
) -> None:
    model = adapted(recovery=recovery)
    train(model, adamw(model), 1, 10)
    loaded = reloaded(model, tmp_path, is_trainable=True)
    assert loaded.base_model.rank_pattern() == model.base_model.rank_pattern()
    train(loaded, adamw(loaded), 11, 20)
    assert sum(loaded.base_model.rank_pattern().values()) == TARGET
    assert num_kept(loaded) == TARGET


def test_an_adapter_loaded_for_inference_can_be_trained_at_its_own_ranks(tmp_path: Path) -> None:
    model = adapted()
    train(model, adamw(model), 1, 20)
    loaded = reloaded(model, tmp_path, is_trainable=True)
    train(loaded, adamw(loaded), 1, 20)
    assert loaded.base_model.rank_pattern() == model.base_model.rank_pattern()
    assert num_kept(loaded) == TARGET
    assert (logits_of(loaded) - logits_of(model)).abs().max() > 0.01


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_pruned_adapter_loads_without_using_memory_twice(
    tmp_path: Path, is_trainable: bool
) -> None:
    model = adapted()
    train(model, adamw(model), 1, 20)
    assert 0 in model.base_model.rank_pattern().values(), (
        "a module without triplets is the hard one"
    )
    loaded = reloaded(model, tmp_path, low_cpu_mem_usage=True, is_trainable=is_trainable)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    assert_same_logits(loaded, model)
    if is_trainable:
        train(loaded, adamw(loaded), 1, 2)
        assert num_kept(loaded) == TARGET


def test_tensors_can_be_put_into_a_model_in_memory(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = adapted()
    train(model, adamw(model), 1, 10)
    model.save_pretrained(str(tmp_path))
    other = adapted(seed=7)
    found = set_peft_model_state_dict(other, load_file(tmp_path / "adapter_model.safetensors"))
    assert not found.unexpected_keys
    assert_same_logits(other, model, 0.0)
    assert other.base_model.rank_pattern() == model.base_model.rank_pattern()


def test_a_step_that_overflows_does_not_decide_anything() -> None:
    """Its optimizer step is skipped, as a gradient scaler does; so are its gradients."""
    runs = {}
    for broken in (True, False):
        model = adapted(deltaT=3)
        optimizer = adamw(model)
        for step in range(1, 21):
            if step == 8:
                if broken:
                    model(**batch(step)).loss.backward()
                    weight = dict(model.named_parameters())
                    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default"
                    gradient = weight[name].grad
                    assert gradient is not None
                    gradient[0, 0] = math.inf
                    model.base_model.update_and_allocate(step, optimizer)
                optimizer.zero_grad()
                continue
            train(model, optimizer, step, step)
        runs[broken] = model
    assert all(p.isfinite().all() for p in runs[True].parameters())
    assert runs[True].base_model.rank_pattern() == runs[False].base_model.rank_pattern()
    assert_same_logits(runs[True], runs[False])


@pytest.mark.parametrize("name", ["default", "other"])
def test_an_adapter_can_be_deleted_and_another_trained(name: str) -> None:
    model = adapted()
    train(model, adamw(model), 1, 20)
    model.delete_adapter("default")
    model.add_adapter(name, config_of(target_r=3))
    model.set_adapter(name)
    train(model, adamw(model), 1, 20)
    assert model.base_model.trained_adapter == name
    assert sum(model.base_model.rank_pattern().values()) == 3 * 6


def test_two_adapters_cannot_be_trained_at_once() -> None:
    model = adapted()
    with pytest.raises(ValueError, match=r"trains one adapter at a time, but default, other"):
        model.add_adapter("other", config_of())


@pytest.mark.filterwarnings("ignore:Adapter name")
@pytest.mark.parametrize("name", ["lora", "model", "layers", "lora_A", "base_model"])
def test_an_adapter_may_have_any_name(tmp_path: Path, name: str) -> None:
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(), config_of(), adapter_name=name)
    assert isinstance(model, PeftModel)
    train(model, adamw(model), 1, 20)
    assert sum(model.base_model.rank_pattern().values()) == num_kept(model) == TARGET
    model.save_pretrained(str(tmp_path))
    for given in ("default", name):
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / name, adapter_name=given)
        assert_same_logits(loaded, model)


@pytest.mark.filterwarnings("ignore:Adapter name")
def test_only_the_adapter_of_that_very_name_is_trained_and_saved(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(), config_of(), adapter_name="lora")
    assert isinstance(model, PeftModel)
    other = config_of(inference_mode=True, init_lora_weights=False, init_r=4)
    model.add_adapter("lora_2", other)
    model.set_adapter("lora_2")
    before = logits_of(model)
    model.set_adapter("lora")
    train(model, adamw(model), 1, 20)
    assert sum(model.base_model.rank_pattern("lora").values()) == TARGET
    assert set(model.base_model.rank_pattern("lora_2").values()) == {4}
    model.save_pretrained(str(tmp_path))
    for name in ("lora", "lora_2"):
        model.set_adapter(name)
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / name)
        assert_same_logits(loaded, model)
    assert torch.equal(logits_of(model), before)


# --- what is left of PEFT


def test_peft_can_convert_to_lora() -> None:
    model = adapted()
    train(model, adamw(model), 1, 20)
    assert model.supports_lora_conversion()
    config, tensors = convert_to_lora(model, rank=6)
    plain = get_peft_model(tiny_llama(), config)
    set_peft_model_state_dict(plain, tensors)
    torch.testing.assert_close(logits_of(plain), logits_of(model), atol=1e-4, rtol=0)


def test_adapters_are_not_added_up() -> None:
    with pytest.raises(TypeError, match="export the adapters as plain LoRA"):
        adapted().add_weighted_adapter(["default"], [1.0], "sum")


UNSUPPORTED: dict[str, Any] = {
    "use_dora": True,
    "use_qalora": True,
    "alpha_pattern": {"q_proj": 4},
    "layer_replication": [(0, 2)],
    "lora_bias": True,
    "target_parameters": ["x"],
    "eva_config": EvaConfig(),
    "corda_config": CordaConfig(),
    "lora_ga_config": LoraGAConfig(),
    "arrow_config": ArrowConfig(),
    "kasa_config": KasaConfig(),
    "velora_config": VeloraConfig(),
    "monteclora_config": MontecloraConfig(),
    "use_bdlora": BdLoraConfig(),
    "alora_invocation_tokens": [1],
    "megatron_config": {"a": 1},
    "trainable_token_indices": [1],
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_fields_that_mean_nothing_here_are_refused(name: str) -> None:
    with pytest.raises(ValueError) as refused:
        config_of(**{name: UNSUPPORTED[name]})
    assert str(refused.value) == f"{name}: not supported by AdaLoRA. Leave it out."


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "r": ({"r": 16}, "r: 16 has no meaning here. Set init_r and target_r instead."),
    "ranks-that-rise": (
        {"target_r": 9},
        "target_r: 9 is above init_r, which is 6. Ranks only fall: raise init_r, usually to 1.5 or "
        "2 times target_r.",
    ),
    "no-room": (
        {"total_step": 8},
        "tinit 3 and tfinal 5 leave no step to allocate ranks in, of total_step 8. Lower them, or "
        "train longer.",
    ),
    "steps": ({"tinit": -1}, "tinit: -1 is not a whole number of at least 0."),
    "part-of-a-step": ({"tfinal": 2.5}, "tfinal: 2.5 is not a whole number of at least 0."),
    "never": ({"deltaT": 0}, "deltaT: 0 is not a whole number of at least 1."),
    "rank-0": ({"init_r": 0}, "init_r: 0 is not a whole number of at least 1."),
    "beta": ({"beta1": 1.0}, "beta1: 1.0 must be between 0 and 1."),
    "weight": ({"orth_reg_weight": -1}, "orth_reg_weight: -1 must be 0 or more."),
    "nan": ({"orth_reg_weight": math.nan}, "orth_reg_weight: nan must be 0 or more."),
    "alpha": ({"lora_alpha": 0}, "lora_alpha: 0 must be more than 0."),
    "init": ({"init_std": 0.0}, "init_std: 0.0 must be more than 0, or None."),
    "score": (
        {"score": "lamda"},
        "score: 'lamda' is not known. Did you mean 'lambda'? Choose one of full, lambda.",
    ),
    "recovery": (
        {"recovery": "Paper"},
        "recovery: 'Paper' is not known. Did you mean 'paper'? Choose one of paper, none.",
    ),
    "scale_rank": (
        {"scale_rank": "mean"},
        "scale_rank: 'mean' is not known. Choose one of target, init, live.",
    ),
    "start": (
        {"init_lora_weights": "pissa"},
        "init_lora_weights: 'pissa' is for LoRA. Choose True (lambda starts at zero) or False (at "
        "random, to test with).",
    ),
    "all-at-once": (
        {"beta2": 0, "r": 3},
        "beta2: 0 must be between 0 and 1. r: 3 has no meaning here. Set init_r and target_r "
        "instead.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_that_cannot_be_trained_with_are_refused(name: str) -> None:
    changes, text = REFUSED[name]
    with pytest.raises(ValueError) as refused:
        config_of(**changes)
    assert str(refused.value) == text


def test_a_run_of_unknown_length_is_refused() -> None:
    model = adapted(total_step=None)
    with pytest.raises(ValueError, match=r"total_step: not set, .*RsAdaLoraCallback"):
        train(model, adamw(model), 1, 1)
    with pytest.raises(ValueError, match="leave no step to allocate ranks in, of total_step 8"):
        model.base_model.set_total_step(8)
    assert model.base_model.config_of("default").total_step is None
    model.base_model.set_total_step(20)
    train(model, adamw(model), 1, 20)
    assert num_kept(model) == TARGET


def test_a_call_after_zero_grad_is_refused() -> None:
    model = adapted()
    optimizer = adamw(model)
    model(**batch(1)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match=r"found no gradients. Call it after optimizer.step\(\)"):
        model.base_model.update_and_allocate(1, optimizer)


@pytest.mark.parametrize("target", ["embed_tokens", "input_layernorm"])
def test_layers_that_are_not_linear_are_refused(target: str) -> None:
    with pytest.raises(
        ValueError, match=rf"target_modules: '.*{target}' is of type .*adapts nn.Linear"
    ):
        adapted(target_modules=[target])
