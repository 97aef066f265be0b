"""Rows of messages: the spellings they come in, brought to one, and what is wrong with them.

    messages              [{"role": "user", "content": "..."}, {"role": "assistant", ...}, ...]
    ShareGPT              [{"from": "human", "value": "..."}, {"from": "gpt", ...}, ...]
    prompt, completion    two such lists, the completion in the assistant's turns only

The names of the columns and roles are those of TRL's dataset formats
(https://huggingface.co/docs/trl/dataset_formats).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rsauto.data.rows import Numbered, Problems, Row, broken_unicode, is_null, is_unicode
from rsauto.data.template import Template
from rsauto.errors import shortened

CHAT_COLUMNS = ("messages", "conversations")
"""Columns taken for chats where the study file names none."""

TOOLS = "tools"
"""Column of the functions that a chat may call, as JSON schemas or as one JSON text."""

SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "system": "system", "tool": "tool",
}  # fmt: skip
"""ShareGPT's 'from' -> role."""

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatFormat:
    """Which columns hold a chat: all of it, or a prompt and the completion of it."""

    prompt: str | None
    completion: str
    """Column of the completion, or of the whole chat where `prompt` is None."""
    has_tools: bool
    needs_assistant: bool
    """Whether only the assistant's turns are trained on."""

    @property
    def has_prompts(self) -> bool:
        return self.prompt is not None

    @property
    def templates(self) -> tuple[Template, ...]:
        return ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it reads, each once."""
        named = (self.prompt, self.completion, TOOLS if self.has_tools else None)
        return tuple(dict.fromkeys(column for column in named if column is not None))

    def __str__(self) -> str:
        tools = f", tools {TOOLS!r}" if self.has_tools else ""
        if self.prompt is None:
            return f"chat, messages {self.completion!r}{tools}"
        return f"chat, prompt {self.prompt!r}, completion {self.completion!r}{tools}"

    def render(self, numbered: Numbered, source: str) -> tuple[Row, ...]:
        """Rows with their messages as JSON.

        Raises InputError, one problem for each kind, with how many rows have it and the first.
        """
        rows: list[Row] = []
        problems = Problems(source)
        for number, record in problems.counting(numbered):
            try:
                row = self._row(number, record)
                problems.add_if_long(row)
                rows.append(row)
            except _BadChat as bad:
                problems.add(bad.kind, number, bad.advice)
        problems.raise_if_any()
        return tuple(rows)

    def _row(self, number: int, record: Mapping[str, Any]) -> Row:
        completion = _chat(record.get(self.completion), self.completion)
        roles = [message["role"] for message in completion]
        prompt: list[Message] = []
        if self.prompt is not None:
            prompt = _chat(record.get(self.prompt), self.prompt)
            if set(roles) != {"assistant"}:
                raise _BadChat(
                    f"turns in column {self.completion!r} that are not the assistant's",
                    "Move them to the prompt, or give whole chats as data.messages.",
                )
        elif self.needs_assistant and "assistant" not in roles:
            raise _BadChat(
                "a chat without a turn of the assistant",
                "Remove them, or set data.loss_on: all to train on every turn.",
            )
        return Row(
            number=number,
            prompt="" if self.prompt is None else _json(prompt),
            completion=_json(completion),
            tools=_tools(record.get(TOOLS)) if self.has_tools else "",
        )


class _BadChat(Exception):
    """Why a row is no chat: `kind` is the object of 'rows have ...'."""

    def __init__(self, kind: str, advice: str = "Correct or remove them.") -> None:
        super().__init__(kind)
        self.kind = kind
        self.advice = advice


def _json(value: Any) -> str:
    """Raises _BadChat: what else a message holds is anybody's, and may be half a surrogate."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (RecursionError, ValueError):
        raise _BadChat("a message or tool that cannot be written as JSON") from None
    if not is_unicode(text):
        raise _BadChat("a message or tool with broken Unicode (half a surrogate pair)")
    return text


def _chat(value: Any, column: str) -> list[Message]:
    """The messages of a chat, each with its role first. Raises _BadChat."""
    if is_null(value):
        raise _BadChat(f"no value (null) in column {column!r}")
    if not isinstance(value, (list, tuple)):
        raise _BadChat(
            f"a chat that is no list of messages ({type(value).__name__}) in column {column!r}",
            'A chat is [{"role": "user", "content": "..."}, {"role": "assistant", ...}]. '
            "Plain text is given as text, or as prompt and completion.",
        )
    if not value:
        raise _BadChat(f"an empty chat in column {column!r}")
    return [_message(message, column) for message in value]


def _message(message: Any, column: str) -> Message:
    """Role, content if there is any, and whatever else the template may read."""
    if not isinstance(message, Mapping):
        raise _BadChat(
            f"a message that is no object ({type(message).__name__}) in column {column!r}"
        )
    # Arrow gives every message all keys, those it does not have as null.
    given = {key: item for key, item in message.items() if item is not None}
    if "from" in given and "role" not in given:
        given["role"] = _role(given.pop("from"), column)
        given["content"] = given.pop("value", None)
    if given.pop("weight", 1) != 1:
        raise _BadChat(
            f"a message with a weight in column {column!r}, which is not supported: every turn of "
            "the assistant counts in full,"
        )
    role = given.pop("role", None)
    content = given.pop("content", None)
    if not isinstance(role, str) or not role:
        raise _BadChat(f"a message without a role in column {column!r}")
    text = None if content is None else _text(content, column)
    if text is None and "tool_calls" not in given:
        raise _BadChat(f"a message without content (null or missing) in column {column!r}")
    if role == "assistant" and not (text or "").strip() and not given:
        raise _BadChat(f"an empty turn of the assistant in column {column!r}")
    return {"role": role, **({} if text is None else {"content": text}), **given}


def _role(speaker: Any, column: str) -> str:
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise _BadChat(
            f"a message from somebody unknown ({shortened(repr(speaker))}) in column {column!r}",
            f"Known are {', '.join(SPEAKERS)}.",
        )
    return SPEAKERS[speaker]


def _text(content: Any, column: str) -> str:
    """Content as one text; its parts, if it has any, are joined."""
    text = content if isinstance(content, str) else _joined(content)
    if text is None:
        raise _BadChat(
            f"a message whose content is neither text nor parts of text in column {column!r}",
            "Only text can be trained on.",
        )
    if not is_unicode(text):
        raise _BadChat(broken_unicode(column))
    return text


def _joined(parts: Any) -> str | None:
    """The text of [{"type": "text", "text": ...}, ...], or None if it is anything else."""
    if not isinstance(parts, (list, tuple)):
        return None
    texts = [
        part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        for part in parts
    ]
    if not all(isinstance(text, str) for text in texts):
        return None
    return "".join(str(text) for text in texts)


def _tools(value: Any) -> str:
    """JSON of the tools, or nothing where there are none."""
    try:
        tools = json.loads(value) if isinstance(value, str) and value.strip() else value
    except (ValueError, RecursionError):
        tools = value
    if not tools or is_null(tools):
        return ""
    if not isinstance(tools, (list, tuple)) or not all(isinstance(t, Mapping) for t in tools):
        raise _BadChat(f"no list of JSON schemas in column {TOOLS!r}")
    return _json(tools)
