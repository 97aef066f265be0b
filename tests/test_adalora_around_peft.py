"""The tuner where no `PeftModel` of ours is in charge: other loaders, scalers, injected layers."""

from __future__ import annotations

import copy
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from test_adalora_parity import adamw, adapted, batch, config_of, logits_of, tiny_llama, train
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import rsauto
from rsauto import RsAdaLoraConfig
from rsauto.adalora import rank_allocator
from rsauto.adalora.stepping import follow_optimizers


@pytest.mark.parametrize("recovery", ["paper", "none"])
def test_transformers_own_loader_reads_the_adapter(tmp_path: Path, recovery: str) -> None:
    model = adapted(recovery=recovery)
    train(model, adamw(model), 1, 20)
    tiny_llama().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    difference = logits_of(loaded.eval()) - logits_of(model.eval())
    assert float(difference.abs().max()) < 1e-6
    assert float((logits_of(model) - logits_of(tiny_llama())).abs().max()) > 0.01


def test_a_step_that_a_fused_optimizer_left_out_says_nothing_of_importance() -> None:
    """Its gradients stay multiplied by the loss scale, also where only others were not finite."""
    model = adapted(total_step=100, tfinal=10)
    head = torch.nn.Parameter(torch.ones(3))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([*parameters, head], lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    allocator = model.base_model.allocator()
    for step in range(1, 6):
        loss = model(**batch(step)).loss
        bad = head.sum() * (float("inf") if step == 3 else 1.0)
        scaler.scale(loss + bad).backward()
        scaler.step(optimizer)
        scaler.update()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        assert allocator.num_skipped == (step >= 3)
    largest = max(float(tensor.max()) for tensor in allocator.tensors())
    assert 0 < largest < 1e3


def test_ranks_that_were_never_allocated_are_told_when_they_are_saved(tmp_path: Path) -> None:
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.save_pretrained(tmp_path / "fresh")  # nothing was trained: nothing to tell
    for step in (1, 2):
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.warns(UserWarning, match="update_and_allocate was never called, so every module"):
        model.save_pretrained(tmp_path / "trained")


def test_an_injected_adapter_can_be_allocated() -> None:
    model = inject_adapter_in_model(
        RsAdaLoraConfig(init_r=4, target_r=2, total_step=20, tfinal=2, target_modules=["q_proj"]),
        tiny_llama(),
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    allocator = rank_allocator(model)
    for step in range(1, 21):
        model(**batch(step)).loss.backward()
        before = [p.grad.clone() for p, _ in allocator.regularised()]
        optimizer.step()
        added = [
            float((p.grad - old).norm())
            for (p, _), old in zip(allocator.regularised(), before, strict=True)
        ]
        assert min(added) > 0, "P and Q are kept near orthogonal"
        allocator.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
    assert sum(allocator.rank_pattern.values()) == 2 * len(allocator.layers)


@pytest.mark.parametrize("names", [("model", "default"), ("layers", "other"), ("lora_A", "b")])
def test_adapters_of_awkward_names_are_saved_whole(names: tuple[str, str], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = adapted()
    train(model, adamw(model), 1, 20)
    model.save_pretrained(tmp_path / "alone")
    expected = load_file(tmp_path / "alone/adapter_model.safetensors")
    first, second = names
    loaded = type(model).from_pretrained(tiny_llama(), tmp_path / "alone", adapter_name=first)
    loaded.load_adapter(tmp_path / "alone", adapter_name=second)
    loaded.save_pretrained(tmp_path / "both")
    for name in names:
        folder = tmp_path / "both" / ("" if name == "default" else name)
        found = load_file(folder / "adapter_model.safetensors")
        assert found.keys() == {key for key in expected if "sensitivity" not in key}, name


class Lookahead(torch.optim.Optimizer):
    """Steps another optimizer inside, as ZeRO, SAM and their like do."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()


_kept_alive: list[Any] = []


class CallsItsParent(torch.optim.AdamW):
    """A step that is its parent's, as many subclasses have it."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step(closure)


def added_by_a_step(wrap: bool, fail: bool = False) -> float:
    """Size of what the regulariser adds to the gradients of one step."""
    model = adapted()
    inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    optimizer = Lookahead(inner) if wrap else inner
    if fail:
        broken = Lookahead(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0))
        broken.inner = None  # type: ignore[assignment]
        with pytest.raises(AttributeError):
            broken.step()
        _kept_alive.append(broken)  # as a notebook keeps what failed
    model(**batch(1)).loss.backward()
    factors = [p for p, _ in model.base_model.allocator().regularised()]
    before = [p.grad.clone() for p in factors if p.grad is not None]
    optimizer.step()
    pairs = zip(factors, before, strict=True)
    return float(sum((p.grad - old).square().sum() for p, old in pairs) ** 0.5)


def test_an_optimizer_inside_another_regularises_once() -> None:
    once = added_by_a_step(wrap=False)
    assert once > 0
    assert added_by_a_step(wrap=True) == pytest.approx(once, rel=1e-6)
    assert added_by_a_step(wrap=False, fail=True) == pytest.approx(once, rel=1e-6)
    assert added_by_a_step(wrap=False) == pytest.approx(once, rel=1e-6)


def test_a_subclass_that_calls_its_parent_regularises_once() -> None:
    calls = []

    class Counting:
        def before_step(self, stepped: set[int], loss_scale: Any) -> None:
            calls.append("before")

        def after_step(self, stepped: set[int], found_inf: Any) -> None:
            calls.append("after")

    counting = Counting()
    follow_optimizers(counting)
    parameter = torch.nn.Parameter(torch.ones(2))
    for make in (torch.optim.AdamW, CallsItsParent):
        optimizer = make([parameter], lr=0.1)
        calls.clear()
        parameter.grad = torch.ones(2)
        optimizer.step()
        assert calls == ["before", "after"], make


def test_models_trained_in_two_threads_do_not_notice_each_other() -> None:
    def trained(model: PeftModel) -> list[torch.Tensor]:
        train(model, adamw(model), 1, 12)
        return [p.detach().clone() for _, p in model.base_model.allocator().factors()]

    models = [adapted(tiny_llama(seed)) for seed in (0, 1)]
    alone = [trained(copy.deepcopy(model)) for model in models]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(trained, models))
    finally:
        sys.setswitchinterval(interval)
    for before, after in zip(alone, together, strict=True):
        for one, other in zip(before, after, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("recovery", ["paper", "none"])
def test_trained_biases_are_saved_and_exported(bias: str, recovery: str, tmp_path: Path) -> None:
    def base() -> Qwen2ForCausalLM:
        torch.manual_seed(0)
        return Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2,
            )
        ).eval()  # fmt: skip

    model = adapted(base(), bias=bias, recovery=recovery, target_modules=["q_proj", "v_proj"])
    train(model, adamw(model), 1, 20)
    expected = logits_of(model.eval())
    assert min(model.base_model.rank_pattern().values()) < 2
    model.save_pretrained(tmp_path / "saved")
    rsauto.export_lora(model, tmp_path / "lora")
    rsauto.export_adalora(model, tmp_path / "adalora")
    for name in ("saved", "lora", "adalora"):
        loaded = PeftModel.from_pretrained(base(), tmp_path / name).eval()
        assert float((logits_of(loaded) - expected).abs().max()) < 1e-5, name


def test_a_configuration_can_be_used_again_after_a_save(tmp_path: Path) -> None:
    model = adapted(recovery="none")
    train(model, adamw(model), 1, 20)
    model.save_pretrained(tmp_path / "adapter")
    config = model.peft_config["default"]
    config.inference_mode = False
    again = get_peft_model(tiny_llama(), config)
    assert set(again.base_model.rank_pattern().values()) == {config.init_r}


def test_memory_is_not_given_back_behind_another_optimizers_back() -> None:
    model = adapted(recovery="none")
    parameters = dict(model.named_parameters())
    lambdas = [p for n, p in parameters.items() if "lora_E" in n]
    others = [p for n, p in parameters.items() if p.requires_grad and "lora_E" not in n]
    first, second = torch.optim.AdamW(lambdas, lr=1e-2), torch.optim.AdamW(others, lr=1e-2)
    before = {n: p.shape for n, p in parameters.items()}
    with pytest.raises(ValueError, match="is not trained by the AdamW that was given"):
        for step in range(1, 21):
            model(**batch(step)).loss.backward()
            first.step()
            second.step()
            model.base_model.update_and_allocate(step, first)
            model.zero_grad()
    assert {n: p.shape for n, p in model.named_parameters()} == before


@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.NAdam, torch.optim.RMSprop])
def test_optimizers_with_states_of_other_shapes_shrink_too(make: Any) -> None:
    model = adapted(recovery="none")
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    train(model, optimizer, 1, 20)
    for parameter in model.parameters():
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, torch.Tensor) and value.ndim:
                pairs = zip(value.shape, parameter.shape, strict=True)
                assert all(size in (1, whole) for size, whole in pairs)
    assert sum(model.base_model.rank_pattern().values()) == 2 * len(model.base_model.rank_pattern())


def test_merging_between_two_allocations_leaves_inactive_triplets_out() -> None:
    model = adapted()
    optimizer = adamw(model)
    train(model, optimizer, 1, 12)
    model(**batch(30)).loss.backward()
    optimizer.step()  # lambdas of inactive triplets are moved, and nobody has held them yet
    layers = model.base_model.allocator().layers.values()
    moved = [layer.lora_E["default"][~layer.triplets["default"].mask] for layer in layers]
    assert float(torch.cat(moved).abs().max()) > 0
    expected = logits_of(model.eval())
    model.merge_adapter()
    assert float((logits_of(model) - expected).abs().max()) < 1e-5


def test_the_trained_adapter_is_the_one_that_is_asked_about(tmp_path: Path) -> None:
    model = adapted()
    train(model, adamw(model), 1, 20)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    loaded.add_adapter("new", config_of())
    assert set(loaded.base_model.rank_pattern().values()) == {6}


@pytest.mark.parametrize("export", [rsauto.export_lora, rsauto.export_adalora])
def test_an_export_before_the_end_of_the_schedule_says_so(export: Any, tmp_path: Path) -> None:
    model = adapted()
    optimizer = adamw(model)
    train(model, optimizer, 1, 8)
    modules = len(model.base_model.rank_pattern())
    with pytest.warns(UserWarning, match=f"are active, and {2 * modules} will be at the end"):
        export(model, tmp_path / "early")
    train(model, optimizer, 9, 20)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The ranks are not final")
        export(model, tmp_path / "final")
