"""The tuner where no `PeftModel` of ours is in charge: other loaders, scalers, injected layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import inject_adapter_in_model
from test_adalora_parity import adamw, adapted, batch, logits_of, tiny_llama, train
from transformers import AutoModelForCausalLM

from rsauto import RsAdaLoraConfig
from rsauto.adalora.allocator import RankAllocator


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
    allocator = RankAllocator.of(model)
    for step in range(1, 21):
        model(**batch(step)).loss.backward()
        optimizer.step()
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
