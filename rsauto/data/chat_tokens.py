"""From chats to token ids: the chat template writes them, special tokens included.

What the loss counts of a chat is what the template puts between {% generation %} and
{% endgeneration %}, the assistant's turns. A prompt and its completion need no such marks: the
prompt is written alone, up to where the assistant begins, and what follows it in the whole is
counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jinja2

from rsauto.config import DataConfig
from rsauto.data.chat import ChatFormat, Message
from rsauto.data.encoding import Example, encode, encode_batches
from rsauto.data.files import missing
from rsauto.data.rows import Problems, Row
from rsauto.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = re.compile(r"\{%[-+]?\s*generation\b")
_TAGS = re.compile(r"\{%[-+]?\s*(\w+)(.*?)%\}", re.DOTALL)
_BLOCKS = frozenset({"macro", "call", "filter", "set"})
_SHOWN_CHARACTERS = 200
"""Of what a template says about a chat."""

Written = TypeVar("Written")

Span = tuple[int, int]
"""Characters from the first up to, but not including, the second."""


def chat_examples(
    rows: Sequence[Row],
    form: ChatFormat,
    source: str,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[Example], int]:
    """Every row whole, and how many of them do not begin with their prompt as written alone.

    Of those the longest common prefix is the prompt.

    Raises InputError when there is no template, when it is broken, has no marks where they are
    needed, or refuses a chat.
    """
    template = ChatTemplate(_given(config), tokenizer)
    marked = form.prompt is None and config.loss_on == "completion"
    if marked:
        template.require_marks({bool(row.tools) for row in rows})
    written = _each(rows, source, lambda row: template.whole(row, marked))
    if marked:
        return _marked_examples(written, tokenizer), 0
    whole = encode([text for text, _ in written], tokenizer)
    if form.prompt is None or config.loss_on == "all":
        return [Example(tuple(ids)) for ids in whole], 0
    prompts = encode(_each(rows, source, template.prompt), tokenizer)
    common = [_common(prompt, ids) for prompt, ids in zip(prompts, whole, strict=True)]
    examples = [Example(tuple(ids), length) for ids, length in zip(whole, common, strict=True)]
    return examples, sum(n < len(prompt) for n, prompt in zip(common, prompts, strict=True))


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """Writes chats as text."""

    given: str | None
    """Takes the place of the tokenizer's own."""
    tokenizer: PreTrainedTokenizerBase

    def source(self, has_tools: bool) -> str:
        """The template itself; a tokenizer may have one for tools and one for all else."""
        if self.given is not None:
            return self.given
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                "data: the rows are chats, but the tokenizer has no chat template. Give "
                "data.chat_template, take an instruct model, or write prompt and completion as "
                "text."
            )
        try:
            return str(self.tokenizer.get_chat_template(None, [{}] if has_tools else None))
        except ValueError as error:
            raise InputError(
                "data.chat_template: the tokenizer has several chat templates and none is the "
                "default. Write the one to use into a file and give its path."
            ) from error

    def require_marks(self, has_tools: Collection[bool]) -> None:
        """Raises InputError when the assistant's turns cannot be found."""
        if not all(_MARKS.search(self.source(tools)) for tools in has_tools):
            whose = "the tokenizer's chat template" if self.given is None else "the template"
            raise InputError(
                f"data.chat_template: {whose} does not mark the assistant's turns, and only they "
                f"are trained on. Give a template that writes them between {{% generation %}} and "
                f"{{% endgeneration %}}, set data.loss_on: all to train on every turn, or give the "
                f"rows as chats in prompt and completion, which need no marks."
            )
        if any(marked_in_a_block(self.source(tools)) for tools in has_tools):
            raise InputError(
                "data.chat_template: the template marks the assistant's turns inside a macro or a "
                "set, call or filter block, where their place in the text is lost. Write "
                "{% generation %} outside of such blocks, or set data.loss_on: all."
            )
        if not self.tokenizer.is_fast:
            raise InputError(
                f"data: {type(self.tokenizer).__name__} does not tell which characters its tokens "
                f"stand for, so that the assistant's turns cannot be found. Set data.loss_on: all, "
                f"or give the rows as chats in prompt and completion."
            )

    def whole(self, row: Row, marked: bool) -> tuple[str, list[Span]]:
        """The whole chat, and its marked stretches."""
        messages = json.loads(row.prompt or "[]") + json.loads(row.completion)
        return self._write(messages, row, return_assistant_tokens_mask=marked)

    def prompt(self, row: Row) -> str:
        """The prompt, open where the assistant begins or goes on."""
        messages = json.loads(row.prompt)
        goes_on = messages[-1]["role"] == "assistant"
        options = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
        return self._write(messages, row, **options)[0]

    def _write(self, messages: list[Message], row: Row, **options: bool) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        given: dict[str, Any] = {**options, **self.tokenizer.special_tokens_map}
        # As the tokenizer's apply_chat_template does, which keeps the marked stretches to itself.
        written: Any = render_jinja_template(
            conversations=[messages],
            tools=json.loads(row.tools) if row.tools else None,
            chat_template=self.source(bool(row.tools)),
            **given,
        )
        (text,), spans = written
        return str(text), [span for of_chat in spans for span in of_chat]


def _given(config: DataConfig) -> str | None:
    """The template of the study file."""
    if config.chat_template is None:
        return None
    path = Path(config.chat_template).expanduser()
    if not path.exists():
        raise InputError(missing("data.chat_template", path))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"data.chat_template: {config.chat_template!r} cannot be read as UTF-8 text: {error}."
        ) from error
    if not text.strip():
        raise InputError(f"data.chat_template: {config.chat_template!r} is empty.")
    return text


def _each(rows: Sequence[Row], source: str, write: Callable[[Row], Written]) -> list[Written]:
    """What `write` makes of every row. Raises InputError saying why some cannot be written."""
    problems = Problems(source)
    written: list[Written] = []
    for row in problems.counting(rows):
        try:
            written.append(write(row))
        except jinja2.TemplateSyntaxError as error:
            raise InputError(
                f"data.chat_template: no valid Jinja, line {error.lineno}: {error.message}."
            ) from error
        except InputError:
            raise
        except Exception as error:
            # A template raises what it likes, and runs expressions that raise their own kinds.
            said = " ".join(str(error).split())[:_SHOWN_CHARACTERS]
            problems.add(
                f"a chat that the chat template refuses, saying {said!r}",
                row.number,
                "Correct these chats, or give a data.chat_template that takes them.",
            )
    problems.raise_if_any()
    return written


def _marked_examples(
    written: Sequence[tuple[str, Sequence[Span]]], tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    """Chats of which the marked stretches count.

    The mask that the tokenizer can return is not taken: where a stretch begins or ends with a
    space that is in no token's offsets, it counts nothing, or all tokens up to the last.
    """
    texts = [text for text, _ in written]
    batches = encode_batches(
        texts, tokenizer, add_special_tokens=False, return_offsets_mapping=True
    )
    encoded = (
        one
        for batch in batches
        for one in zip(batch["input_ids"], batch["offset_mapping"], strict=True)
    )
    return [
        Example(tuple(ids), mask=_mask(len(text), spans, offsets))
        for (text, spans), (ids, offsets) in zip(written, encoded, strict=True)
    ]


def _mask(num_characters: int, spans: Sequence[Span], offsets: Sequence[Span]) -> bytes:
    """One byte a token, 1 for those with a character in one of the spans."""
    counted = bytearray(num_characters)
    for start, stop in spans:
        counted[start:stop] = b"\1" * (stop - start)
    mask = bytearray()
    before = 0
    for start, stop in offsets:
        # Some tokenizers trim the offsets of spaces to nothing: they are what lies before.
        mask.append(1 in counted[before if start == stop else start : stop])
        before = stop
    return bytes(mask)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def marked_in_a_block(template: str) -> bool:
    """Whether `{% generation %}` stands in a block whose text is put elsewhere afterwards."""
    depth = 0
    for name, rest in _TAGS.findall(template):
        if name in _BLOCKS and not (name == "set" and "=" in rest):
            depth += 1
        elif name.startswith("end") and name[3:] in _BLOCKS:
            depth -= 1
        elif name == "generation" and depth > 0:
            return True
    return False
