"""From text to token ids, and which of them the loss counts.

    prefix + ids(prompt) + ids(completion) + end        cut on the right at max_length

prefix  what the tokenizer puts before a text by itself (often <s>); nothing if it puts nothing
end     the tokenizer's end-of-text token, or what it puts after a text if it has none

Prompt and completion are tokenised apart. Tokenising them joined may merge the last characters of
the prompt with the first of the completion into one token: the mask would then cut through it, and
the prompt seen in training would not be the prompt given when the model is used.

Chats are written by the chat template (chat_tokens.py), and text that is classified by the
tokenizer (labels.py): both put special tokens of their own, and nothing is added to them here.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rsauto.config import DataConfig, TaskType
from rsauto.data.chat import ChatFormat
from rsauto.data.chat_tokens import chat_examples
from rsauto.data.encoding import Example, Fit, encode
from rsauto.data.labels import LabelFormat, cut_labelled, labelled_examples
from rsauto.data.load import Splits
from rsauto.data.rows import Row
from rsauto.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Example", "Fit", "TokenisedData", "fingerprint", "special_tokens", "tokenise"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenisedData:
    """Both splits as token ids, in the order of their rows."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    train_fit: Fit
    validation_fit: Fit
    pad_token_id: int
    train_length: int
    """Tokens of the longest training example."""
    validation_length: int
    fingerprint: str
    """SHA-256 over token ids, masks and classes of both splits, in hexadecimal."""
    label_names: tuple[str, ...] | None = None
    """Names of the classes by their index; None for language modelling."""
    general: tuple[Example, ...] = ()
    """A text that is not trained on, cut into sequences, on which forgetting is measured."""

    @property
    def task(self) -> TaskType:
        return "CAUSAL_LM" if self.label_names is None else "SEQ_CLS"


def tokenise(
    splits: Splits, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> TokenisedData:
    """Tokenise both splits; `config` gives `loss_on` and `max_length`.

    Raises InputError when truncation leaves no example of a split, or when chats and the chat
    template do not go together.
    """
    train, train_fit = tokenise_rows(splits.train, "train", splits, config, tokenizer)
    validation, validation_fit = tokenise_rows(
        splits.validation, "validation", splits, config, tokenizer
    )
    return TokenisedData(
        train=train,
        validation=validation,
        train_fit=train_fit,
        validation_fit=validation_fit,
        pad_token_id=pad_token_id(tokenizer),
        train_length=max(len(example.input_ids) for example in train),
        validation_length=max(len(example.input_ids) for example in validation),
        fingerprint=fingerprint(train, validation, label_names=splits.label_names),
        label_names=splits.label_names,
    )


def without_token_types(data: TokenisedData) -> TokenisedData:
    """The same for a model that tells no two texts apart, whatever its tokenizer returns.

    Some such models would take the types for tokens (GPT-2), others would refuse them.
    """

    def bare(examples: Sequence[Example]) -> tuple[Example, ...]:
        return tuple(replace(example, token_type_ids=None) for example in examples)

    return replace(data, train=bare(data.train), validation=bare(data.validation))


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills up batches. Which one does not matter: it is masked in every use."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    return 0


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(prefix, end): the ids around a text, as in the module's equation.

    Raises InputError when a text's own tokens cannot be found between the tokenizer's additions.
    """
    plain = encode(["a"], tokenizer, special=False)[0]
    whole = encode(["a"], tokenizer, special=True)[0]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            break
    else:
        raise InputError(
            f"model: {type(tokenizer).__name__} changes a text when it adds special tokens, so "
            f"that prompt and completion cannot be told apart. Use another tokenizer."
        )
    suffix = whole[start + len(plain) :]
    eos = tokenizer.eos_token_id
    return tuple(whole[:start]), (eos,) if isinstance(eos, int) else tuple(suffix)


def fingerprint(*splits: Sequence[Example], label_names: Sequence[str] | None = None) -> str:
    """SHA-256 in hexadecimal; lengths are hashed too, so that no two data sets run together."""
    digest = hashlib.sha256()
    for name in label_names or ():
        digest.update(struct.pack("<Q", len(name.encode())) + name.encode())
    for split in splits:
        digest.update(struct.pack("<Q", len(split)))
        for example in split:
            length = len(example.input_ids)
            digest.update(struct.pack("<QQ", length, example.num_prompt_tokens))
            digest.update(struct.pack(f"<{length}I", *example.input_ids))
            # Only where present: plain rows keep the fingerprint they have always had.
            if example.mask is not None:
                digest.update(b"mask" + example.mask)
            if example.label is not None:
                digest.update(b"label" + struct.pack("<Q", example.label))
            if example.token_type_ids is not None:
                digest.update(b"types" + bytes(example.token_type_ids))
    return digest.hexdigest()


def tokenise_rows(
    rows: Sequence[Row],
    name: str,
    splits: Splits,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[tuple[Example, ...], Fit]:
    """The examples of one split, and what truncation did to its rows."""
    num_not_prefix = 0
    form, names = splits.format, splits.label_names
    if isinstance(form, LabelFormat):
        assert names is not None
        whole = labelled_examples(rows, form, names, tokenizer)
        cut = cut_labelled(whole, rows, form, names, tokenizer, config.max_length)
    else:
        if isinstance(form, ChatFormat):
            whole, num_not_prefix = chat_examples(rows, form, f"{name} rows", config, tokenizer)
        else:
            count_all = config.loss_on == "all" or not form.has_prompts
            whole = _text_examples(rows, count_all, tokenizer)
        cut = [example.cut(config.max_length) for example in whole]
    kept = tuple(example for example in cut if example.num_targets > 0)
    lengths = tuple(len(example.input_ids) for example in whole)
    if not kept:
        raise InputError(_nothing_left(name, whole, config.max_length))
    return kept, Fit(
        lengths=lengths,
        num_truncated=sum(
            length > config.max_length and example.num_targets > 0
            for length, example in zip(lengths, cut, strict=True)
        ),
        num_dropped=len(rows) - len(kept),
        num_not_prefix=num_not_prefix,
    )


def _text_examples(
    rows: Sequence[Row], count_all: bool, tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    prefix, end = special_tokens(tokenizer)
    prompts = encode([row.prompt for row in rows], tokenizer)
    completions = encode([row.completion for row in rows], tokenizer)
    return [
        _join(prompt, completion, prefix, end, count_all)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _join(
    prompt: list[int],
    completion: list[int],
    prefix: tuple[int, ...],
    end: tuple[int, ...],
    count_all: bool,
) -> Example:
    """One whole sequence. Special tokens that the text already has are not added twice."""
    head = tuple(prompt)
    body = tuple(completion)
    opening = head or body
    if prefix and opening[: len(prefix)] != prefix:
        head = prefix + head
    if end and body[-len(end) :] != end:
        body += end
    return Example(head + body, 0 if count_all else len(head))


def _nothing_left(name: str, whole: Sequence[Example], max_length: int) -> str:
    firsts = [example.counts().index(True) for example in whole if any(example.counts())]
    if not firsts:
        return (
            f"data: none of the {len(whole)} {name} rows has a token to learn from. If these are "
            f"chats, the chat template marks no turn between {{% generation %}} and "
            f"{{% endgeneration %}}."
        )
    return (
        f"data.max_length: at {max_length} tokens none of the {len(whole)} {name} rows keeps a "
        f"token to learn from. The shortest prompt needs {min(firsts) + 1}; raise max_length to "
        f"cover the longest row, {max(len(example.input_ids) for example in whole)} tokens."
    )
