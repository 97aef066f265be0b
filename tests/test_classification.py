"""Sequence classifiers: their heads, losses and metrics, against stock PEFT and closed forms."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from examples import data_of
from peft import LoraConfig, PeftModel, get_peft_model
from planning import planner_of
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

from rsauto.adapters.head import head_module_names, initialise_head
from rsauto.adapters.lora import add_adapter, remove_adapter, target_module_names
from rsauto.adapters.optimizers import parameter_groups
from rsauto.base import load_weights, open_base, prepare, with_labels
from rsauto.config import ModelConfig
from rsauto.data import Example, collate
from rsauto.embedded import MODEL_DIR
from rsauto.errors import InputError
from rsauto.records import StepPoint, TrialSpec
from rsauto.training.evaluate import ClassTally, evaluate
from rsauto.training.trial import Bench, Trial, untouched

CPU = torch.device("cpu")
VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 40, "num_labels": 3, "pad_token_id": 0,
}  # fmt: skip


def bert() -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(**SIZES))


def roberta() -> PreTrainedModel:
    return RobertaForSequenceClassification(RobertaConfig(**SIZES))


def llama() -> PreTrainedModel:
    return LlamaForSequenceClassification(LlamaConfig(**SIZES))


def distilbert() -> PreTrainedModel:
    return DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=48,
            max_position_embeddings=40,
            num_labels=3,
        )
    )


def gpt2() -> PreTrainedModel:
    return GPT2ForSequenceClassification(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=40,
            num_labels=3,
            pad_token_id=0,
        )
    )


MODELS = {
    "bert": (bert, ["bert.pooler", "classifier"]),
    "roberta": (roberta, ["classifier"]),
    "distilbert": (distilbert, ["pre_classifier", "classifier"]),
    "llama": (llama, ["score"]),
    "gpt2": (gpt2, ["score"]),
}


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return prepare(MODELS[name][0](), gradient_checkpointing=False).eval()


def rows(count: int, seed: int) -> tuple[Example, ...]:
    """The class is told by the most frequent of three tokens."""
    generator = random.Random(seed)
    found = []
    for _ in range(count):
        label = generator.randrange(3)
        length = generator.randrange(4, 12)
        ids = [5 + label if generator.random() < 0.6 else generator.randrange(8, 60)
               for _ in range(length)]  # fmt: skip
        found.append(Example((3, *ids, 4), label=label))
    return tuple(found)


DATA = data_of(rows(64, seed=1), rows(30, seed=2))


def spec_of(**changes: Any) -> TrialSpec:
    settings = {
        "rank": 4, "alpha": 8, "learning_rate": 5e-3, "head_learning_rate": 1e-2, "batch_size": 8,
        "micro_batch_size": 4, "max_length": 16, "steps": 5, "num_evals": 1, **changes,
    }  # fmt: skip
    return TrialSpec(role="search", method="rslora", scaling_rule="rslora", **settings)


def bench_of(model: PreTrainedModel, fresh: tuple[str, ...] = ()) -> Bench:
    return Bench(model=model, base_name="tiny", data=DATA, device=CPU, fresh_parameters=fresh)


def run(model: PreTrainedModel, spec: TrialSpec, fresh: tuple[str, ...] = ()) -> list[StepPoint]:
    with Trial(bench_of(model, fresh), spec) as trial:
        return list(trial.steps())


@pytest.mark.parametrize("name", MODELS)
def test_the_head_is_what_stands_behind_the_backbone_and_its_pooler(name: str) -> None:
    model = model_of(name)
    assert head_module_names(model) == MODELS[name][1]
    targets = target_module_names(model, "all-linear")
    assert targets and not any(target.startswith(tuple(MODELS[name][1])) for target in targets)


def test_a_language_model_has_no_such_head() -> None:
    assert head_module_names(LlamaForCausalLM(LlamaConfig(**SIZES))) == []


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.sample(2)
def test_a_trial_learns_leaves_no_trace_and_reloads_in_stock_peft(
    name: str, tmp_path: Path
) -> None:
    model = model_of(name)
    before = copy.deepcopy(model.state_dict())
    untouched = evaluate(model, DATA.validation, batch_size=8, pad_token_id=0, device=CPU)
    with Trial(bench_of(model), spec_of(steps=40, batch_size=16, micro_batch_size=16)) as trial:
        last = list(trial.steps())[-1].evaluation
        assert last is not None and last.eval_loss < untouched.eval_loss - 0.05
        assert set(last.metrics) == {"accuracy", "f1", "matthews"}
        trial.save(tmp_path / "adapter", "card")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)

    base = model_of(name)
    reloaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert reloaded.peft_config["default"].task_type == "SEQ_CLS"
    again = evaluate(reloaded, DATA.validation, batch_size=5, pad_token_id=0, device=CPU)
    assert again.eval_loss == pytest.approx(last.eval_loss, abs=1e-5)
    assert again.metrics == pytest.approx(last.metrics)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_trial_equals_stock_peft_step_by_step(name: str) -> None:
    model, by_hand = model_of(name), model_of(name)
    spec = spec_of(micro_batch_size=8, max_grad_norm=None, schedule="constant")
    ours = [point.train_loss for point in run(model, spec)]

    torch.manual_seed(spec.seed)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=target_module_names(by_hand, "all-linear"),
        modules_to_save=["pooler"] if name == "bert" else None,
        task_type="SEQ_CLS",
    )
    stock = get_peft_model(by_hand, config)
    trained = [(n, p) for n, p in stock.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in trained if "lora_" in n], "lr": 5e-3},
            {"params": [p for n, p in trained if "lora_" not in n], "lr": 1e-2},
        ],
        weight_decay=0.0,
    )
    theirs = []
    from rsauto.data import batch_plan

    for indices in batch_plan(len(DATA.train), 8, 5, spec.seed):
        batch = collate([DATA.train[i] for i in indices], 0)
        loss = stock(**batch.inputs(), labels=batch.labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(float(loss.detach()))
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert theirs[-1] != pytest.approx(theirs[0], abs=1e-2), "it must have learnt"


def test_the_loss_of_a_batch_does_not_depend_on_how_it_is_cut() -> None:
    whole, cut = (run(model_of("bert"), spec_of(micro_batch_size=m)) for m in (8, 2))
    assert [p.train_loss for p in whole] == pytest.approx([p.train_loss for p in cut], abs=1e-5)


def test_a_fresh_head_is_drawn_from_the_seed_and_a_trained_one_is_kept() -> None:
    model = model_of("bert")
    fresh = ("classifier.weight", "classifier.bias")
    pooler = model.bert.pooler.dense.weight.clone()  # type: ignore[union-attr,operator]

    def head_after(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        initialise_head(model, fresh)
        weight: torch.Tensor = model.get_parameter("classifier.weight").clone()
        return weight

    first, second, again = head_after(1), head_after(2), head_after(1)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert first.std() == pytest.approx(model.config.initializer_range, rel=0.3)
    assert torch.equal(model.bert.pooler.dense.weight, pooler)  # type: ignore[union-attr,operator]
    seeds = [run(model, spec_of(seed=s, steps=1), fresh)[0].train_loss for s in (1, 2, 1)]
    assert seeds[0] == seeds[2] != seeds[1]


def test_the_head_learns_at_its_own_rate() -> None:
    adapted = add_adapter(model_of("bert"), spec_of())
    groups = parameter_groups(
        adapted, learning_rate=1e-3, lr_ratio=4.0, weight_decay=0.0, head_learning_rate=7e-3
    )
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == {"A": 1e-3, "B": 4e-3, "head": 7e-3}
    sizes = {group["name"]: sum(p.numel() for p in group["params"]) for group in groups}
    assert sizes["head"] == 32 * 32 + 32 + 3 * 32 + 3
    remove_adapter(adapted)


def test_metrics_of_two_and_of_three_classes_by_hand() -> None:
    tally = ClassTally()
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    tally.add(logits[:3], torch.tensor([0, 1, 0]))
    tally.add(logits[3:], torch.tensor([1]))
    found = tally.evaluation()
    # predicted 0 1 1 0, true 0 1 0 1: one of each of tp, fp, fn, tn
    assert found.metrics == pytest.approx({"accuracy": 0.5, "f1": 0.5, "matthews": 0.0})
    expected = [math.log1p(math.exp(-2)), math.log1p(math.exp(-1)), math.log1p(math.exp(3)),
                math.log1p(math.exp(1))]  # fmt: skip
    assert found.eval_loss == pytest.approx(sum(expected) / 4)

    three = ClassTally()
    three.add(torch.eye(3)[torch.tensor([0, 0, 1, 2])], torch.tensor([0, 1, 1, 2]))
    # F1: class 0 2/3, class 1 2/3, class 2 1
    assert three.evaluation().metrics["f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("micro_batch_size", [1, 8])
@pytest.mark.sample(3)
def test_predicted_memory_is_what_a_trial_needs(name: str, micro_batch_size: int) -> None:
    model = model_of(name)
    # Every micro-batch has a longest row and, above one row, some padding.
    lengths = [18, 15] if micro_batch_size > 1 else [18]
    some = tuple(Example((3,) * lengths[i % len(lengths)], label=i % 3) for i in range(16))
    data = data_of(some, some)
    attention = model.config._attn_implementation
    planner = planner_of(model.config, 18, task="SEQ_CLS", attn_implementation=attention)
    spec = spec_of(micro_batch_size=micro_batch_size, max_length=18, steps=3, rank=8)
    predicted = planner.predict(
        8,
        target_modules="all-linear",
        optimizer="adamw",
        batch_size=8,
        micro_batch_size=micro_batch_size,
    )
    bench = Bench(model=model, base_name="tiny", data=data, device=CPU)
    with Trial(bench, spec) as trial:
        list(trial.steps())
        assert trial.num_trainable_params == predicted.num_trainable_params
        measured = trial.measured_peak_bytes
    assert measured == pytest.approx(predicted.peak_bytes, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_is_trained_in_float32_on_a_base_in_half_precision(dtype: torch.dtype) -> None:
    model = model_of("bert").to(dtype)
    with Trial(bench_of(model), spec_of(head_learning_rate=1e-5, steps=3)) as trial:
        list(trial.steps())
        assert trial._adapted is not None
        heads = {n: p for n, p in trial._adapted.named_parameters() if ".modules_to_save." in n}
        assert {p.dtype for p in heads.values()} == {torch.float32}
        trained = heads["base_model.model.classifier.modules_to_save.default.weight"].detach()
    moved = (trained - model.get_parameter("classifier.weight").float()).abs()
    # Adam moves every weight by about the learning rate a step: no half precision shows that.
    assert 0.5e-5 < float(moved.mean()) < 4e-5
    assert model.get_parameter("classifier.weight").dtype == dtype


def test_a_head_that_its_parent_initialises_is_drawn_as_transformers_draws_it() -> None:
    """ModernBERT gives its head other widths than its layers, in the module around them."""
    config = ModernBertConfig(
        **{**SIZES, "hidden_size": 256, "num_attention_heads": 4}, cls_token_id=3, sep_token_id=4
    )
    torch.manual_seed(0)
    model = ModernBertForSequenceClassification(config)
    heads = [n for n, _ in model.named_parameters() if n.startswith(("head", "classifier"))]
    others = {n: p.clone() for n, p in model.named_parameters() if n not in heads}
    drawn = {n: model.get_parameter(n).std().item() for n in heads if n.endswith("weight")}
    torch.manual_seed(1)
    initialise_head(model, heads)
    again = {n: model.get_parameter(n).std().item() for n in drawn}
    assert again == pytest.approx(drawn, rel=0.15, abs=1e-9)
    assert not math.isclose(drawn["classifier.weight"], config.initializer_range, rel_tol=0.15)
    assert all(torch.equal(model.get_parameter(n), p) for n, p in others.items())


def test_a_step_that_depends_on_the_data_is_estimated() -> None:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        num_labels=3,
        decoder_start_token_id=0,
    )
    planner = planner_of(config, 8, task="SEQ_CLS", attn_implementation="eager")
    found = planner.predict(4, batch_size=2, micro_batch_size=2)
    assert "DynamicOutputShape" in found.estimate_reason
    assert sum(found.breakdown.values()) == found.peak_bytes < found.reserved_bytes


def test_a_model_that_refuses_the_data_is_told_in_words() -> None:
    """T5 classifies by the end-of-text token, which these rows do not have."""
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, num_labels=3,
        decoder_start_token_id=0, eos_token_id=VOCABULARY - 1,
    )  # fmt: skip
    model = T5ForSequenceClassification(config)
    with pytest.raises(InputError, match=r"T5ForSequenceClassification cannot run .* <eos> token"):
        untouched(bench_of(model), 4)


def test_a_head_saved_from_a_bfloat16_base_reloads_but_for_rounding(tmp_path: Path) -> None:
    """Stock PEFT puts the saved float32 head back in the base's precision."""
    model = model_of("bert").to(torch.bfloat16)
    with Trial(bench_of(model), spec_of(steps=20)) as trial:
        last = list(trial.steps())[-1].evaluation
        trial.save(tmp_path / "adapter", "card")
    assert last is not None
    base = model_of("bert").to(torch.bfloat16)
    reloaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    again = evaluate(reloaded, DATA.validation, batch_size=8, pad_token_id=0, device=CPU)
    assert again.eval_loss == pytest.approx(last.eval_loss, abs=1e-2)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_classifier_on_a_quantised_base(tmp_path: Path, bits: Literal[4, 8]) -> None:
    pytest.importorskip("bitsandbytes")
    model_of("bert").save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(tmp_path / "base")
    config = ModelConfig(name=str(tmp_path / "base"), dtype="float32", quant_bits=bits)
    source = with_labels(open_base(config, "SEQ_CLS"), ("a", "b", "c"), pad_token_id=0)
    model = load_weights(source, config, CPU).model
    kinds = {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert kinds["bert.pooler.dense"] == kinds["classifier"] == "Linear"
    assert kinds["bert.encoder.layer.0.output.dense"] == {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    untouched = evaluate(model, DATA.validation, batch_size=8, pad_token_id=0, device=CPU)
    with Trial(bench_of(model), spec_of(steps=30, quant_bits=bits)) as trial:
        last = list(trial.steps())[-1].evaluation
        trial.save(tmp_path / "adapter", "card")
    assert last is not None and last.eval_loss < untouched.eval_loss - 0.05
    base = load_weights(source, config, CPU).model
    reloaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    again = evaluate(reloaded, DATA.validation, batch_size=4, pad_token_id=0, device=CPU)
    assert again.eval_loss == pytest.approx(last.eval_loss, abs=1e-4)
