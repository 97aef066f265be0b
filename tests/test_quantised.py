"""Quantised bases: loaded and trained by bitsandbytes itself, planned for without it."""

from __future__ import annotations

import dataclasses
import json
import math
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from planning import planner_of
from test_memory import plain_evaluation, plain_step, random_batch
from tiny_study import records, study_values, write_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from rsauto.adapters.export import export_lora
from rsauto.adapters.lora import add_adapter, lora_layers, remove_adapter, trainable_parameters
from rsauto.adapters.optimizers import build_optimizer
from rsauto.api import run_study
from rsauto.base import load_weights, open_base, prepare
from rsauto.config import ModelConfig
from rsauto.errors import InputError
from rsauto.memory.kinds import StepKind
from rsauto.memory.measure import PeakMeter
from rsauto.memory.quantised import stand_in_for_linears
from rsauto.quantisation import Bits, loading_settings, require_bitsandbytes
from rsauto.records import TrialSpec
from rsauto.training.flops import linear_weights

CPU = torch.device("cpu")
BITS: tuple[Bits, ...] = (8, 4)
LLAMA = LlamaConfig(
    hidden_size=256,
    num_hidden_layers=2,
    intermediate_size=512,
    vocab_size=512,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
GPT2 = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=512, n_positions=64)


def spec_of(rank: int = 4, **changes: Any) -> TrialSpec:
    settings = {"role": "search", "method": "rslora", "scaling_rule": "rslora", **changes}
    return TrialSpec(rank=rank, alpha=rank, learning_rate=1e-2, **settings)


def write(folder: Path, config: PretrainedConfig) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def quantised(folder: Path, bits: Bits, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Loaded with transformers alone."""
    pytest.importorskip("bitsandbytes")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=loading_settings(bits, dtype, ["lm_head"]),
        device_map={"": "cpu"},
    )
    return model


def loss_of(model: nn.Module) -> torch.Tensor:
    batch = random_batch(2, 24)
    loss: torch.Tensor = model(**batch).loss
    return loss


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("llama"), LLAMA)


def storage_bytes(layer: nn.Module) -> list[int]:
    """Sizes of all that a layer of bitsandbytes holds, found by its own names."""
    held: list[Any] = list(layer.parameters())
    weight: Any = layer.weight
    if hasattr(weight, "quant_state"):
        state = weight.quant_state
        held += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    else:
        held.append(weight.SCB)
    return sorted(tensor.numel() * tensor.itemsize for tensor in held)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_stand_ins_are_the_layers_that_loading_quantises(
    tmp_path: Path, config: PretrainedConfig, bits: Bits
) -> None:
    real = quantised(write(tmp_path, config), bits)
    with torch.device("meta"):
        planned = AutoModelForCausalLM.from_config(config)
        stand_in_for_linears(planned, bits, "cpu")
    found = {n: storage_bytes(m) for n, m in real.named_modules() if _is_quantised(m)}
    stand_ins = {
        name: sorted(t.numel() * t.itemsize for t in (*module.parameters(), *module.buffers()))
        for name, module in planned.named_modules()
        if _is_quantised(module)
    }
    assert found == stand_ins
    assert len(found) == (14 if config is LLAMA else 4)


def _is_quantised(module: nn.Module) -> bool:
    return type(module).__name__ in ("Linear8bitLt", "Linear4bit")


def measured_peak(
    folder: Path, kind: StepKind, rank: int, micro_batch_size: int, lengths: tuple[int, int]
) -> int:
    """Of a plain loop over real layers; the memory is reported by the profiler."""
    assert kind.quant_bits is not None
    base = quantised(folder, kind.quant_bits, getattr(torch, kind.dtype))
    model = prepare(base, kind.gradient_checkpointing)
    adapted = add_adapter(model, spec_of(rank, adapter_dtype=kind.adapter_dtype))
    optimizer = build_optimizer(adapted, name="adamw", learning_rate=1e-4)
    meter = PeakMeter(CPU, adapted, optimizer)
    adapted.train()
    for step in range(2):
        with meter.watch(heavy=step > 0):
            batch = random_batch(micro_batch_size, lengths[0])
            plain_step(adapted, optimizer, [batch])
    adapted.eval()
    with meter.watch():
        plain_evaluation(adapted, random_batch(micro_batch_size, lengths[1]))
    assert meter.peak_bytes is not None
    return meter.peak_bytes


@pytest.mark.parametrize(
    "bits, changes, micro_batch_size, lengths, rank",
    [
        (8, {"dtype": "bfloat16"}, 1, (40, 40), 64),
        (8, {"gradient_checkpointing": True}, 4, (40, 40), 16),
        (8, {}, 4, (8, 96), 4),
        (4, {}, 1, (40, 40), 2),
        (4, {"dtype": "bfloat16", "adapter_dtype": "bfloat16"}, 4, (40, 40), 16),
        (4, {}, 4, (8, 96), 4),
    ],
)
@pytest.mark.sample(2)
def test_prediction_is_close_to_the_measured_peak(
    llama_folder: Path,
    bits: Bits,
    changes: dict[str, Any],
    micro_batch_size: int,
    lengths: tuple[int, int],
    rank: int,
) -> None:
    planner = planner_of(LLAMA, *lengths, quant_bits=bits, **changes)
    predicted = planner.predict(
        rank, batch_size=micro_batch_size, micro_batch_size=micro_batch_size
    ).peak_bytes
    measured = measured_peak(llama_folder, planner.kind, rank, micro_batch_size, lengths)
    assert abs(predicted / measured - 1) < 0.01


def test_llama_8b_is_planned_from_its_configuration() -> None:
    hidden, inner, layers, vocabulary, rank = 4096, 14336, 32, 128256, 64
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )
    planner = planner_of(config, 512, dtype="bfloat16", device_type="cuda", quant_bits=8)
    prediction = planner.predict(
        rank,
        target_modules="all-linear",
        optimizer="adamw",
        batch_size=8,
        micro_batch_size=1,
    )
    shapes = [(hidden, hidden), (hidden, 1024), (hidden, 1024), (hidden, hidden)]
    shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
    int8 = layers * sum(d_in * d_out + 4 * d_out for d_in, d_out in shapes)
    half = 2 * (2 * vocabulary * hidden + (2 * layers + 1) * hidden)
    adapter = layers * sum(rank * (d_in + d_out) for d_in, d_out in shapes)
    assert prediction.num_trainable_params == adapter
    assert prediction.breakdown["weights"] == pytest.approx(int8 + half, abs=2**20)
    assert prediction.breakdown["adapters"] == 4 * adapter
    assert prediction.breakdown["gradients"] == 4 * adapter
    assert prediction.breakdown["optimizer"] == pytest.approx(8 * adapter, abs=2**20)
    assert prediction.peak_bytes < 24 * 2**30


@pytest.mark.parametrize("bits", BITS)
def test_a_base_is_loaded_quantised_but_for_its_head(tmp_path: Path, bits: Bits) -> None:
    pytest.importorskip("bitsandbytes")
    folder = write_model(tmp_path, hidden_size=64)
    losses = {}
    for quant_bits in (None, bits):
        config = ModelConfig(name=str(folder), quant_bits=quant_bits, dtype="bfloat16")
        model = load_weights(open_base(config), config, CPU).model
        losses[quant_bits] = float(loss_of(model.eval()))
    kinds = {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    expected = "Linear8bitLt" if bits == 8 else "Linear4bit"
    assert kinds.pop("lm_head") == "Linear"
    assert set(kinds.values()) == {expected}
    assert model.lm_head.weight.dtype == model.model.norm.weight.dtype == torch.bfloat16
    assert not trainable_parameters(model)
    assert 0 < abs(losses[None] - losses[bits]) < 0.05


@pytest.mark.parametrize("bits", BITS)
def test_training_goes_on_after_an_evaluation(llama_folder: Path, bits: Bits) -> None:
    model = quantised(llama_folder, bits, torch.bfloat16)
    with torch.no_grad():
        before = loss_of(model.eval())  # may pack 4 bit weights for inference
    adapted = add_adapter(prepare(model, gradient_checkpointing=False), spec_of())
    with torch.no_grad():
        loss_of(adapted.eval())
    loss_of(adapted.train()).backward()
    norms = [p.grad.norm() for n, p in trainable_parameters(adapted).items() if "lora_B" in n]
    assert min(norms) > 0
    remove_adapter(adapted)
    with torch.no_grad():
        assert float(loss_of(model.eval())) == pytest.approx(float(before), abs=2e-3)


@pytest.mark.parametrize("bits", BITS)
def test_checkpointing_changes_no_gradient(llama_folder: Path, bits: Bits) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = prepare(quantised(llama_folder, bits), checkpointing)
        adapted = add_adapter(model, spec_of()).train()
        loss_of(adapted).backward()
        gradients.append([p.grad for p in trainable_parameters(adapted).values()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("bits", BITS)
def test_factors_start_from_the_numbers_of_float32(llama_folder: Path, bits: Bits) -> None:
    def factors(model: PreTrainedModel, **changes: Any) -> list[torch.Tensor]:
        torch.manual_seed(3)
        adapted = add_adapter(prepare(model, False), spec_of(**changes))
        return [p.detach() for p in trainable_parameters(adapted).values()]

    full = factors(AutoModelForCausalLM.from_pretrained(llama_folder))
    for drawn, reference in zip(factors(quantised(llama_folder, bits)), full, strict=True):
        assert drawn.dtype == torch.float32 and torch.equal(drawn, reference)
    half = factors(quantised(llama_folder, bits), adapter_dtype="bfloat16")
    for drawn, reference in zip(half, full, strict=True):
        assert drawn.dtype == torch.bfloat16
        assert torch.equal(drawn, reference.to(torch.bfloat16))


@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", BITS)
def test_export_reloads_in_peft_on_the_same_base(
    llama_folder: Path, tmp_path: Path, bits: Bits, adapter_dtype: str
) -> None:
    model = prepare(quantised(llama_folder, bits), gradient_checkpointing=False)
    adapted = add_adapter(model, spec_of(adapter_dtype=adapter_dtype))
    optimizer = build_optimizer(adapted, name="adamw", learning_rate=1e-2)
    for _ in range(3):
        plain_step(adapted.train(), optimizer, [random_batch(2, 24)])
    with torch.no_grad():
        trained = float(loss_of(adapted.eval()))
        with adapted.disable_adapter():
            untrained = float(loss_of(adapted))
    export_lora(adapted, tmp_path / "adapter", base_name="base", card="")
    reloaded = PeftModel.from_pretrained(quantised(llama_folder, bits), tmp_path / "adapter")
    dtype = torch.float32 if adapter_dtype == "float32" else torch.bfloat16
    for layer in lora_layers(reloaded):
        layer.lora_A.to(dtype)
        layer.lora_B.to(dtype)
    with torch.no_grad():
        again = float(loss_of(prepare(reloaded, False).eval()))  # type: ignore[arg-type, attr-defined]
    assert abs(trained - untrained) > 1e-2
    # gamma_r is 2: folded into bfloat16 factors without rounding.
    assert again == pytest.approx(trained, abs=1e-5)
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["use_rslora"]) == (4, 4, False)
    assert saved["fan_in_fan_out"] is False and saved["peft_type"] == "LORA"


@pytest.mark.parametrize("bits", BITS)
def test_flops_do_not_depend_on_how_weights_are_stored(llama_folder: Path, bits: Bits) -> None:
    full = AutoModelForCausalLM.from_pretrained(llama_folder).requires_grad_(False)
    packed = quantised(llama_folder, bits).requires_grad_(False)
    assert linear_weights(packed) == linear_weights(full)


def test_missing_or_old_bitsandbytes_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    folder = write_model(tmp_path)
    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(InputError, match=r"model.quant_bits: 8 needs .*'rsauto\[quant\]'"):
        open_base(ModelConfig(name=str(folder), quant_bits=8))
    monkeypatch.setattr(metadata, "version", lambda _: "0.45.2")
    with pytest.raises(InputError, match=r"0\.48 or newer, but 0\.45\.2 is installed"):
        require_bitsandbytes(4)


def test_models_that_are_saved_quantised_must_match(tmp_path: Path) -> None:
    plain, saved = write_model(tmp_path / "plain", hidden_size=64), tmp_path / "saved"
    model = quantised(plain, 4)
    model.save_pretrained(saved)
    for file in plain.glob("token*"):
        (saved / file.name).write_bytes(file.read_bytes())
    for other in (None, 8):
        with pytest.raises(InputError, match=r"saved in 4 bit\. Set model\.quant_bits: 4"):
            open_base(ModelConfig(name=str(saved), quant_bits=other))
    config = ModelConfig(name=str(saved), quant_bits=4)
    loaded = load_weights(open_base(config), config, CPU).model
    with torch.no_grad():
        assert torch.equal(loss_of(loaded.eval()), loss_of(prepare(model, False).eval()))
    described = json.loads((plain / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (plain / "config.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match="quantised with gptq"):
        open_base(ModelConfig(name=str(plain), quant_bits=4))


def test_a_study_runs_on_a_quantised_base(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    values = study_values(tmp_path, trials=1, seeds=1, rank=[4], alpha=[8])
    values["search"]["learning_rate"] = [1e-2]
    losses = {}
    for name, changes in {
        "full": {},
        "nf4": {"quant_bits": 4, "adapter_dtype": "bfloat16"},
    }.items():
        config = {**values, "memory_budget": "1GiB", "model": {**values["model"], **changes}}
        run_study(config, out=tmp_path / name, report=False)
        record = records(tmp_path / name)[0]
        assert record["quant_bits"] == changes.get("quant_bits")
        losses[name] = record["eval_loss"]
    assert math.isclose(losses["nf4"], losses["full"], rel_tol=0.02)


def test_a_loaded_model_is_planned_in_its_own_bits(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from rsauto.search.setup import Objects, set_up
    from rsauto.study_file import validate

    values = study_values(tmp_path)
    folder = Path(values["model"]["name"])
    objects = Objects(quantised(folder, 4), AutoTokenizer.from_pretrained(folder))
    values["memory_budget"] = "1GiB"
    setup = set_up(validate(values), objects)
    asked = dataclasses.replace(objects, model=AutoModelForCausalLM.from_pretrained(folder))
    full = set_up(validate(values), asked)
    spec = setup.space.middle(4)
    less = [s.smallest_prediction(spec).breakdown["weights"] for s in (setup, full)]
    assert less[0] < less[1]
    values["model"]["quant_bits"] = 4
    with pytest.raises(InputError, match="loaded already"):
        set_up(validate(values), objects)
