"""What a person should see of the data before hours are spent on it."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rsauto.config import DataConfig
from rsauto.data.chat import ChatFormat
from rsauto.data.encoding import Example, Fit
from rsauto.data.load import Splits
from rsauto.data.samples import Segment, marked, segments, spelled_out
from rsauto.data.template import Format, Template
from rsauto.data.tokens import TokenisedData
from rsauto.errors import InputError, listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_SAMPLES = 2
FEW_VALIDATION_ROWS = 50
"""Below this a difference between two trials is mostly chance."""
FEW_OF_A_CLASS = 5
"""Validation rows; below this a class hardly matters for the metrics."""
LARGE_CLASS = 0.8
"""Share of the validation rows above which always saying the largest class looks good."""
SHOWN_CLASSES = 20


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
    """Those that the loss counts; of classified text one per example."""
    class_counts: dict[str, int] | None = None
    """Examples of every class, in the order of the classes; None for language modelling."""

    @property
    def largest_class(self) -> tuple[str, float] | None:
        """The most frequent class and its share of the examples."""
        if self.class_counts is None:
            return None
        name = max(self.class_counts, key=self.class_counts.__getitem__)
        return name, self.class_counts[name] / self.num_examples


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
    """Validation rows whose prompt is a training prompt; 0 where there are no prompts."""
    fingerprint: str
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def preflight(
    splits: Splits, data: TokenisedData, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> Preflight:
    """Look at the data. Raises InputError when every validation row is a training row too."""
    known = {row.content for row in splits.train}
    overlapping = sum(row.content in known for row in splits.validation)
    if overlapping == len(splits.validation):
        raise InputError(
            f"data: every validation row ({splits.validation_source}) is a training row too, so "
            f"that validation would reward learning by heart. Give other validation rows, or none "
            f"and rsauto holds some back."
        )
    prompts = {row.prompt for row in splits.train}
    has_prompts = splits.format.has_prompts
    names = data.label_names
    found = Preflight(
        format=str(splits.format),
        unused_columns=splits.unused_columns,
        max_length=config.max_length,
        train=_summary(splits.train_source, data.train, data.train_fit, names),
        validation=_summary(splits.validation_source, data.validation, data.validation_fit, names),
        test_name=splits.test_name,
        samples=tuple(segments(example, tokenizer, names) for example in data.train[:NUM_SAMPLES]),
        num_train_duplicates=len(splits.train) - len(known),
        num_overlapping_rows=overlapping,
        num_overlapping_prompts=(
            sum(row.prompt in prompts for row in splits.validation) if has_prompts else 0
        ),
        fingerprint=data.fingerprint,
        warnings=(),
    )
    return dataclasses.replace(found, warnings=_warnings(found, splits, data, tokenizer))


def lines(found: Preflight) -> list[str]:
    """The preflight as plain text; what the loss counts stands between « and »."""
    shown = [f"format      {found.format}"]
    if found.unused_columns:
        shown.append(f"not used    {listed(found.unused_columns)}")
    for name, split in (("train", found.train), ("validation", found.validation)):
        dropped = f", {split.num_dropped} dropped" if split.num_dropped else ""
        shown.append(f"{name:<11} {split.source}{dropped}")
        shown.append(
            f"{'':<11} tokens per row: median {split.median_length}, 95 % {split.p95_length}, "
            f"longest {split.longest_length}; "
            f"{split.num_truncated / split.num_rows:.1%} cut at {found.max_length}"
        )
        shown.append(f"{'':<11} {_tokens_or_classes(split)}")
    if found.test_name is not None:
        shown.append(f"test        {found.test_name!r} is there and is left alone")
    largest = found.validation.largest_class
    if largest is not None:
        name, share = largest
        shown.append(f"always saying {name!r} would score {share:.1%} in validation")
        shown.append("the class stands between « and »:")
    else:
        shown.append("the loss counts what stands between « and »:")
    space = "" if largest is None else " "
    for number, sample in enumerate(found.samples, start=1):
        shown.append(f"  {number}  " + space.join(marked(segment) for segment in sample))
    shown.extend(f"warning: {warning}" for warning in found.warnings)
    return shown


def _tokens_or_classes(split: SplitSummary) -> str:
    if split.class_counts is None:
        return f"{split.num_tokens} tokens, {split.num_counted_tokens} of them counted"
    counts = [f"{name} {count}" for name, count in split.class_counts.items()]
    return f"classes  {_first(counts)}; {split.num_tokens} tokens"


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_CLASSES} more" if len(names) > SHOWN_CLASSES else ""
    return ", ".join(map(spelled_out, names[:SHOWN_CLASSES])) + more


def _summary(
    source: str, examples: Sequence[Example], fit: Fit, names: Sequence[str] | None
) -> SplitSummary:
    labels = Counter(example.label for example in examples)
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
        class_counts=(None if names is None else {name: labels[i] for i, name in enumerate(names)}),
    )


def _quantile(lengths: Sequence[int], share: float) -> int:
    """The shortest length that at least `share` of the rows do not exceed."""
    ordered = sorted(lengths)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def _warnings(
    found: Preflight, splits: Splits, data: TokenisedData, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, ...]:
    warnings = [*_overlap_warnings(found), *_length_warnings(found, splits, tokenizer)]
    if found.validation.num_rows < FEW_VALIDATION_ROWS:
        warnings.append(
            f"only {found.validation.num_rows} validation rows: small differences between trials "
            f"will be chance. {FEW_VALIDATION_ROWS} or more are better."
        )
    if isinstance(splits.format, Format):
        warnings.extend(_text_warnings(found, splits.format, tokenizer))
    num_not_prefix = data.train_fit.num_not_prefix + data.validation_fit.num_not_prefix
    if num_not_prefix:
        warnings.append(
            f"{num_not_prefix} of {found.train.num_rows + found.validation.num_rows} prompts are "
            f"written otherwise by the chat template when their completion follows: the loss "
            f"counts from where the two part. Look at the samples."
        )
    warnings.extend(_class_warnings(found))
    for template in splits.format.templates:
        if _literal_newline(template):
            warnings.append(
                f"the template {template.source!r} has a backslash and an n, not a line break. In "
                f"YAML, only double quotes turn \\n into one."
            )
    return tuple(warnings)


def _text_warnings(found: Preflight, form: Format, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    warnings = []
    if tokenizer.eos_token_id is None:
        warnings.append(
            "the tokenizer has no end-of-text token: the model is not taught where to stop."
        )
    if form.prompt is None and "label" in found.unused_columns:
        warnings.append(
            "the column 'label' is not used, so the model does not learn to predict it. To train "
            "a classifier set data.label: label; to train a language model on it give prompt and "
            "completion."
        )
    return warnings


def _class_warnings(found: Preflight) -> list[str]:
    of_train, of_validation = found.train.class_counts, found.validation.class_counts
    largest = found.validation.largest_class
    if of_train is None or of_validation is None or largest is None:
        return []
    warnings = []
    absent = [name for name, count in of_train.items() if count == 0]
    if absent:
        warnings.append(
            f"no training row has the class {_first(absent)}: the classifier never says it. Number "
            f"the classes without gaps, or write names."
        )
    few = [
        name for name, count in of_validation.items()
        if count < FEW_OF_A_CLASS and name not in absent
    ]  # fmt: skip
    if few:
        warnings.append(
            f"fewer than {FEW_OF_A_CLASS} validation rows have the class {_first(few)}: how well "
            f"it is told apart is chance. Raise data.validation_rows or add such rows."
        )
    name, share = largest
    if share > LARGE_CLASS:
        warnings.append(
            f"{share:.1%} of the validation rows have the class {name!r}: a classifier that "
            f"always says so looks good. Compare macro-averaged F1 rather than accuracy."
        )
    return warnings


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


def _length_warnings(
    found: Preflight, splits: Splits, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    warnings = []
    whole_chats = isinstance(splits.format, ChatFormat) and splits.format.prompt is None
    why = "no token that counts comes within" if whole_chats else "their prompts alone fill"
    cost = (
        "Cut rows do not teach where to stop."
        if found.train.class_counts is None
        else "The rest is not read."
    )
    for name, split in (("training", found.train), ("validation", found.validation)):
        if split.num_dropped:
            warnings.append(
                f"{split.num_dropped} of {split.num_rows} {name} rows are dropped: {why} "
                f"data.max_length {found.max_length}."
            )
        if split.num_truncated:
            warnings.append(
                f"{split.num_truncated} of {split.num_rows} {name} rows are cut at data.max_length "
                f"{found.max_length}; the longest has {split.longest_length} tokens. {cost}"
            )
    used = min(found.max_length, max(found.train.longest_length, found.validation.longest_length))
    if used > tokenizer.model_max_length:
        warnings.append(
            f"sequences of up to {used} tokens are longer than the {tokenizer.model_max_length} "
            f"the tokenizer says its model can read. Lower data.max_length."
        )
    return warnings
