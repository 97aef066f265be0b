"""A text that is not trained on: the rise of the loss on it is what fine-tuning makes forget.

`english` and `code` come with the package, about 9 kB each and written for it, so that no model
has seen them before and a study needs no network for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rsauto.data.encoding import Example
from rsauto.data.files import missing
from rsauto.data.tokens import special_tokens
from rsauto.errors import InputError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERAL_TEXTS = ("english", "code")
"""Texts in the package, by the name that data.forgetting calls them."""

LARGEST_TEXT_BYTES = 10 * 10**6
"""Evaluation reads the whole text each time; more of it would take longer than training does."""

FEWEST_TOKENS = 2
"""A shorter last sequence is left out: without a prefix its loss would have nothing to count."""

_FOLDER = Path(__file__).parents[1] / "embedded" / "general"


def general_examples(
    name: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Example, ...]:
    """The text in consecutive sequences of at most `max_length` tokens, all of which count.

    `name` is 'english', 'code' or the path of a UTF-8 text file. The text is tokenised whole and
    then cut; each sequence starts with the tokenizer's prefix, if it has one.

    Raises InputError when the file is missing, empty, larger than 10 MB or not UTF-8, or when
    `max_length` or the text has no room for two tokens.
    """
    prefix, _ = special_tokens(tokenizer)
    stride = max_length - len(prefix)
    if stride < FEWEST_TOKENS:
        raise InputError(
            f"data.max_length: {max_length} leaves no two tokens of a text to measure forgetting "
            f"on. Set it to at least {len(prefix) + FEWEST_TOKENS}."
        )
    encoded = tokenizer(general_text(name), add_special_tokens=False, verbose=False)
    ids = tuple(encoded["input_ids"])
    pieces = [ids[start : start + stride] for start in range(0, len(ids), stride)]
    kept = [piece for piece in pieces if len(piece) >= FEWEST_TOKENS]
    if not kept:
        raise InputError(
            f"data.forgetting: {name!r} has {len(ids)} tokens, too few to measure a loss on. "
            f"Give a longer text, {' or '.join(GENERAL_TEXTS)}."
        )
    return tuple(Example(prefix + piece, len(prefix)) for piece in kept)


def general_text(name: str) -> str:
    """The text itself. Raises InputError as `general_examples` does for a file."""
    if name in GENERAL_TEXTS:
        return (_FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    path = Path(name).expanduser()
    try:
        text = _read(path, name)
    except OSError as error:
        raise InputError(
            f"data.forgetting: {name!r} cannot be read: {error.strerror}. {_allowed(name)}"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"data.forgetting: {name!r} is not UTF-8 at byte {error.start}. Save it as UTF-8."
        ) from None
    if not text.strip():
        raise InputError(f"data.forgetting: {name!r} is empty. {_allowed(name)}")
    return text


def _read(path: Path, name: str) -> str:
    if not path.exists():
        raise InputError(f"{missing('data.forgetting', path)} {_allowed(name)}")
    num_bytes = path.stat().st_size
    if num_bytes > LARGEST_TEXT_BYTES:
        raise InputError(
            f"data.forgetting: {name!r} has {num_bytes / 1e6:.1f} MB, and at most "
            f"{LARGEST_TEXT_BYTES / 1e6:.0f} MB are read. Give a part of it."
        )
    return path.read_text(encoding="utf-8-sig")


def _allowed(name: str) -> str:
    return f"Give english, code, or a text file.{nearest(name, GENERAL_TEXTS)}"
