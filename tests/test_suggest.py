"""The first study of a model and a dataset: what columns are for, and what follows from figures."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rsauto.choices import parse_bytes
from rsauto.data.files import table_of
from rsauto.embedded import MODEL_DIR
from rsauto.errors import InputError
from rsauto.study_file import validate
from rsauto.suggest import Seen, Setting, Suggestion, Wishes, look, study_text, suggest
from rsauto.suggest.columns import guessed_reading, known_reading, labelled_reading, look_at
from rsauto.suggest.decide import learning_rates


def columns_of(rows: Sequence[Mapping[str, Any]]) -> Any:
    return look_at(table_of(rows, "rows"))


def rows_of(**columns: Any) -> list[dict[str, Any]]:
    """Twenty rows; a list is repeated, anything else is the same in every row."""
    return [
        {k: v[n % len(v)] if isinstance(v, tuple) else v for k, v in columns.items()}
        for n in range(20)
    ]


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (rows_of(messages=CHAT, prompt="p"), {"messages": "messages"}),
        (rows_of(talk=CHAT), {"messages": "talk"}),
        (rows_of(conversations=[{"from": "human", "value": "Hi"}]), {"messages": "conversations"}),
        (
            rows_of(prompt=CHAT[:1], completion=CHAT[1:]),
            {"prompt": "{prompt}", "completion": "{completion}"},
        ),
        (
            rows_of(id="1", prompt="p", completion="c", text="t"),
            {"prompt": "{prompt}", "completion": "{completion}"},
        ),
        (
            rows_of(answer=4, question="2 + 2?"),
            {"prompt": "{question}\n", "completion": "{answer}"},
        ),
    ],
)
def test_known_columns(rows: list[dict[str, Any]], settings: dict[str, str]) -> None:
    reading = known_reading(columns_of(rows))
    assert reading is not None and not reading.is_guess
    assert reading.settings == settings


def test_columns_that_only_look_known_are_not() -> None:
    assert known_reading(columns_of(rows_of(messages="plain text", prompt="p"))) is None
    assert known_reading(columns_of(rows_of(prompt=[{"a": 1}], completion="c"))) is None


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (rows_of(text=("good", "bad"), label=(0, 1)), {"label": "label", "text": "{text}"}),
        (
            rows_of(idx=(1, 2, 3, 4), review=("so so", "fine"), target=("pos", "neg", "neutral")),
            {"label": "target", "text": "{review}"},
        ),
        (
            rows_of(premise="It rains.", hypothesis="It is wet.", label=(0, 1, 2)),
            {"label": "label", "text": "{premise}", "text_pair": "{hypothesis}"},
        ),
    ],
)
def test_labelled_columns(rows: list[dict[str, Any]], settings: dict[str, str]) -> None:
    reading = labelled_reading(columns_of(rows))
    assert reading is not None and not reading.is_guess
    assert reading.settings == settings


@pytest.mark.parametrize(
    "rows",
    [
        rows_of(text="a text", kind=(0, 1)),
        rows_of(text="a text", label=1),
        rows_of(text="a text", label=(0.1, 0.9)),
        rows_of(text="a text", label=tuple(f"sentence {n}" for n in range(20))),
        rows_of(score=(1.0, 2.0), label=(0, 1)),
    ],
    ids=["no such column", "one value", "fractions", "all different", "no text"],
)
def test_what_is_no_class_is_not_taken_for_one(rows: list[dict[str, Any]]) -> None:
    assert labelled_reading(columns_of(rows)) is None


def test_a_label_that_is_named_is_taken_whatever_it_is_called() -> None:
    rows = rows_of(text="a text", kind=(0, 1), genre=("x", "y"))
    reading = labelled_reading(columns_of(rows), "kind")
    assert reading is not None and reading.settings == {"label": "kind", "text": "{text}"}
    with pytest.raises(InputError, match=r"--label: 'knd' is no column. Did you mean 'kind'\?"):
        labelled_reading(columns_of(rows), "knd")
    with pytest.raises(InputError, match="no column has text to classify"):
        labelled_reading(columns_of(rows_of(n=1, kind=(0, 1))), "kind")


@pytest.mark.parametrize(
    ("rows", "settings", "is_guess"),
    [
        (
            rows_of(instruction="Add.", input="1 2", output="3"),
            {"prompt": "{instruction}\n{input}\n", "completion": "{output}"},
            False,
        ),
        (
            rows_of(summary="short", document="long"),
            {"prompt": "{document}\n", "completion": "{summary}"},
            False,
        ),
        (
            rows_of(instruction="Sum up.", context="", response="Nothing.", category=("a", "b")),
            {"prompt": "{instruction}\n{context}\n", "completion": "{response}"},
            False,
        ),
        (
            rows_of(instruction="Add.", input=("1 2", None), output="3"),
            {"prompt": "{instruction}\n", "completion": "{output}"},
            False,
        ),
        (
            rows_of(title="t", text="a long text", summary="short"),
            {"prompt": "{text}\n", "completion": "{summary}"},
            True,
        ),
        (rows_of(text="a text", url="somewhere on the web"), {"text": "{text}"}, False),
        (rows_of(poem="a poem", n=1), {"text": "{poem}"}, True),
        (
            rows_of(id="a very long identifier", de="Wie geht es?", note="x", en="How are you?"),
            {"prompt": "{de}\n", "completion": "{en}"},
            True,
        ),
    ],
)
def test_other_columns_are_guessed(
    rows: list[dict[str, Any]], settings: dict[str, str], is_guess: bool
) -> None:
    reading = guessed_reading(columns_of(rows), "rows")
    assert reading.settings == settings
    assert reading.is_guess == is_guess


def test_no_text_at_all_is_refused_with_the_columns() -> None:
    with pytest.raises(InputError, match=r"rows: no column has text .* 'a', 'b'"):
        guessed_reading(columns_of(rows_of(a=1, b=[2])), "rows")


@pytest.fixture(scope="module")
def embedded() -> Seen:
    return look(Wishes())


def value(seen: Seen, key: str) -> Any:
    (setting,) = [s for s in suggest(seen).settings if s.key == key and s.is_active]
    return setting.value


def comment(seen: Seen, key: str) -> str:
    (setting,) = [s for s in suggest(seen).settings if s.key == key]
    return setting.comment


def test_the_embedded_model_and_task_are_seen_as_they_are(embedded: Seen) -> None:
    weights = load_file(MODEL_DIR / "model.safetensors")
    assert embedded.num_params == sum(tensor.numel() for tensor in weights.values())
    assert embedded.width == 128
    assert embedded.splits == {"validation_split": "validation"}
    assert min(embedded.lengths) == 13
    assert max(embedded.lengths) == 23
    assert value(embedded, "data.max_length") == 32


@pytest.mark.parametrize(
    ("lengths", "max_length", "num_cut"),
    [
        ((20,) * 99 + (500,), 32, 1),
        ((20,) * 98 + (250, 500), 256, 1),
        ((300,) * 100, 320, 0),
        ((257,) * 100, 320, 0),
        ((32,) * 100, 32, 0),
        ((5000,) * 100, 512, 100),
    ],
)
def test_max_length_covers_99_percent(
    embedded: Seen, lengths: tuple[int, ...], max_length: int, num_cut: int
) -> None:
    seen = dataclasses.replace(embedded, lengths=lengths, positions=512)
    assert value(seen, "data.max_length") == max_length
    assert f"; {num_cut} would be cut" in comment(seen, "data.max_length")


@pytest.mark.parametrize(
    ("num_rows", "steps", "batch_size", "epochs"),
    [
        (20, 60, 4, "12 epochs"),
        (800, 150, 16, "3 epochs"),
        (2400, 300, 16, "2 epochs"),
        (4800, 300, 16, "1 epoch"),
        (48000, 300, 16, "0.1 epochs"),
    ],
)
def test_trials_are_one_to_three_epochs_within_bounds(
    embedded: Seen, num_rows: int, steps: int, batch_size: int, epochs: str
) -> None:
    seen = dataclasses.replace(embedded, num_train_rows=num_rows, lengths=(10,) * 100)
    assert value(seen, "training.steps") == steps
    assert value(seen, "training.batch_size") == batch_size
    told = comment(seen, "training.steps")
    assert f"{epochs} of {num_rows} rows, about {steps * batch_size * 10 / 1000:.3g}" in told or (
        f"about {steps * batch_size * 10} tokens" in told
    )


def test_very_many_rows_are_not_all_read(embedded: Seen) -> None:
    seen = dataclasses.replace(embedded, num_train_rows=10**6)
    assert value(seen, "data.max_train_rows") == 50_000
    assert "of 50000 rows" in comment(seen, "training.steps")


def test_ranks_end_at_half_of_the_width(embedded: Seen) -> None:
    assert value(embedded, "search.rank") == {"low": 2, "high": 64}
    assert value(embedded, "search.trials") == 26
    embedded.source.config.hidden_size, before = 4096, embedded.source.config.hidden_size
    try:
        assert value(embedded, "search.rank") == {"low": 4, "high": 256}
        assert value(embedded, "search.trials") == 28
    finally:
        embedded.source.config.hidden_size = before


def test_learning_rates_fall_with_the_width() -> None:
    assert learning_rates(4096) == {"low": 1e-5, "high": 1e-3}
    assert learning_rates(1024) == {"low": 4e-5, "high": 4e-3}
    assert learning_rates(128) == learning_rates(32) == {"low": 3e-4, "high": 3e-2}


@pytest.mark.parametrize(
    ("saved", "device", "num_params", "dtype"),
    [
        (torch.float32, "cpu", 10**9, "float32"),
        (torch.bfloat16, "cpu", 10**9, "bfloat16"),
        (torch.float16, "cpu", 10**9, "float32"),
        (torch.float32, "cuda", 10**9, "bfloat16"),
        (torch.float32, "cuda", 10**6, "float32"),
        (torch.float16, "cuda", 10**9, "bfloat16"),
    ],
)
def test_dtype(
    embedded: Seen, saved: torch.dtype, device: str, num_params: int, dtype: str
) -> None:
    source = dataclasses.replace(embedded.source, dtype=saved)
    seen = dataclasses.replace(
        embedded, source=source, device=torch.device(device), num_params=num_params
    )
    assert value(seen, "model.dtype") == dtype


@pytest.mark.parametrize(
    ("budget", "bits"), [("9GiB", None), ("7GiB", 8), ("3GiB", 8), ("1GiB", 4)]
)
def test_heavy_weights_are_offered_fewer_bits(
    embedded: Seen, budget: str, bits: int | None
) -> None:
    seen = dataclasses.replace(embedded, num_params=2**30, budget_bytes=parse_bytes(budget))
    offered = {s.key: s for s in suggest(seen).settings if s.key.startswith("model.")}
    assert ("model.gradient_checkpointing" in offered) == (bits is not None)
    if bits is not None:
        assert offered["model.quant_bits"].value == bits
        assert not offered["model.quant_bits"].is_active
        assert "4.00 GiB" in offered["model.quant_bits"].comment


@pytest.mark.parametrize(
    ("class_sizes", "objective"),
    [((), "eval_loss"), ((50, 50), "accuracy"), ((70, 30), "accuracy"), ((71, 29), "matthews")],
)
def test_objective(embedded: Seen, class_sizes: tuple[int, ...], objective: str) -> None:
    seen = dataclasses.replace(embedded, class_sizes=class_sizes)
    assert value(seen, "search.objective") == objective
    keys = {setting.key for setting in suggest(seen).settings}
    assert "packing.trials" in keys
    assert ("training.head_learning_rate" in keys) == bool(class_sizes)
    assert ("data.forgetting" in keys) == (not class_sizes)


def test_every_line_has_a_comment_and_the_file_says_what_was_decided(embedded: Seen) -> None:
    suggestion = suggest(embedded)
    text = study_text(suggestion, Path("a.yaml"))
    assert yaml.safe_load(text) == suggestion.values()
    validate(yaml.safe_load(text))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    for before, line in itertools.pairwise(lines):
        if line.strip() and not line.strip().startswith("#") and not line.endswith(":"):
            assert before.strip().startswith("# "), line


def test_a_setting_that_is_off_is_valid_once_it_is_on(embedded: Seen) -> None:
    text = study_text(suggest(dataclasses.replace(embedded, budget_bytes=1000)), Path("a.yaml"))
    off = ("# forgetting: english", "# quant_bits: 4", "# gradient_checkpointing: true")
    for line in off:
        assert f"\n  {line}\n" in text
        text = text.replace(line, line.removeprefix("# "))
    config = validate(yaml.safe_load(text))
    assert config.data.forgetting == "english"
    assert config.model.gradient_checkpointing


def test_packs_are_offered_more_memory_only_where_a_trial_is_given_less(embedded: Seen) -> None:
    def packs(memory_budget: str) -> dict[str, bool]:
        wishes = dataclasses.replace(embedded.wishes, memory_budget=memory_budget)
        settings = suggest(dataclasses.replace(embedded, wishes=wishes)).settings
        return {s.key: s.is_active for s in settings if s.key.startswith("pack")}

    assert packs("auto") == {"packing.trials": True}
    assert packs("2GiB") == {"pack_memory_budget": False, "packing.trials": True}
    assert (
        validate(
            {**suggest(embedded).values(), "memory_budget": "2GiB", "pack_memory_budget": "auto"}
        ).packing.trials
        == 8
    )


@pytest.mark.parametrize(
    "name",
    ["yes", "null", "12", "1e3", "a: b", "# no", "{x}\n", 'say "hi"', "it's", "é", "中\n",
     "a\u2028b", "a\x85b", "a\x1b[31m", "x\nmodel: {name: other}", " ", "a" * 300],
)  # fmt: skip
def test_no_name_breaks_the_file(name: str) -> None:
    suggestion = Suggestion(
        seen=(("data", f"{name}: 12 rows"),),
        settings=(
            Setting("data.name", name, f"It is {name}."),
            Setting("data.text", name, f"Also {name}.", is_active=False),
            Setting("search.rank", {"low": 2, "high": 4}, "Ranks."),
            Setting("search.learning_rate", {"low": 1e-5, "high": 1e-3}, "Rates."),
        ),
    )
    text = study_text(suggestion, Path("a.yaml"))
    assert yaml.safe_load(text) == suggestion.values()
    assert "\x1b" not in text
