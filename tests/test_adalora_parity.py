"""At PEFT's own scale and options, every step is that of PEFT's AdaLoRA."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from rsauto import RsAdaLoraConfig
from rsauto.adalora.model import svd_layers

VOCABULARY = 64
LLAMA_TARGETS = ["q_proj", "v_proj", "down_proj"]
GPT2_TARGETS = ["c_attn", "c_fc", "c_proj"]
LEARNING_RATE = 1e-2


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """2 blocks, 32 wide, 64 tokens."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "initializer_range": 0.1, "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """2 blocks of transformers' Conv1D, without dropout."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, initializer_range=0.1,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def batch(step: int, rows: int = 4) -> dict[str, Tensor]:
    """Rows of 8 tokens, each a count upwards in strides of 1 to 3."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(VOCABULARY, (rows, 1), generator=generator)
    stride = torch.randint(1, 4, (rows, 1), generator=generator)
    ids = (start + stride * torch.arange(8)) % VOCABULARY
    return {"input_ids": ids, "labels": ids}


def config_of(**changes: Any) -> RsAdaLoraConfig:
    """6 triplets a module at first and 2 at last, in 20 steps."""
    settings: dict[str, Any] = {
        "target_modules": LLAMA_TARGETS, "target_r": 2, "init_r": 6, "lora_alpha": 8,
        "tinit": 3, "tfinal": 5, "total_step": 20, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    return RsAdaLoraConfig(**{**settings, **changes})


def adapted(base: PreTrainedModel | None = None, seed: int = 1, **changes: Any) -> PeftModel:
    """A fresh adapter on a tiny Llama, or on ``base``."""
    base = base or tiny_llama()
    torch.manual_seed(seed)
    model = get_peft_model(base, config_of(**changes))
    assert isinstance(model, PeftModel)
    return model


def adamw(model: torch.nn.Module, **settings: Any) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, **settings)


def train(
    model: PeftModel, optimizer: torch.optim.Optimizer, first: int, last: int, rows: int = 4
) -> None:
    """Steps ``first`` to ``last`` as in a loop by hand, both included."""
    for step in range(first, last + 1):
        model(**batch(step, rows)).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()


def logits_of(model: Any, step: int = 1000) -> Tensor:
    """On a batch that is never trained on."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=batch(step)["input_ids"]).logits
    return logits


def kept(model: PeftModel) -> dict[str, list[bool]]:
    """Which lambdas are not zero, by name of their parameter."""
    return {
        name: (p.detach().flatten() != 0).tolist()
        for name, p in model.named_parameters()
        if "lora_E" in name
    }


def assert_same_run(stock: PeftModel, ours: PeftModel, total_step: int) -> None:
    """Trains both from the same factors; logits and kept triplets agree all along."""
    missing = ours.load_state_dict(stock.state_dict(), strict=False)
    assert not missing.missing_keys
    assert all("ranknum" in key for key in missing.unexpected_keys), "PEFT's scale is a parameter"
    optimizers = adamw(stock), adamw(ours)
    untrained = logits_of(ours)
    for step in range(1, total_step + 1):
        stock(**batch(step)).loss.backward()
        optimizers[0].step()
        stock.base_model.update_and_allocate(step)
        optimizers[0].zero_grad()
        train(ours, optimizers[1], step, step)
        assert kept(ours) == kept(stock), f"step {step}"
        if step % 5 == 0:
            torch.testing.assert_close(logits_of(ours), logits_of(stock), atol=1e-5, rtol=0)
    assert (logits_of(ours) - untrained).abs().max() > 0.1, "a run that changes nothing"
    factors = dict(ours.named_parameters())
    for name, value in stock.named_parameters():
        if name in factors:
            torch.testing.assert_close(factors[name], value, atol=1e-5, rtol=0)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "12-to-8": {"init_r": 12, "target_r": 8},
    "4-to-1": {"init_r": 4, "target_r": 1},
    "alpha-32": {"lora_alpha": 32},
    "no-orthogonality": {"orth_reg_weight": 0.0},
    "no-warm-up": {"tinit": 0},
    "no-final-phase": {"tfinal": 0},
    "neither": {"tinit": 0, "tfinal": 0},
    "long-final-phase": {"tinit": 10, "tfinal": 35},
    "other-betas": {"beta1": 0.5, "beta2": 0.95},
}
STOCK: dict[str, Any] = {
    "init_r": 6, "target_r": 2, "lora_alpha": 16, "tinit": 5, "tfinal": 15, "total_step": 50,
    "orth_reg_weight": 0.5, "task_type": "CAUSAL_LM",
}  # fmt: skip


def pair(
    build: Callable[[], PreTrainedModel], targets: list[str], **changes: Any
) -> tuple[PeftModel, PeftModel]:
    settings = {**STOCK, "target_modules": targets, **changes}
    stock = get_peft_model(build(), AdaLoraConfig(**settings))
    ours = get_peft_model(
        build(), RsAdaLoraConfig(**settings, use_rslora=False, scale_rank="init", init_std=0.02)
    )
    assert isinstance(stock, PeftModel) and isinstance(ours, PeftModel)
    return stock, ours


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.sample(4)
def test_a_llama_trains_as_with_peft(changes: dict[str, Any]) -> None:
    stock, ours = pair(tiny_llama, LLAMA_TARGETS, **changes)
    assert_same_run(stock, ours, total_step=50)


@pytest.mark.parametrize("name", ["plain", "12-to-8", "neither"])
@pytest.mark.sample(1)
def test_layers_of_conv1d_train_as_with_peft(name: str) -> None:
    stock, ours = pair(tiny_gpt2, GPT2_TARGETS, fan_in_fan_out=True, **VARIANTS[name])
    assert_same_run(stock, ours, total_step=50)


@pytest.mark.parametrize(("init_r", "target_r"), [(6, 2), (8, 5)])
@pytest.mark.parametrize("scale_rank", ["target", "init"])
@pytest.mark.sample(2)
def test_the_factor_of_rslora_is_another_alpha_of_peft(
    init_r: int, target_r: int, scale_rank: str
) -> None:
    settings: dict[str, Any] = {
        **STOCK, "target_modules": LLAMA_TARGETS, "init_r": init_r, "target_r": target_r,
    }  # fmt: skip
    reference = {"target": target_r, "init": init_r}[scale_rank]
    ours = get_peft_model(tiny_llama(), RsAdaLoraConfig(**settings, scale_rank=scale_rank))
    settings["lora_alpha"] = 16 * init_r / math.sqrt(reference)
    stock = get_peft_model(tiny_llama(), AdaLoraConfig(**settings))
    assert isinstance(stock, PeftModel) and isinstance(ours, PeftModel)
    assert_same_run(stock, ours, total_step=50)


def test_factors_start_from_the_distribution_of_peft() -> None:
    for model in pair(lambda: tiny_llama(hidden_size=256), ["q_proj"], init_r=64, target_r=8):
        factors = {name: p for name, p in model.named_parameters() if "lora_" in name}
        for name in ("lora_A", "lora_B"):
            values = torch.cat([p.detach().flatten() for key, p in factors.items() if name in key])
            assert float(values.std()) == pytest.approx(0.02, rel=0.03)
            assert float(values.mean()) == pytest.approx(0, abs=0.001)
        assert not any(p.any() for key, p in factors.items() if "lora_E" in key)


def test_the_state_of_a_run_is_that_of_peft() -> None:
    """PEFT can go on from our factors, which have its names and shapes."""
    stock, ours = pair(tiny_llama, LLAMA_TARGETS)
    train(ours, adamw(ours), 1, 50)
    stock.load_state_dict(ours.state_dict(), strict=False)
    torch.testing.assert_close(logits_of(stock), logits_of(ours), atol=1e-5, rtol=0)
    names = [name for name, _ in svd_layers(ours)]
    assert len(names) == 6 and sum(sum(k) for k in kept(ours).values()) == 12
