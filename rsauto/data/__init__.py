"""Training data: rows, templates, tokens and masks, batches, and a look at all of it beforehand.

In the order of their use:

    splits = load_rows(config)                       text, train and validation
    data = tokenise(splits, config, tokenizer)       token ids and which of them count
    found = preflight(splits, data, config, tokenizer)
    plan = batch_plan(len(data.train), batch_size, steps, seed)
    batch = collate([data.train[i] for i in plan[0]], data.pad_token_id)
"""

from __future__ import annotations

from rsauto.data.batches import Batch, collate, evaluation_batches, padded_tokens
from rsauto.data.chat import ChatFormat
from rsauto.data.general import general_examples
from rsauto.data.labels import LabelFormat
from rsauto.data.load import Splits, load_rows, splits_from_objects
from rsauto.data.order import batch_plan, micro_batches
from rsauto.data.overview import Preflight, SplitSummary, lines, preflight
from rsauto.data.rows import Row
from rsauto.data.samples import Segment
from rsauto.data.template import Format
from rsauto.data.tokens import (
    Example,
    Fit,
    TokenisedData,
    fingerprint,
    tokenise,
    without_token_types,
)

__all__ = [
    "Batch",
    "ChatFormat",
    "Example",
    "Fit",
    "Format",
    "LabelFormat",
    "Preflight",
    "Row",
    "Segment",
    "SplitSummary",
    "Splits",
    "TokenisedData",
    "batch_plan",
    "collate",
    "evaluation_batches",
    "fingerprint",
    "general_examples",
    "lines",
    "load_rows",
    "micro_batches",
    "padded_tokens",
    "preflight",
    "splits_from_objects",
    "tokenise",
    "without_token_types",
]
