"""Packs over many kinds of base: architectures, classifiers, quantised weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_classification as classes
import test_quantised as quantised
import torch
import transformers as hf
from architectures import BERT, DECODERS, ENCODERS, SIZES
from packs import alone, assert_equal, packed, unmetered
from peft import PeftModel
from test_packed_adalora import placed
from test_training import bench_of, spec_of
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PretrainedConfig, PreTrainedModel

from rsauto.adapters.head import head_module_names
from rsauto.base import prepare
from rsauto.packing.buckets import OVERHEAD_FLOPS
from rsauto.packing.rows import NotPackableError, require_rows
from rsauto.records import TrialSpec
from rsauto.training.packed import Pack
from rsauto.training.trial import Bench

pytestmark = pytest.mark.usefixtures("unmetered")
__all__ = ["unmetered"]

MOE: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "num_experts_per_tok": 2}
BASES = {
    **{name: DECODERS[name].config for name in ("gpt2", "gptj", "gpt_neox", "opt", "falcon",
                                                "qwen2", "qwen3", "gemma3", "phi3")},
    "mixtral": lambda: hf.MixtralConfig(**MOE, num_local_experts=4),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(
        **MOE, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
    "bloom": lambda: hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
}  # fmt: skip


def check(bench: Bench, specs: list[TrialSpec], tolerance: float = 1e-5, **settings: Any) -> None:
    for run, spec in zip(packed(bench, specs, **settings), specs, strict=True):
        expected = alone(bench, spec)
        assert expected.losses[0] != expected.losses[-1]
        assert_equal(run, expected, tolerance)


def trials(**changes: Any) -> list[TrialSpec]:
    settings = {"steps": 4, "num_evals": 1, "learning_rate": 1e-3, "batch_size": 8, **changes}
    return [spec_of(**settings, rank=rank, seed=seed) for rank, seed in ((2, 0), (8, 1))]


@pytest.mark.parametrize("name", BASES)
def test_trials_of_many_architectures_are_as_alone(name: str) -> None:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(BASES[name]())
    check(bench_of(prepare(model, False).eval()), trials())


# ------------------------------------------------------------ classifiers


def head_of(model: PreTrainedModel) -> tuple[str, ...]:
    heads = tuple(head_module_names(model))
    return tuple(name for name, _ in model.named_parameters() if name.startswith(heads))


def classifiers(**changes: Any) -> list[TrialSpec]:
    settings = {"steps": 5, "learning_rate": 1e-3, "max_grad_norm": 0.5, **changes}
    return [
        classes.spec_of(**settings, rank=rank, seed=seed) for rank, seed in ((2, 0), (8, 1), (3, 2))
    ]


@pytest.mark.parametrize(
    ("name", "half"), [*((name, False) for name in classes.MODELS), ("bert", True), ("llama", True)]
)
@pytest.mark.sample(3)
def test_every_trial_trains_a_head_of_its_own(name: str, half: bool) -> None:
    model = classes.model_of(name)
    model = model.bfloat16() if half else model
    bench = classes.bench_of(model, head_of(model))  # drawn anew by every trial
    # A head sees float32 sums of what the base has rounded to bfloat16.
    check(bench, classifiers(), 5e-3 if half else 1e-5, rows=4)


def encoder(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    config.num_labels = 3
    config.pad_token_id = 0
    model: PreTrainedModel = hf.AutoModelForSequenceClassification.from_config(config)
    return prepare(model, gradient_checkpointing=False).eval()


@pytest.mark.parametrize("name", ["electra", "modernbert", "albert"])
def test_encoders_and_layers_that_are_used_twice(name: str) -> None:
    albert = hf.AlbertConfig(**{**BERT, "embedding_size": 16})
    model = encoder(albert if name == "albert" else ENCODERS[name].config())
    check(classes.bench_of(model), classifiers(num_evals=2), rows=4)


def test_heads_beside_placed_ranks_and_in_several_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OVERHEAD_FLOPS, "cpu", 0.0)
    model = classes.model_of("bert")
    shared: dict[str, Any] = {"head_learning_rate": 1e-2, "batch_size": 8, "micro_batch_size": 4}
    placed_one = placed(2, 4, max_grad_norm=0.5, steps=8, **shared)
    check(classes.bench_of(model, head_of(model)), [*classifiers(), placed_one], rows=4)


def test_a_trained_head_is_saved_with_its_adapter(tmp_path: Path) -> None:
    model = classes.model_of("roberta")
    bench, specs = classes.bench_of(model, head_of(model)), classifiers(learning_rate=1e-2)
    runs = packed(bench, specs, rows=4, save=lambda number: tmp_path / str(number))
    for number, (run, spec) in enumerate(zip(runs, specs, strict=True)):
        alone(bench, spec, tmp_path / "alone")
        found = []
        for folder in (tmp_path / str(number), tmp_path / "alone"):
            reloaded = PeftModel.from_pretrained(classes.model_of("roberta"), str(folder)).eval()
            again = classes.evaluate(
                reloaded, classes.DATA.validation, batch_size=5, pad_token_id=0, device=bench.device
            )
            found.append(again.eval_loss)
        last = run.points[-1].evaluation
        assert last is not None
        assert found == pytest.approx([last.eval_loss] * 2, abs=1e-5)


# ------------------------------------------------------------ quantised bases


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", quantised.BITS)
@pytest.mark.parametrize("config", [quantised.LLAMA, quantised.GPT2], ids=["llama", "gpt2"])
@pytest.mark.sample(3)
def test_a_quantised_base_is_shared(
    tmp_path: Path, config: PretrainedConfig, bits: Any, dtype: torch.dtype
) -> None:
    model = quantised.quantised(quantised.write(tmp_path, config), bits, dtype)
    # bitsandbytes rounds inputs and outputs itself: in bfloat16 a last bit is 1/256.
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    check(bench_of(prepare(model, False)), trials(quant_bits=bits), tolerance)


# ------------------------------------------------------------ what cannot be shared


def test_layers_without_the_rows_of_a_batch_are_refused() -> None:
    model = encoder(ENCODERS["deberta_v2"].config())
    before = dict(model.named_modules())
    with Pack(classes.bench_of(model), optimizer="adamw", rows=4) as pack:
        with pytest.raises(NotPackableError, match=r"attention.*not one row of the batch after"):
            pack.admit(classifiers()[0])
        assert pack.members == []
    assert dict(model.named_modules()) == before
    assert not any(m._forward_pre_hooks for m in model.modules())


class Odd(nn.Module):
    """A layer that is given its rows in some other way, in a shape that does not tell."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:  # x (rows, tokens, 4)
        flat = x.flatten(0, 1)
        if self.kind == "tokens first":
            return self.layer(x.transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]
        if self.kind == "sorted":  # as an expert's tokens are
            order = flat[:, 0].argsort()
            return self.layer(flat[order])[order.argsort()].view(x.shape)  # type: ignore[no-any-return]
        if self.kind == "mixed":
            return self.layer(x - x.mean(dim=0))  # type: ignore[no-any-return]
        return self.layer(flat).view(x.shape)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["tokens first", "sorted", "mixed", "flat"])
def test_rows_are_told_by_what_is_in_them(kind: str) -> None:
    torch.manual_seed(0)
    model, rows = Odd(kind).train(), {"x": 1.0 - torch.arange(16.0).view(2, 2, 4)}
    if kind == "flat":
        require_rows(model, {"layer"}, rows)
    else:
        with pytest.raises(NotPackableError, match="layer"):
            require_rows(model, {"layer"}, rows)
    assert model.training and not model.layer._forward_pre_hooks


def test_a_layer_in_a_pack_still_has_a_weight(llama: LlamaForCausalLM) -> None:
    before = llama.model.layers[0].mlp.down_proj.weight
    with Pack(bench_of(llama), optimizer="adamw", rows=8) as pack:
        pack.admit(trials(batch_size=8)[0])
        pack.advance()
        assert llama.model.layers[0].mlp.down_proj.weight is before
