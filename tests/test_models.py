"""The architectures that people fine-tune: what is adapted, learnt, saved, planned and refused.

Every model is random, with a configuration of `architectures`.
"""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BERT, DECODERS, ENCODERS, VOCABULARY
from examples import data_of
from peft import PeftModel
from planning import planner_of
from tiny_study import study_values
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    MPNetConfig,
    MPNetForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rsauto.adapters.lora import target_module_names
from rsauto.api import run_study
from rsauto.architecture import auto_class, num_positions
from rsauto.base import load_weights, open_base, prepare, with_labels
from rsauto.config import ModelConfig, TaskType
from rsauto.data import Example, TokenisedData, collate
from rsauto.errors import InputError
from rsauto.records import TrialSpec
from rsauto.search.setup import set_up
from rsauto.study_file import validate
from rsauto.training.evaluate import evaluate
from rsauto.training.trial import Bench, Trial

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")

CPU = torch.device("cpu")
LENGTH = 37
LM: TaskType = "CAUSAL_LM"
CLASSES: TaskType = "SEQ_CLS"
ARCHITECTURES = {**DECODERS, **ENCODERS}
CASES = [(name, LM) for name in DECODERS] + [(name, CLASSES) for name in ARCHITECTURES]


def config_of(name: str, task: TaskType) -> PretrainedConfig:
    config = ARCHITECTURES[name].config()
    if task == CLASSES:
        config.num_labels = 3
        config.pad_token_id = config.pad_token_id or 0
    return config


def raw_model(name: str, task: TaskType) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = auto_class(task).from_config(config_of(name, task))
    return model


def model_of(name: str, task: TaskType, gradient_checkpointing: bool = False) -> PreTrainedModel:
    return prepare(raw_model(name, task), gradient_checkpointing).eval()


def rows(task: TaskType, count: int, seed: int) -> tuple[Example, ...]:
    """Texts that count upwards; the class is told by the token that is there most often."""
    generator = random.Random(seed)
    found = []
    for _ in range(count):
        label, first = generator.randrange(3), generator.randrange(8, 40)
        length = generator.randrange(4, 12)
        counting = [first + k for k in range(length)]
        labelled = [5 + label if generator.random() < 0.6 else token for token in counting]
        found.append(
            Example((3, *labelled, 4), label=label) if task == CLASSES else Example((3, *counting))
        )
    return tuple(found)


def spec_of(**changes: Any) -> TrialSpec:
    settings = {
        "rank": 4, "alpha": 8, "learning_rate": 2e-2, "batch_size": 8, "micro_batch_size": 8,
        "max_length": LENGTH, "steps": 15, "num_evals": 1, **changes,
    }  # fmt: skip
    return TrialSpec(role="search", method="rslora", scaling_rule="rslora", **settings)


def bench_of(model: PreTrainedModel, data: TokenisedData) -> Bench:
    return Bench(model=model, base_name="tiny", data=data, device=CPU)


def loss_of(model: nn.Module, data: TokenisedData) -> float:
    return evaluate(model, data.validation, batch_size=5, pad_token_id=0, device=CPU).eval_loss


@pytest.mark.parametrize("name, task", CASES)
def test_linear_layers_are_found_by_kind(name: str, task: TaskType) -> None:
    with torch.device("meta"):
        model = raw_model(name, task)
    known = ARCHITECTURES[name]

    def in_blocks(names: str) -> list[str]:
        return [f"{known.block.format(i)}.{layer}" for i in (0, 1) for layer in names.split()]

    attention, others = in_blocks(known.attention), in_blocks(known.others)
    found = target_module_names(model, "all-linear")
    assert sorted(found) == sorted(attention + others + known.outside.split())
    assert sorted(target_module_names(model, "attention")) == sorted(attention)


@pytest.mark.parametrize("name, task", CASES)
def test_dropout_is_off_in_training(name: str, task: TaskType) -> None:
    """Also of a model that was built with it, whose modules have copied the rates."""
    tokens = torch.arange(3, 23).reshape(2, 10)
    model = raw_model(name, task).train()
    with torch.no_grad():
        assert not torch.equal(model(tokens).logits, model(tokens).logits), "dropout was never on"
        prepare(model, gradient_checkpointing=False).train()
        assert torch.equal(model(tokens).logits, model(tokens).logits)


LEARNING = [
    *((name, LM) for name in ("gpt2", "gptj", "falcon", "opt", "mistral", "gemma3", "phi3")),
    *((name, CLASSES) for name in ("qwen3", "electra", "modernbert", "deberta_v2")),
]


@pytest.mark.parametrize("name, task", LEARNING)
@pytest.mark.sample(4)
def test_a_trial_learns_leaves_no_trace_and_reloads_in_stock_peft(
    name: str, task: TaskType, tmp_path: Path
) -> None:
    model = model_of(name, task)
    before, tied = copy.deepcopy(model.state_dict()), storages(model)
    data = data_of(rows(task, 64, seed=1), rows(task, 12, seed=2))
    untouched = loss_of(model, data)
    with Trial(bench_of(model, data), spec_of()) as trial:
        last = list(trial.steps())[-1].evaluation
        trial.save(tmp_path / "adapter", "card")
    assert last is not None and last.eval_loss < untouched - 0.05
    after = model.state_dict()
    assert before.keys() == after.keys() and storages(model) == tied
    assert all(torch.equal(before[key], after[key]) for key in before)
    reloaded = PeftModel.from_pretrained(model_of(name, task), str(tmp_path / "adapter")).eval()
    assert loss_of(reloaded, data) == pytest.approx(last.eval_loss, abs=1e-5)


def storages(model: nn.Module) -> dict[str, int]:
    """Where every weight lies; tied weights lie in the same place."""
    return {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


def test_these_models_tie_their_embeddings() -> None:
    tied = {
        name
        for name in DECODERS
        if len(set(storages(model := model_of(name, LM)).values())) < len(model.state_dict())
    }
    assert tied == {"gpt2", "opt", "falcon", "gemma2", "gemma3"}


@pytest.mark.parametrize("micro_batch_size", [1, 4])
@pytest.mark.parametrize(
    "name, task",
    [
        *((name, LM) for name in ("opt", "gemma2", "gemma3", "phi3")),
        *((name, CLASSES) for name in ("modernbert", "deberta_v2")),
    ],
)
@pytest.mark.sample(4)
def test_predicted_memory_is_what_a_trial_needs(
    name: str, task: TaskType, micro_batch_size: int
) -> None:
    model = model_of(name, task)
    # Every micro-batch has a longest row and, above one row, some padding.
    lengths = [LENGTH, LENGTH - 9] if micro_batch_size > 1 else [LENGTH]
    some = tuple(
        Example((3,) * lengths[i % len(lengths)], label=i % 3 if task == CLASSES else None)
        for i in range(8)
    )
    attention = model.config._attn_implementation
    planner = planner_of(model.config, LENGTH, task=task, attn_implementation=attention)
    predicted = planner.predict(
        8,
        target_modules="all-linear",
        optimizer="adamw",
        batch_size=4,
        micro_batch_size=micro_batch_size,
    )
    spec = spec_of(rank=8, batch_size=4, micro_batch_size=micro_batch_size, steps=2)
    with Trial(bench_of(model, data_of(some, some)), spec) as trial:
        list(trial.steps())
        assert trial.num_trainable_params == predicted.num_trainable_params
        assert trial.measured_peak_bytes == pytest.approx(predicted.peak_bytes, rel=0.01)


@pytest.mark.parametrize(
    "name, task",
    [
        *((name, LM) for name in ("gptj", "gpt_neox", "opt", "gemma3")),
        *((name, CLASSES) for name in ("modernbert", "deberta_v2")),
    ],
)
@pytest.mark.sample(2)
def test_checkpointing_changes_no_loss(name: str, task: TaskType) -> None:
    data = data_of(rows(task, 16, seed=1), rows(task, 4, seed=2))
    losses = []
    for checkpointing in (False, True):
        with Trial(bench_of(model_of(name, task, checkpointing), data), spec_of(steps=3)) as trial:
            losses.append([point.train_loss for point in trial.steps()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0][0] != losses[0][-1], "nothing was learnt"


def test_checkpointing_is_refused_where_there_is_none() -> None:
    model = MPNetForSequenceClassification(MPNetConfig(**BERT))
    with pytest.raises(InputError, match=r"gradient_checkpointing: true, but MPNetFor.*Set it to"):
        prepare(model, gradient_checkpointing=True)


def tokenizer_of(pad_token: str | None) -> PreTrainedTokenizerFast:
    """One token a word: w0 to w59, behind four special tokens."""
    words = ["<unk>", "<s>", "</s>", "<pad>", *(f"w{i}" for i in range(VOCABULARY - 4))]
    ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token=pad_token,
    )


def saved(model: PreTrainedModel, folder: Path, pad_token: str | None = "<pad>") -> ModelConfig:
    model.save_pretrained(folder)
    tokenizer_of(pad_token).save_pretrained(folder)
    return ModelConfig(name=str(folder))


EAGER = {"gptj", "gemma2", "deberta_v2"}


@pytest.mark.parametrize(
    "name, task",
    [
        *((name, LM) for name in ("gpt2", "gptj", "falcon", "opt", "gemma2", "phi3")),
        *((name, CLASSES) for name in ("roberta", "modernbert", "deberta_v2")),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_gives_the_weights_and_an_attention_that_the_class_has(
    name: str, task: TaskType, dtype: Any, tmp_path: Path
) -> None:
    written = raw_model(name, task)
    config = saved(written, tmp_path / "model").model_copy(update={"dtype": dtype})
    source = open_base(config, task)
    loaded = load_weights(source, config, CPU)
    assert source.attn_implementation == ("eager" if name in EAGER else "sdpa")
    assert loaded.model.config._attn_implementation == source.attn_implementation
    assert loaded.model.dtype == source.dtype == getattr(torch, dtype)
    assert loaded.fresh_parameters == ()
    found = loaded.model.state_dict()
    for key, tensor in written.state_dict().items():
        torch.testing.assert_close(found[key], tensor.to(source.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("asked", ["sdpa", "flash_attention_2"])
def test_an_attention_that_the_class_lacks_is_refused(asked: str, tmp_path: Path) -> None:
    config = saved(raw_model("deberta_v2", CLASSES), tmp_path)
    with pytest.raises(InputError, match=f"attn_implementation: '{asked}', but Deb.* auto or eag"):
        open_base(config.model_copy(update={"attn_implementation": asked}), CLASSES)
    assert open_base(config.model_copy(update={"attn_implementation": "eager"}), CLASSES)


def test_an_encoder_is_no_causal_language_model(tmp_path: Path) -> None:
    """It would see the tokens that it is to predict; as a decoder it does not."""
    folder = tmp_path / "bert"
    config = saved(BertForMaskedLM(BertConfig(**BERT)), folder)
    with pytest.raises(InputError, match=r"bert model, which has no causal.*data\.label"):
        open_base(config)
    decoder = BertLMHeadModel(BertConfig(**BERT, is_decoder=True))
    assert open_base(saved(decoder, folder)).config.is_decoder


@pytest.mark.parametrize("name", ["gpt2", "gptj", "falcon", "opt", "mistral", "gemma3", "phi3"])
@pytest.mark.parametrize("pad_token_id", [None, 9])
def test_logits_of_a_row_do_not_depend_on_the_padding_beside_it(
    name: str, pad_token_id: int | None, tmp_path: Path
) -> None:
    """Also where the model's configuration names none, or another one than the data has."""
    written = raw_model(name, LM)
    written.config.pad_token_id = pad_token_id
    config = saved(written, tmp_path / "model", pad_token=None)
    end = 2
    source = with_labels(open_base(config, CLASSES), ("a", "b", "c"), pad_token_id=end)
    loaded = load_weights(source, config, CPU)
    assert loaded.fresh_parameters == ("score.weight",)
    short, long = Example((5, 6, 9, 7), label=0), Example(tuple(range(3, 15)), label=1)
    alone, beside = logits_of(loaded.model, short), logits_of(loaded.model, long, short)
    torch.testing.assert_close(alone[0], beside[1], rtol=0, atol=1e-6)
    # They are those of the last token: another one there changes them.
    other = logits_of(loaded.model, long, Example((5, 6, 9, 8), label=0))
    assert float((other[1] - beside[1]).abs().max()) > 1e-4


@torch.no_grad()
def logits_of(model: PreTrainedModel, *examples: Example) -> Tensor:
    found: Tensor = model.eval()(**collate(examples, pad_token_id=2).inputs()).logits
    return found


@pytest.mark.parametrize("name, pad_token", [("gpt2", None), ("bert", "<pad>")])
@pytest.mark.sample(1)
def test_a_study_of_a_classifier_and_its_best_adapter_in_stock_peft(
    name: str, pad_token: str | None, tmp_path: Path
) -> None:
    model = raw_model(name, LM) if name == "gpt2" else raw_model(name, CLASSES)
    folder = saved(model, tmp_path / "model", pad_token).name
    train, validation = (labelled_rows(count, seed) for count, seed in ((60, 1), (20, 2)))
    write_lines(tmp_path / "train.jsonl", train)
    write_lines(tmp_path / "validation.jsonl", validation)
    study = run_study(
        {
            "name": "labels",
            "memory_budget": "64MiB",
            "model": {"name": folder},
            "data": {
                "name": str(tmp_path / "train.jsonl"),
                "validation_file": str(tmp_path / "validation.jsonl"),
                "text": "text",
                "label": "label",
                "max_length": 16,
            },
            "training": {"steps": 16, "batch_size": 8, "num_evals": 1},
            "search": {
                "trials": 2, "seeds": 1, "rank": [4], "alpha": [8], "learning_rate": [1e-2],
            },
        },
        out=tmp_path / "out",
    )  # fmt: skip
    best = min(study.records, key=lambda record: record.eval_loss or 99.0)
    recorded = best.curve[-1].metrics["accuracy"]
    assert recorded > 0.7, "chance is one half"

    base = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, ignore_mismatched_sizes=True
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = base.config.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base.config.pad_token_id = tokenizer.pad_token_id
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "out" / "best")).eval()
    batch = tokenizer([row["text"] for row in validation], padding=True, return_tensors="pt")
    with torch.no_grad():
        predicted = adapted(**batch).logits.argmax(-1)
    hits = [
        ("even", "odd")[k] == row["label"] for k, row in zip(predicted, validation, strict=True)
    ]
    assert sum(hits) / len(hits) == pytest.approx(recorded)


def labelled_rows(count: int, seed: int) -> list[dict[str, str]]:
    """One word, repeated; words have two classes."""
    generator = random.Random(seed)
    words = [generator.randrange(6) for _ in range(count)]
    return [
        {"text": " ".join([f"w{k}"] * generator.randrange(2, 9)), "label": ("even", "odd")[k % 2]}
        for k in words
    ]


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_the_last_position_of_a_model_that_counts_from_its_padding() -> None:
    roberta = ARCHITECTURES["roberta"].config()
    longest = num_positions(roberta)
    assert longest == roberta.max_position_embeddings - roberta.pad_token_id - 1
    model = AutoModelForSequenceClassification.from_config(roberta)
    ids = torch.full((1, longest + 1), 5)
    model(input_ids=ids[:, :longest], attention_mask=torch.ones_like(ids[:, :longest]))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    values = study_values(tmp_path)
    folder = Path(values["model"]["name"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 90}))
    with pytest.raises(InputError, match=r"the tokenizer gives token \d+, but .* vocabulary of 90"):
        set_up(validate(values))


def test_a_trace_may_hold_something_as_large_as_the_logits() -> None:
    """18 rows of 64 logits are as large as an MLP's 48 columns at rank 24, not at rank 8."""
    config = ARCHITECTURES["llama"].config()
    assert (config.vocab_size, config.intermediate_size) == (64, 48)
    planner = planner_of(config, 18)
    settings: dict[str, Any] = {"target_modules": "all-linear", "optimizer": "adamw"}
    found = planner.predict(16, batch_size=8, micro_batch_size=1, **settings)
    assert sum(found.breakdown.values()) == found.peak_bytes
