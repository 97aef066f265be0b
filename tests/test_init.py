"""`rsauto init` as a user meets it: what it writes runs, and what it refuses it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_study import records, write_data, write_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from rsauto import study_file
from rsauto.cli import app
from rsauto.suggest import Wishes, look, suggest


def init(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["init", *map(str, arguments)])


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def assert_refused(result: Result, out: Path, *parts: str, code: int = 2) -> None:
    assert result.exit_code == code, result.output
    for part in parts:
        assert part in result.stderr, result.stderr
    assert "Traceback" not in result.output
    assert out.exists() == (code == 3)


def run_study(path: Path, out: Path) -> list[dict[str, Any]]:
    """The records of the file's study, shortened."""
    short = ["--trials", "3", "--set", "training.steps=4", "--set", "training.num_evals=2"]
    done = CliRunner().invoke(app, ["study", str(path), "--out", str(out), *short])
    assert done.exit_code == 0, done.output
    return records(out)


def test_the_written_file_says_what_was_decided_and_runs(tmp_path: Path, model: Path) -> None:
    data = write_data(tmp_path / "data")
    out = tmp_path / "mine.yaml"
    result = init("--model", model, "--data", data, "--out", out, "--memory-budget", "2MiB")
    assert result.exit_code == 0, result.output
    wishes = Wishes(model=str(model), data=str(data), memory_budget="2MiB")
    decided = study_file.validate({**suggest(look(wishes)).values(), "name": "mine"})
    config = study_file.load(out)
    assert config == decided
    assert config.data.prompt == "{prompt}"
    assert config.data.completion == "{completion}"
    assert config.data.validation_split == "validation"
    assert config.data.validation_rows == 12
    assert config.search.ranks == (2, 4, 8, 16)
    assert f"rsauto study {out}" in result.stdout
    assert "rank 16 is the largest" in result.stdout
    done = run_study(out, tmp_path / "run")
    assert [record["outcome"] for record in done] == ["complete"] * 3


def test_without_anything_named_it_is_about_the_embedded_model_and_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = init()
    assert result.exit_code == 0, result.output
    config = study_file.load(Path("study.yaml"))
    assert config.model.name == config.data.name == "embedded"
    assert config.memory_budget == "auto"


def test_a_file_that_is_there_is_left_alone_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "study.yaml"
    out.write_text("# precious\n")
    result = init("--out", out)
    assert result.exit_code == 2
    assert "exists and is left alone" in result.stderr
    assert out.read_text() == "# precious\n"
    assert init("--out", out, "--force").exit_code == 0
    assert "precious" not in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model", "./nowhere"], ["model.name", "./nowhere", "no folder"]),
        (["--data", "./nowhere.jsonl"], ["data.name", "nowhere.jsonl"]),
        (["--memory-budget", "lots"], ["memory_budget", "'lots'", "24GiB"]),
        (["--label", "mood"], ["--label", "'mood'", "'prompt', 'completion'"]),
        (["--subset", "main"], ["data.subset", "'main'", "not on the hub"]),
    ],
)
def test_wrong_input_is_named_and_nothing_is_written(
    tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    out = tmp_path / "study.yaml"
    assert_refused(init("--out", out, *arguments), out, *parts)


def test_places_that_cannot_be_written_to_are_refused_first(tmp_path: Path) -> None:
    missing = tmp_path / "no" / "study.yaml"
    assert_refused(init("--out", missing, "--model", "./nowhere"), missing, "--out", "no folder")
    result = init("--out", tmp_path, "--force")
    assert result.exit_code == 2
    assert "is a folder" in result.stderr


def test_a_budget_too_small_is_told_and_the_file_is_there_to_be_edited(
    tmp_path: Path, model: Path
) -> None:
    out = tmp_path / "study.yaml"
    data = write_data(tmp_path / "data")
    result = init("--model", model, "--data", data, "--out", out, "--memory-budget", "100KiB")
    assert_refused(result, out, "100.0 KiB", "rank 2, needs", "written all the same", code=3)
    assert study_file.load(out).memory_budget == 100 * 2**10
    assert "# gradient_checkpointing: true" in out.read_text()


def test_a_guess_is_marked_in_the_file_and_in_the_terminal(tmp_path: Path, model: Path) -> None:
    rows = [{"n": str(n), "de": f"Zahl {n} bitte", "en": f"number {n}, please"} for n in range(40)]
    data = write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "dev.jsonl", rows[30:])
    write_rows(data, rows[:30])
    out = tmp_path / "study.yaml"
    result = init("--model", model, "--data", data, "--out", out)
    assert result.exit_code == 0, result.output
    assert "a guess, please check" in result.stdout
    text = out.read_text(encoding="utf-8")
    assert "A GUESS, please check" in text
    config = study_file.load(out)
    assert (config.data.prompt, config.data.completion) == ("{de}\n", "{en}")
    assert config.data.validation_file == str(tmp_path / "dev.jsonl")
    assert config.data.validation_rows == 10


def test_rows_are_held_back_where_nothing_else_is_there(tmp_path: Path, model: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"text": f"line {n}"} for n in range(50)])
    out = tmp_path / "study.yaml"
    assert init("--model", model, "--data", data, "--out", out).exit_code == 0
    assert study_file.load(out).data.validation_rows == 5
    assert "held back from training" in out.read_text()
    assert "epochs of 45 rows" in out.read_text()


def test_splits_under_other_names_are_found(tmp_path: Path, model: Path) -> None:
    for name, count in (("train_sft", 40), ("train_gen", 40), ("dev_small", 10), ("test_sft", 10)):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": f"{name} {n}"} for n in range(count)])
    out = tmp_path / "study.yaml"
    result = init("--model", model, "--data", tmp_path, "--out", out)
    assert result.exit_code == 0, result.output
    data = study_file.load(out).data
    assert (data.train_split, data.validation_split) == ("train_gen", "dev_small")


def test_only_a_test_split_is_refused(tmp_path: Path, model: Path) -> None:
    write_rows(tmp_path / "test.jsonl", [{"text": "a"}] * 20)
    out = tmp_path / "study.yaml"
    assert_refused(init("--model", model, "--data", tmp_path, "--out", out), out, "test split")


def write_encoder(folder: Path) -> Path:
    """A random BERT that reads words of the letters a to z and digits."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [prefix + c for prefix in ("", "##") for c in "abcdefghijklmnopqrstuvwxyz0123456789"]
    vocab = {token: index for index, token in enumerate([*special, *pieces])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=48,
        **{f"{name}_token": token for name, token in names.items()},
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def labelled(count: int, first: int = 0) -> list[dict[str, Any]]:
    """One row of four is of the second class."""
    return [
        {"id": n, "review": f"{'bad' if n % 4 == 0 else 'good'} film {n}", "label": int(n % 4 == 0)}
        for n in range(first, first + count)
    ]


def test_labelled_text_and_an_encoder_make_a_classifier_that_trains(tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder")
    data = write_rows(tmp_path / "train.jsonl", labelled(80))
    write_rows(tmp_path / "valid.jsonl", labelled(24, 100))
    out = tmp_path / "study.yaml"
    result = init("--model", encoder, "--data", data, "--out", out)
    assert result.exit_code == 0, result.output
    config = study_file.load(out)
    assert config.data.task == "SEQ_CLS"
    assert (config.data.label, config.data.text) == ("label", "{review}")
    assert config.data.max_length == 32
    assert config.search.objective == "matthews"
    assert config.training.batch_size == 16
    assert "75%" in result.stdout
    assert "forgetting" not in out.read_text()
    done = run_study(out, tmp_path / "run")
    assert [record["outcome"] for record in done] == ["complete"] * 3
    assert "matthews" in str(done[0])


def test_a_decoder_classifies_too_where_a_label_is_named(tmp_path: Path, model: Path) -> None:
    rows = [{"prompt": f"{n} down:", "completion": "x", "odd": n % 2 == 1} for n in range(60)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "study.yaml"
    result = init("--model", model, "--data", data, "--out", out, "--label", "odd")
    assert result.exit_code == 0, result.output
    config = study_file.load(out)
    assert (config.data.label, config.data.text) == ("odd", "{prompt}")
    assert config.search.objective == "accuracy"
    assert "A GUESS" in out.read_text()


def test_an_encoder_without_a_class_is_refused(tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder")
    out = tmp_path / "study.yaml"
    result = init("--model", encoder, "--data", write_data(tmp_path / "data"), "--out", out)
    assert_refused(result, out, "model.name", "is an encoder", "--label", "'prompt', 'completion'")


MARKED = (
    "{% for m in messages %}{{ m.role }}: "
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}.{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def chats(count: int) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "no"}]}
        for n in range(count)
    ]


@pytest.mark.parametrize(
    ("template", "loss_on"), [(MARKED, "completion"), (UNMARKED, "all")], ids=["marked", "unmarked"]
)
def test_chats_are_read_by_the_template_of_the_tokenizer(
    tmp_path: Path, template: str, loss_on: str
) -> None:
    instruct = write_model(tmp_path / "model")
    (instruct / "chat_template.jinja").write_text(template)
    data = write_rows(tmp_path / "chats.jsonl", chats(60))
    out = tmp_path / "study.yaml"
    result = init("--model", instruct, "--data", data, "--out", out)
    assert result.exit_code == 0, result.output
    config = study_file.load(out)
    assert (config.data.messages, config.data.loss_on) == ("messages", loss_on)
    assert ("does not mark" in out.read_text()) == (loss_on == "all")


def test_chats_need_a_template_and_one_can_be_given(tmp_path: Path, model: Path) -> None:
    data = write_rows(tmp_path / "chats.jsonl", chats(60))
    out = tmp_path / "study.yaml"
    arguments = ("--model", model, "--data", data, "--out", out)
    assert_refused(init(*arguments), out, "the tokenizer has no chat template")
    template = tmp_path / "chat.jinja"
    template.write_text(MARKED)
    assert init(*arguments, "--chat-template", template).exit_code == 0
    config = study_file.load(out)
    assert config.data.chat_template == str(template)
    assert config.data.loss_on == "completion"
    done = run_study(out, tmp_path / "run")
    assert [record["outcome"] for record in done] == ["complete"] * 3
