"""The step of a deep model from steps of shallow ones: layers repeat, so their events do.

A model of 32 equal layers is cut to 2, 3 and 4 of them, and each is traced. What one layer more
inserts into the stream of events, and where, is found from the first two; the third must then come
out exactly, or nothing is concluded. From there the same blocks are inserted until the depth is
reached. That is the very stream that the whole model gives, for a third of the time.

Layers are equal when they print alike and hold the same plain settings; models that alternate
between kinds of layers repeat in groups.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from rsauto.memory.recorder import Phase, StorageEvent, Tag

DEPTHS = (2, 3, 4)
"""Groups of layers in the models that are traced."""

WORTHWHILE = 3
"""Times as many layers as are traced in all, from which on cutting saves time."""

WINDOW = 64
"""Events that are looked at to tell the right insertion from others."""

Events = Sequence[StorageEvent]


class NotRepeatedError(RuntimeError):
    """The shallow models do not tell of a deep one."""


class Stack(NamedTuple):
    """The layers of a model that repeat."""

    layers: nn.ModuleList
    group: int
    """Layers after which they repeat."""

    @property
    def num_groups(self) -> int:
        return len(self.layers) // self.group


def repeated_layers(model: nn.Module) -> Stack | None:
    """The longest list of layers, if they repeat often enough to be worth cutting."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    longest = max(lists, key=len, default=None)
    if longest is None or sum(len(one) == len(longest) for one in lists) > 1:
        return None
    prints = [_print_of(layer) for layer in longest]
    for group in range(1, len(prints) // (WORTHWHILE * max(DEPTHS)) + 1):
        if len(prints) % group == 0 and prints == prints[:group] * (len(prints) // group):
            return Stack(longest, group)
    return None


def cut(stack: Stack, num_groups: int) -> None:
    """Leaves the first groups of layers, in place."""
    del stack.layers[num_groups * stack.group :]


def deepened(two: Events, three: Events, four: Events, num_groups: int) -> tuple[StorageEvent, ...]:
    """The events of `num_groups` groups of layers, from those of 2, 3 and 4 groups.

    Raises NotRepeatedError where the third does not follow from the first two.
    """
    at_two, at_three, at_four = (_tokens(events) for events in (two, three, four))
    if _grown(at_two, at_three, 1) != at_four:
        raise NotRepeatedError("four groups of layers do not follow from two and three")
    return tuple(_numbered(_grown(at_three, at_four, num_groups - 4)))


def _print_of(layer: nn.Module) -> tuple[Any, ...]:
    """What makes a layer behave as it does, but for its number."""
    settings = tuple(
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, (bool, int, float, str, type(None), list, tuple))
        and not _is_number_of(key)
    )
    tensors = (*layer.named_parameters(), *layer.named_buffers())
    shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors)
    return re.sub(r"layer_idx=\d+", "", repr(layer)), settings, shapes


def _is_number_of(key: str) -> bool:
    return key in ("layer_idx", "layer_id", "layer_index", "layer_number", "idx", "block_idx")


class _Token(NamedTuple):
    """What an event does."""

    nbytes: int
    phase: Phase
    operation: str
    tag: Tag
    origin: tuple[str, str]
    """Phase and operation of the allocation, which for a free are others."""


Tokens = list[_Token]


def _tokens(events: Events) -> Tokens:
    origins: dict[int, tuple[str, str]] = {}
    tokens = []
    for event in events:
        origin = origins.setdefault(event.storage, (event.phase, event.operation))
        tokens.append(_Token(event.nbytes, event.phase, event.operation, event.tag, origin))
    return tokens


def _numbered(tokens: Tokens) -> Iterator[StorageEvent]:
    """Events again. What is freed is the last that was allocated like it and is still there."""
    alive: dict[tuple[int, Tag, tuple[str, str]], list[int]] = defaultdict(list)
    num_storages = 0
    for token in tokens:
        storages = alive[abs(token.nbytes), token.tag, token.origin]
        if token.nbytes >= 0:
            storages.append(num_storages)
            num_storages += 1
        elif not storages:
            raise NotRepeatedError(f"{token} frees what was not allocated")
        number = storages[-1] if token.nbytes >= 0 else storages.pop()
        yield StorageEvent(number, token.nbytes, token.tag, token.phase, token.operation)


def _grown(short: Tokens, long: Tokens, more: int) -> Tokens:
    """`long` with `more` groups more, as it has one more than `short`.

    What is inserted is repeated; sizes outside of it may grow by as much with every group.
    """
    grown: Tokens = []
    at_short = at_long = 0
    for start, length in (*_insertions(short, long), (len(long), 0)):
        between = long[at_long:start]
        for one, other in zip(short[at_short:], between, strict=False):
            grown.append(other._replace(nbytes=other.nbytes + more * (other.nbytes - one.nbytes)))
        grown += long[start : start + length] * (more + 1)
        at_short += len(between)
        at_long = start + length
    return grown


def _insertions(short: Tokens, long: Tokens) -> Iterator[tuple[int, int]]:
    """(start, length) of each block that `long` has and `short` lacks."""
    i = j = 0
    while i < len(short) or j < len(long):
        both = i < len(short) and j < len(long)
        if both and short[i] == long[j]:
            i, j = i + 1, j + 1
        elif length := _inserted(short, long, i, j):
            yield j, length
            j += length
        elif both and _bare(short[i]) == _bare(long[j]):
            i, j = i + 1, j + 1
        else:
            raise NotRepeatedError(f"event {j} of the deeper model has no counterpart")


def _inserted(short: Tokens, long: Tokens, i: int, j: int) -> int:
    """Length of the block that `long` has at j, once more than `short` at i; 0 if there is none.

    Most repeat the block before; of those that do, and else of all, it is the one after which the
    two streams agree longest, but for sizes if need be.
    """
    lengths = range(1, min(len(long) - j, len(long) - len(short)) + 1)
    repeating = [n for n in lengths if n <= j and long[j : j + n] == long[j - n : j]]
    rest = short[i : i + WINDOW]
    views: tuple[Callable[[_Token], _Token], ...] = (lambda token: token, _bare)
    for candidates, seen_as in itertools.product((repeating, lengths), views):
        wanted = [seen_as(token) for token in rest]
        agreeing = {
            n: _num_equal(wanted, map(seen_as, long[j + n : j + n + WINDOW])) for n in candidates
        }
        best = max(agreeing, key=agreeing.__getitem__, default=0)
        if best and (agreeing[best] or not rest):
            return best
    return 0


def _num_equal(one: Iterable[_Token], other: Iterable[_Token]) -> int:
    """How many tokens agree from the start on."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _ in pairs)


def _bare(token: _Token) -> _Token:
    """But for its size."""
    return token._replace(nbytes=1 if token.nbytes >= 0 else -1)
