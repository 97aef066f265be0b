"""Several trials' tensors in one buffer a group: row k is trial k, a factor is a strided view.

Ranks are padded to the largest of the stack with zeros, which stay zero for ever: where a row of A
and the column of B beside it are zero, so are both their gradients, and the steps of SGD and AdamW
of a zero with a zero gradient are zero.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rsauto.adapters.optimizers import GROUP_NAMES, GroupName
from rsauto.packing.tensors import HOST, Key, TrialTensors, group_of

Shape = tuple[int, ...]

IMPORTANCE = ("sensitivity", "uncertainty")
"""Fields of AdaLoRA, see `rsauto.adalora.importance`."""


class Run(NamedTuple):
    """Tensors of one shape that lie side by side in every row of a group's buffers."""

    begin: int
    keys: tuple[Key, ...]
    shape: Shape

    @property
    def end(self) -> int:
        return self.begin + len(self.keys) * math.prod(self.shape)


class Group:
    """The tensors of one group of the optimizer, of every trial of a stack: buffers (K, P)."""

    def __init__(self, shapes: Mapping[Key, Shape]) -> None:
        # Equal shapes lie together, so that one operation does for all of them.
        self.runs: list[Run] = []
        self._begins: dict[Key, int] = {}
        for shape in dict.fromkeys(shapes.values()):
            keys = tuple(key for key in shapes if shapes[key] == shape)
            run = Run(self.width, keys, shape)
            self.runs.append(run)
            for place, key in enumerate(keys):
                self._begins[key] = run.begin + place * math.prod(shape)
        self.shapes = dict(shapes)
        self.buffers: dict[str, Tensor] = {}

    @property
    def width(self) -> int:
        """Numbers in a row, P."""
        return self.runs[-1].end if self.runs else 0

    @property
    def values(self) -> Tensor:
        return self.buffers["values"]

    @property
    def gradients(self) -> Tensor:
        return self.buffers["gradients"]

    def view(self, field: str, key: Key) -> Tensor:
        """One tensor of all trials, (K, *shape)."""
        buffer, begin, shape = self.buffers[field], self._begins[key], self.shapes[key]
        return buffer[:, begin : begin + math.prod(shape)].view(len(buffer), *shape)

    def begin(self, key: Key) -> int:
        """Where a tensor begins in every row."""
        return self._begins[key]

    def run(self, buffer: Tensor, run: Run) -> Tensor:
        """The tensors of a run in a buffer of this group's widths, (K, n, *shape)."""
        return buffer[:, run.begin : run.end].view(len(buffer), len(run.keys), *run.shape)

    def gradient_norms(self) -> Tensor:
        """Frobenius norm of the gradient of every tensor, (K, number of tensors)."""
        wide = at_least_float32(self.gradients.dtype)
        found = [
            torch.linalg.vector_norm(self.run(self.gradients, run).flatten(2), dim=2, dtype=wide)
            for run in self.runs
        ]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    @torch.no_grad()
    def fill(self, field: str, tables: Sequence[Mapping[Key, Tensor]], like: Tensor) -> None:
        """A new buffer of a field with every trial's tensors, zero where a trial has none."""
        self.buffers[field] = torch.zeros(
            len(tables), self.width, dtype=like.dtype, device=like.device
        )
        for key in self.shapes:
            view = self.view(field, key)
            for row, table in zip(view, tables, strict=True):
                if key in table:
                    _corner(row, table[key].shape).copy_(table[key])


class Stack:
    """The trials of a pack that are padded to the same ranks."""

    def __init__(
        self,
        trials: Sequence[TrialTensors],
        fields: Mapping[str, Collection[GroupName]],
        device: torch.device,
    ) -> None:
        """Copies the trials' tensors.

        ``fields`` are kept beside values and gradients, each of some groups; a trial that does not
        have one yet begins it at zero.
        """
        self.fields = {"values": GROUP_NAMES, **fields}
        self.device = device
        self.size = len(trials)
        self.modules = tuple(dict.fromkeys(name for trial in trials for name in trial.gamma))
        self.gamma = [dict(trial.gamma) for trial in trials]
        self.shapes = [{key: t.shape for key, t in trial.values.items()} for trial in trials]
        shapes = _padded(self.shapes)
        self.groups: dict[GroupName, Group] = {}
        likes: dict[GroupName, Tensor] = {}
        for name in GROUP_NAMES:
            inside = {key: shape for key, shape in shapes.items() if group_of(key) == name}
            if inside:
                self.groups[name] = Group(inside)
                likes[name] = _first(trials, next(iter(inside))).new_empty(0, device=device)
        for field, names in self.fields.items():
            tables = [trial.fields.get(field, {}) for trial in trials]
            for name in self.groups.keys() & names:
                self.groups[name].fill(field, tables, _in(field, likes[name]))
        for name, group in self.groups.items():
            group.fill("gradients", [{} for _ in trials], likes[name])
        self.scale = {name: self._scale(name) for name in self.modules}

    def view(self, field: str, key: Key) -> Tensor:
        """One tensor of all trials, (K, *padded shape)."""
        return self.groups[group_of(key)].view(field, key)

    def row(self, row: int) -> dict[str, dict[Key, Tensor]]:
        """Copies of one trial's tensors on the host, by field and without their pads."""
        return {
            field: {
                key: _corner(self.view(field, key)[row], shape).to(HOST, copy=True)
                for key, shape in self.shapes[row].items()
                if group_of(key) in groups
            }
            for field, groups in self.fields.items()
        }

    def set_gamma(self, row: int, gamma: Mapping[str, float]) -> None:
        """Other factors gamma_r for one trial."""
        self.gamma[row] = dict(gamma)
        for name, value in gamma.items():
            self.scale[name][row] = value

    def zero_gradients(self) -> None:
        for group in self.groups.values():
            group.gradients.zero_()

    def _scale(self, module: str) -> Tensor:
        """gamma_r of every trial in one layer, (K, 1, 1), not rounded to half precision."""
        wide = at_least_float32(self.groups["A"].values.dtype)
        values = [gamma.get(module, 0.0) for gamma in self.gamma]
        return torch.tensor(values, dtype=wide, device=self.device).view(-1, 1, 1)


def _padded(shapes: Sequence[Mapping[Key, Shape]]) -> dict[Key, Shape]:
    """The shape that holds a tensor of every trial, in the order of the model."""
    keys = dict.fromkeys(key for table in shapes for key in table)
    return {
        key: tuple(map(max, zip(*(t[key] for t in shapes if key in t), strict=True)))
        for key in keys
    }


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Factors of a trial alone are numbers of Python, which no operation rounds to bfloat16."""
    return torch.promote_types(dtype, torch.float32)


def _in(field: str, like: Tensor) -> Tensor:
    """Importance is gathered in float32, whatever the factors are in."""
    return like.float() if field in IMPORTANCE else like


def _first(trials: Sequence[TrialTensors], key: Key) -> Tensor:
    return next(trial.values[key] for trial in trials if key in trial.values)


def _corner(tensor: Tensor, shape: Shape) -> Tensor:
    """The first entries of every dimension."""
    return tensor[tuple(slice(0, size) for size in shape)]
