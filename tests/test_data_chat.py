"""Chats become tokens as their template writes them, and only the assistant's turns count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rsauto import embedded
from rsauto.config import DataConfig
from rsauto.data import (
    Example,
    TokenisedData,
    collate,
    lines,
    preflight,
    splits_from_objects,
    tokenise,
)
from rsauto.errors import InputError
from rsauto.training.loss import IGNORED, count_targets

START, END = 256, 257

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML. The engine eats a line break after a block, so that after a turn is an expression."""
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")

Chat = list[dict[str, Any]]


def byte_tokenizer(template: Any = MARKED, trim: bool = False) -> PreTrainedTokenizerBase:
    """One token per byte; `trim` leaves spaces at the ends of a token out of its offsets."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    special = ["<|im_start|>", "<|im_end|>", "<s>"]
    vocabulary |= {token: START + i for i, token in enumerate(special)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=trim),
            # Put before plain texts by itself, and never before a chat.
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 258)]),
        ]
    )
    wrapped: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>"
    )  # type: ignore[no-untyped-call]
    wrapped.chat_template = template
    return wrapped


def chat(*contents: str, system: str | None = None) -> Chat:
    """User and assistant in turns."""
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


VALIDATION = [{"messages": chat("v", "w")}]
TURNS = chat("Größe?", "5 cm", "and now", " ü\nno", system="be brief")


def tokens_of(
    train: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    validation: list[dict[str, Any]] | None = None,
    **settings: Any,
) -> TokenisedData:
    config = DataConfig(**settings)
    splits = splits_from_objects(train, validation or VALIDATION, config)
    return tokenise(splits, config, tokenizer)


def of_chats(tokenizer: PreTrainedTokenizerBase, *chats: Chat, **settings: Any) -> TokenisedData:
    return tokens_of([{"messages": one} for one in chats], tokenizer, **settings)


def by_hand(turns: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids and labels of a chat, put together turn by turn."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    tokens: list[int] = []
    labels: list[int] = []
    for turn in turns:
        head = [START, *ids(turn["role"] + "\n")]
        body = [*ids(turn["content"]), END]
        tokens += head + body
        labels += [IGNORED] * len(head)
        labels += body if turn["role"] == "assistant" else [IGNORED] * len(body)
        newline = ids("\n")
        tokens += newline
        labels += [IGNORED] * len(newline)
    return tokens, labels


def counted(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    labels = collate([example], pad_token_id=0).labels[0]
    return str(tokenizer.decode(labels[labels != IGNORED]))


@pytest.mark.parametrize("trim", [False, True])
def test_only_the_assistants_turns_count(trim: bool) -> None:
    # With trimmed offsets the space before ü is in no token's, and still belongs to the turn.
    tokenizer = byte_tokenizer(trim=trim)
    (example, other) = of_chats(tokenizer, TURNS, chat("a", "b")).train
    tokens, labels = by_hand(TURNS, tokenizer)
    assert list(example.input_ids) == tokens
    batch = collate([example, other], pad_token_id=0)
    assert batch.labels[0].tolist() == labels
    assert count_targets(batch.labels) == example.num_targets + other.num_targets


def test_the_mask_is_the_tokenizers_own() -> None:
    tokenizer = byte_tokenizer()
    own = tokenizer.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    (example,) = of_chats(tokenizer, TURNS).train
    assert list(example.input_ids) == own["input_ids"]
    assert list(example.mask or b"") == own["assistant_masks"]


def test_all_turns_count_on_request_and_need_no_marks() -> None:
    tokenizer = byte_tokenizer(UNMARKED)
    (example,) = of_chats(tokenizer, TURNS, loss_on="all").train
    assert list(example.input_ids) == by_hand(TURNS, tokenizer)[0]
    assert (example.mask, example.num_prompt_tokens) == (None, 0)


def test_every_spelling_of_a_chat_gives_the_same_tokens() -> None:
    tokenizer = byte_tokenizer()
    plain = chat("hi", "yes", "more", "no", system="s")
    shares = {"system": "system", "user": "human", "assistant": "gpt"}
    spellings: list[dict[str, Any]] = [
        {"messages": plain},
        {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in plain]},
        {"messages": [{**m, "tool_calls": None, "weight": 1} for m in plain]},
        {"messages": [{"from": shares[m["role"]], "value": m["content"]} for m in plain]},
    ]
    examples = [tokens_of([row], tokenizer).train[0] for row in spellings]
    assert examples == [examples[0]] * 4
    from_gpt = [{"conversations": spellings[3]["messages"]}]
    others = [{"conversations": [{"from": "human", "value": "v"}, {"from": "gpt", "value": "w"}]}]
    assert tokens_of(from_gpt, tokenizer, others).train == (examples[0],)
    named = [{"log": plain}]
    validation = [{"log": chat("v", "w")}]
    assert tokens_of(named, tokenizer, validation, messages="log").train == (examples[0],)
    arrow = datasets.Dataset.from_list([{"messages": plain}])
    config = DataConfig()
    splits = splits_from_objects(arrow, VALIDATION, config)
    assert tokenise(splits, config, tokenizer).train == (examples[0],)


def test_prompt_and_completion_need_no_marks() -> None:
    tokenizer = byte_tokenizer(UNMARKED)
    row = {"prompt": chat("hi", "yes", "more"), "completion": chat("x", "no")[1:]}
    validation = [{"prompt": chat("v"), "completion": chat("v", "w")[1:]}]
    (example,) = tokens_of([row], tokenizer, validation).train
    tokens, _ = by_hand(row["prompt"] + row["completion"], tokenizer)
    assert list(example.input_ids) == tokens
    assert counted(example, tokenizer) == "no<|im_end|>\n"
    (whole,) = tokens_of([row], tokenizer, validation, loss_on="all").train
    assert (list(whole.input_ids), whole.num_prompt_tokens) == (tokens, 0)


def test_a_prompt_that_ends_with_the_assistant_is_gone_on_with() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q:{% endif %}{{ m.content }};{% endfor %}"
    )
    row = {"prompt": chat("hi", "I"), "completion": chat("", " think")[1:]}
    tokenizer = byte_tokenizer(template)
    (example,) = tokens_of([row], tokenizer, [{**row, "prompt": chat("v")}]).train
    # The prompt ends in the open turn, before the mark that would close it.
    assert counted(example, tokenizer) == "; think;"


def test_prompts_that_are_written_otherwise_are_cut_where_they_part() -> None:
    # As reasoning models do, it writes something only where an answer is still to come.
    template = UNMARKED.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    tokenizer = byte_tokenizer(template)
    rows = [{"prompt": chat(f"q{i}"), "completion": chat("", f"a{i}")[1:]} for i in range(80)]
    config = DataConfig()
    splits = splits_from_objects(rows[:20], rows[20:], config)
    data = tokenise(splits, config, tokenizer)
    assert counted(data.train[3], tokenizer) == "a3<|im_end|>\n"
    assert (data.train_fit.num_not_prefix, data.validation_fit.num_not_prefix) == (20, 60)
    (warning,) = preflight(splits, data, config, tokenizer).warnings
    assert warning.startswith("80 of 80 prompts are written otherwise by the chat template")


def test_tools_are_given_to_the_template_that_is_for_them() -> None:
    with_tools = "{% for t in tools %}[{{ t.name }}]{% endfor %}" + MARKED
    tokenizer = byte_tokenizer({"default": MARKED, "tool_use": with_tools})
    tools = [{"name": "add"}]
    for given, expected in ((tools, "[add]<"), (json.dumps(tools), "[add]<"), (None, "<")):
        row = {"messages": chat("a", "b"), "tools": given}
        (example,) = tokens_of([row], tokenizer, [row]).train
        assert str(tokenizer.decode(example.input_ids)).split("|", 1)[0] == expected
    calls = [{"role": "user", "content": "a"},
             {"role": "assistant", "content": None, "tool_calls": tools},
             {"role": "assistant", "content": "b"}]  # fmt: skip
    (example,) = of_chats(tokenizer, calls).train
    assert counted(example, tokenizer) == "<|im_end|>b<|im_end|>"
    with pytest.raises(InputError, match="does not mark the assistant's turns"):
        row["tools"] = tools
        tokens_of([row], byte_tokenizer({"default": MARKED, "tool_use": "a"}), [row])


def test_a_template_file_takes_the_place_of_the_tokenizers_own(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(MARKED)
    tokenizer = byte_tokenizer(None)
    (example,) = of_chats(tokenizer, TURNS, chat_template=str(path)).train
    assert list(example.input_ids) == by_hand(TURNS, tokenizer)[0]
    with pytest.raises(InputError, match=r"chat_template: .*Did you mean 'chat\.jinja'"):
        of_chats(tokenizer, TURNS, chat_template=str(tmp_path / "chat.jinj"))
    path.write_text("{% for %}")
    with pytest.raises(InputError, match=r"no valid Jinja, line 1: "):
        of_chats(tokenizer, TURNS, chat_template=str(path), loss_on="all")
    path.write_text(" ")
    with pytest.raises(InputError, match="is empty"):
        of_chats(tokenizer, TURNS, chat_template=str(path))
    with pytest.raises(InputError, match=r"has no effect, because the rows are no chats but text"):
        tokens_of([{"text": "a"}], tokenizer, chat_template=str(path))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"the tokenizer has no chat template\. Give data\.chat_template, take an instruct"),
        (UNMARKED, r"does not mark the assistant's turns.*data\.loss_on: all.*in prompt and compl"),
        (
            "{% macro turn(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
            "{% for m in messages %}{{ turn(m) }}{% endfor %}",
            "marks .* inside a macro or a set",
        ),
        (
            "{%- set t -%}{% generation %}{{ messages[1].content }}{% endgeneration %}"
            "{% endset %}{{ t }}",
            "marks .* inside a macro or a set",
        ),
        ({"rag": MARKED}, r"several chat templates and none is the default"),
        (
            "{{ raise_exception('roles must alternate') }}{% generation %}{% endgeneration %}",
            r"train rows: 2 of 2 rows have a chat .* refuses, saying 'roles must alternate', first "
            r"row 1\. Correct these chats",
        ),
        ("{{ messages[0].content + 1 }}{%- generation %}{% endgeneration %}", "refuses, saying"),
        ("{% generation %}{% endgeneration %}", r"none of the 2 train rows has a token to learn"),
    ],
)
def test_templates_that_do_not_fit_say_what_to_do(template: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        of_chats(byte_tokenizer(template), TURNS, chat("a", "b"))


def message(**changes: Any) -> Chat:
    return [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"} | changes]


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (None, r"no value \(null\) in column 'messages'"),
        ("hi", r"a chat that is no list of messages \(str\)"),
        ([], "an empty chat"),
        (["hi"], r"a message that is no object \(str\)"),
        ([{"content": "a"}], "a message without a role"),
        (message(content=None), r"a message without content \(null or missing\)"),
        (message(content=None, tool_calls=None), "a message without content"),
        (message(content=" "), "an empty turn of the assistant"),
        (message(content=4), "content is neither text nor parts of text"),
        (message(weight=0), "a message with a weight .* which is not supported"),
        (message(content=["a"]), "content is neither text nor parts of text"),
        (message(content=[{"type": "image"}]), "content is neither text nor parts of text"),
        (message(content="\ud800"), "broken Unicode"),
        ([{"from": "alien", "value": "a"}], r"from somebody unknown \('alien'\)"),
        (chat("a"), r"without a turn of the assistant, .* data\.loss_on: all"),
    ],
)
def test_broken_chats_are_counted_and_the_first_is_named(broken: Any, problem: str) -> None:
    chats = [chat(f"q{i}", "a") for i in range(20)]
    chats[7] = chats[11] = broken
    with pytest.raises(InputError, match=rf"train rows: 2 of 20 rows have .*{problem}") as caught:
        of_chats(byte_tokenizer(), *chats)
    assert "first row 8." in str(caught.value)
    assert len(caught.value.problems) == 1


def test_every_kind_of_broken_chat_is_told() -> None:
    with pytest.raises(InputError) as caught:
        of_chats(byte_tokenizer(), [], chat("a"), chat("a", "b"))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("settings", "row", "problem"),
    [
        ({}, {"prompt": chat("a"), "completion": chat("b")}, "turns .* not the assistant's"),
        ({}, {"prompt": "a", "completion": chat("", "b")[1:]}, "'prompt'.*Plain text is given as"),
        ({}, {"prompt": [], "completion": chat("", "b")[1:]}, "an empty chat in column 'prompt'"),
        (
            {"prompt": "{prompt}\n", "completion": "completion"},
            {"prompt": chat("a"), "completion": "b"},
            r"\(list; chats are given as messages, or by bare column names",
        ),
        ({"messages": "mesages"}, {"messages": chat("a", "b")}, "Did you mean 'messages'"),
        ({}, {"messages": chat("a", "b"), "tools": "add"}, "no list of JSON schemas in column"),
    ],
)
def test_broken_pairs_and_columns(
    settings: dict[str, Any], row: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        tokens_of([row], byte_tokenizer(), [row], **settings)


def test_chats_cut_before_the_assistant_are_dropped_and_counted() -> None:
    tokenizer = byte_tokenizer()
    # <|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n: 8 + 1 + 11 tokens before an answer.
    chats = [chat("a", "bcd"), chat("a" * 9, "b"), chat("a", "b")]
    data = of_chats(tokenizer, *chats, max_length=22)
    assert [counted(example, tokenizer) for example in data.train] == ["bc", "b<|im_end|>"]
    assert (data.train_fit.num_truncated, data.train_fit.num_dropped) == (2, 1)
    assert data.train_fit.lengths == (25, 31, 23)
    with pytest.raises(InputError, match=r"at 15 tokens none .* shortest prompt needs 21;"):
        of_chats(tokenizer, *chats, max_length=15)


def test_the_preflight_shows_every_turn_that_counts() -> None:
    tokenizer = byte_tokenizer()
    config = DataConfig(max_length=80)
    others = [{"messages": chat(f"v{i}", "w")} for i in range(60)]
    train = [{"messages": chat("é", "b", "c", "ü")}, *({"messages": chat(f"{i}", "x")}
             for i in range(9)), others[0], {"messages": chat("q" * 99, "x")}]  # fmt: skip
    splits = splits_from_objects([*train, train[1]], others, config)
    found = preflight(splits, tokenise(splits, config, tokenizer), config, tokenizer)
    shown = next(line for line in lines(found) if line.startswith("  1  "))
    user, end = "<|im_start|>user\\n", "<|im_end|>"
    head = f"{end}\\n<|im_start|>assistant\\n"
    assert shown == (f"  1  {user}é{head}«b{end}»\\n{user}c{head}«ü{end}»\\n")
    assert "format      chat, messages 'messages'" in lines(found)
    assert (found.num_train_duplicates, found.num_overlapping_rows) == (1, 1)
    assert found.num_overlapping_prompts == 0
    assert [warning.split(" rows ")[0] for warning in found.warnings] == [
        "1 of 60 validation",
        "1 of 13 training",
        "1 of 13 training",
    ]
    assert "dropped: no token that counts comes within data.max_length 80" in found.warnings[2]
    assert json.loads(json.dumps(found.to_json()))["train"]["class_counts"] is None


def test_chats_held_back_are_not_trained_on() -> None:
    rows = [{"messages": chat(f"q{i % 30}", "a")} for i in range(60)]
    splits = splits_from_objects(rows, None, DataConfig())
    held = {row.content for row in splits.validation}
    assert held.isdisjoint(row.content for row in splits.train)
    assert "equal to held back rows left out" in splits.train_source


def test_the_fingerprint_sees_the_mask() -> None:
    content_only = MARKED.replace(
        "{{ m.content }}<|im_end|>{% endgeneration %}",
        "{{ m.content }}{% endgeneration %}<|im_end|>",
    )
    prints = {
        of_chats(byte_tokenizer(template), TURNS, loss_on=loss_on).fingerprint
        for template, loss_on in ((MARKED, "completion"), (content_only, "completion"),
                                  (MARKED, "all"))
    }  # fmt: skip
    assert len(prints) == 3


def test_the_packaged_tokenizer_takes_chats() -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.MODEL_DIR)
    tokenizer.chat_template = MARKED.replace("<|im_end|>", "{{ eos_token }}")
    (example,) = of_chats(tokenizer, chat("is it so", "it is so", "no", "yes")).train
    end = tokenizer.eos_token
    assert counted(example, tokenizer) == f"it is so{end}yes{end}"
