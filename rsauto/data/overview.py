"""What a person should see of the data before hours are spent on it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rsauto.config import DataConfig
from rsauto.data.load import Splits
from rsauto.data.template import Template
from rsauto.data.tokens import Example, Fit, TokenisedData
from rsauto.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_SAMPLES = 2
FEW_VALIDATION_ROWS = 50
"""Below this a difference between two trials is mostly chance."""
SHOWN_CHARACTERS = 400
"""Of each part of a sample, in `lines`; the record keeps all of it."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a decoded example."""

    text: str
    counted: bool
    """Whether the loss counts it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitSummary:
    """One split in numbers; lengths are tokens per row before truncation."""

    source: str
    num_rows: int
    num_examples: int
    """Rows that can be learned from; the others were dropped."""
    num_dropped: int
    median_length: int
    p95_length: int
    longest_length: int
    num_truncated: int
    """Rows that were cut and still taught something."""
    num_tokens: int
    """After truncation."""
    num_counted_tokens: int
    """Those that the loss counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preflight:
    """The data as it will be trained on."""

    format: str
    unused_columns: tuple[str, ...]
    """Columns of the training rows that the format does not read."""
    max_length: int
    train: SplitSummary
    validation: SplitSummary
    test_name: str | None
    """The test split that was left alone."""
    samples: tuple[tuple[Segment, ...], ...]
    """The first training examples."""
    num_train_duplicates: int
    """Training rows that repeat an earlier one."""
    num_overlapping_rows: int
    """Validation rows that are training rows too."""
    num_overlapping_prompts: int
    """Validation rows whose prompt is a training prompt; 0 for the text format."""
    fingerprint: str
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def preflight(
    splits: Splits, data: TokenisedData, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> Preflight:
    """Look at the data. Raises InputError when every validation row is a training row too."""
    train_rows = [(row.prompt, row.completion) for row in splits.train]
    known = set(train_rows)
    overlapping = sum((row.prompt, row.completion) in known for row in splits.validation)
    if overlapping == len(splits.validation):
        raise InputError(
            f"data: every validation row ({splits.validation_source}) is a training row too, so "
            f"that validation would reward learning by heart. Give other validation rows, or none "
            f"and rsauto holds some back."
        )
    prompts = {row.prompt for row in splits.train}
    has_prompts = splits.format.prompt is not None
    found = Preflight(
        format=str(splits.format),
        unused_columns=splits.unused_columns,
        max_length=config.max_length,
        train=_summary(splits.train_source, data.train, data.train_fit),
        validation=_summary(splits.validation_source, data.validation, data.validation_fit),
        test_name=splits.test_name,
        samples=tuple(segments(example, tokenizer) for example in data.train[:NUM_SAMPLES]),
        num_train_duplicates=len(train_rows) - len(known),
        num_overlapping_rows=overlapping,
        num_overlapping_prompts=(
            sum(row.prompt in prompts for row in splits.validation) if has_prompts else 0
        ),
        fingerprint=data.fingerprint,
        warnings=(),
    )
    return dataclasses.replace(found, warnings=_warnings(found, splits, tokenizer))


def segments(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[Segment, ...]:
    """The decoded example, special tokens included, cut where the loss begins to count."""
    num_ignored = max(1, example.num_prompt_tokens)
    ignored = _decode(example.input_ids[:num_ignored], tokenizer)
    whole = _decode(example.input_ids, tokenizer)
    # Some tokenizers drop a leading space when they decode; taking the rest of the whole keeps it.
    if whole.startswith(ignored):
        counted = whole[len(ignored) :]
    else:
        counted = _decode(example.input_ids[num_ignored:], tokenizer)
    return (Segment(ignored, False), Segment(counted, True))


def lines(found: Preflight) -> list[str]:
    """The preflight as plain text; what the loss counts stands between « and »."""
    shown = [f"format      {found.format}"]
    if found.unused_columns:
        shown.append(f"not used    {', '.join(map(repr, found.unused_columns))}")
    for name, split in (("train", found.train), ("validation", found.validation)):
        dropped = f", {split.num_dropped} dropped" if split.num_dropped else ""
        shown.append(f"{name:<11} {split.source}{dropped}")
        shown.append(
            f"{'':<11} tokens per row: median {split.median_length}, 95 % {split.p95_length}, "
            f"longest {split.longest_length}; "
            f"{split.num_truncated / split.num_rows:.1%} cut at {found.max_length}"
        )
        shown.append(
            f"{'':<11} {split.num_tokens} tokens, {split.num_counted_tokens} of them counted"
        )
    if found.test_name is not None:
        shown.append(f"test        {found.test_name!r} is there and is left alone")
    shown.append("the loss counts what stands between « and »:")
    for number, sample in enumerate(found.samples, start=1):
        shown.append(f"  {number}  " + "".join(_marked(segment) for segment in sample))
    shown.extend(f"warning: {warning}" for warning in found.warnings)
    return shown


def _marked(segment: Segment) -> str:
    # Data is not to be trusted with a terminal: line breaks and control codes are spelled out.
    text = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in segment.text
    )
    if len(text) > SHOWN_CHARACTERS:
        half = SHOWN_CHARACTERS // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return f"«{text}»" if segment.counted else text


def _decode(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(
        tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
    )


def _summary(source: str, examples: Sequence[Example], fit: Fit) -> SplitSummary:
    return SplitSummary(
        source=source,
        num_rows=len(fit.lengths),
        num_examples=len(examples),
        num_dropped=fit.num_dropped,
        median_length=_quantile(fit.lengths, 0.5),
        p95_length=_quantile(fit.lengths, 0.95),
        longest_length=max(fit.lengths),
        num_truncated=fit.num_truncated,
        num_tokens=sum(len(example.input_ids) for example in examples),
        num_counted_tokens=sum(example.num_targets for example in examples),
    )


def _quantile(lengths: Sequence[int], share: float) -> int:
    """The shortest length that at least `share` of the rows do not exceed."""
    ordered = sorted(lengths)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def _warnings(
    found: Preflight, splits: Splits, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, ...]:
    warnings = [*_overlap_warnings(found), *_length_warnings(found, tokenizer)]
    if found.validation.num_rows < FEW_VALIDATION_ROWS:
        warnings.append(
            f"only {found.validation.num_rows} validation rows: small differences between trials "
            f"will be chance. {FEW_VALIDATION_ROWS} or more are better."
        )
    if tokenizer.eos_token_id is None:
        warnings.append(
            "the tokenizer has no end-of-text token: the model is not taught where to stop."
        )
    if splits.format.prompt is None and "label" in found.unused_columns:
        warnings.append(
            "the column 'label' is not used, so the model does not learn to predict it. To train "
            "on it give prompt and completion."
        )
    for template in (splits.format.prompt, splits.format.completion):
        if template is not None and _literal_newline(template):
            warnings.append(
                f"the template {template.source!r} has a backslash and an n, not a line break. In "
                f"YAML, only double quotes turn \\n into one."
            )
    return tuple(warnings)


def _literal_newline(template: Template) -> bool:
    return any("\\n" in literal for literal, _ in template.parts)


def _overlap_warnings(found: Preflight) -> list[str]:
    warnings = []
    if found.num_overlapping_rows:
        warnings.append(
            f"{found.num_overlapping_rows} of {found.validation.num_rows} validation rows are "
            f"training rows too: the validation loss looks better than it is. Remove them."
        )
    others = found.num_overlapping_prompts - found.num_overlapping_rows
    if others > 0:
        warnings.append(
            f"{others} validation rows have a training row's prompt with another completion."
        )
    if found.num_train_duplicates:
        warnings.append(
            f"{found.num_train_duplicates} of {found.train.num_rows} training rows repeat an "
            f"earlier one."
        )
    return warnings


def _length_warnings(found: Preflight, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    warnings = []
    for name, split in (("training", found.train), ("validation", found.validation)):
        if split.num_dropped:
            warnings.append(
                f"{split.num_dropped} of {split.num_rows} {name} rows are dropped: their prompts "
                f"alone fill data.max_length {found.max_length}."
            )
        if split.num_truncated:
            warnings.append(
                f"{split.num_truncated} of {split.num_rows} {name} rows are cut at data.max_length "
                f"{found.max_length}; the longest has {split.longest_length} tokens. Cut rows do "
                f"not teach where to stop."
            )
    used = min(found.max_length, max(found.train.longest_length, found.validation.longest_length))
    if used > tokenizer.model_max_length:
        warnings.append(
            f"sequences of up to {used} tokens are longer than the {tokenizer.model_max_length} "
            f"the tokenizer says its model can read. Lower data.max_length."
        )
    return warnings
