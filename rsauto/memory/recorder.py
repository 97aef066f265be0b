"""Watches every storage that PyTorch operations allocate and free, on fake or on real tensors.

A dispatch mode sees the result of every operation; a weak reference on each new storage tells when
it is freed. It cannot see scratch that a kernel allocates and frees inside itself; the one kind
that is large, casts of mixed dtypes on the CPU, is added by rule.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Tag = Literal["weights", "adapters", "gradients", "optimizer", "activations", "logits_and_loss"]
"""What memory is for. "optimizer" is its states and what its step allocates, "gradients" those of
the adapters, "logits_and_loss" every tensor as large as the logits, "activations" the rest."""

Phase = Literal["forward", "backward", "optimizer", "evaluation"]


class StorageEvent(NamedTuple):
    """A storage appears (nbytes > 0) or is freed (nbytes < 0)."""

    storage: int
    """Number of the storage, in order of appearance."""
    nbytes: int
    """As asked for; allocators round it up."""
    tag: Tag
    phase: Phase
    operation: str = ""
    """The operation that allocated it, such as aten.mm; empty for a free and what was there."""


class StorageRecorder(TorchDispatchMode):
    """Turns the operations that run under it into a stream of storage events."""

    def __init__(self, device_type: str, is_padded: bool = False) -> None:
        """`device_type` is where the step will run, "cpu" or "cuda"; not where it is recorded.

        `is_padded` is what fake masks, which have no values, are taken for: a real one tells.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase: Phase = "forward"
        self._on_cuda = device_type == "cuda"
        self._is_padded = is_padded
        self._num_logits = 0
        self._tags: list[Tag] = []
        self._stream: list[tuple[int, int, Phase, str]] = []
        self._watched: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], FakeTensor):
            if func is torch.ops.prim.device.default:
                return args[0].fake_device  # most of the calls; the long way returns the same
            if func is torch.ops.aten._local_scalar_dense.default:
                return self._stand_in_value(args[0].dtype)
        casts = _cast_bytes(func, args) if not self._on_cuda and _is_pointwise(func) else []
        scratch = [self._appear(nbytes, "activations", func) for nbytes in casts]
        out = self._run(func, args, kwargs or {})
        if isinstance(out, Tensor):
            self._see(out, func)
        else:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._see(leaf, func)
        for number, nbytes in zip(scratch, casts, strict=True):
            self._stream.append((number, -nbytes, self.phase, ""))
        return out

    def assign(self, tag: Tag, tensors: Iterable[Tensor]) -> None:
        """Tags the storages of `tensors`, from their allocation on; watches them if they are new.

        Tags belong to storages, not to moments: a gradient is a gradient from the moment that
        backward allocates it, although only later code knows that it became one.
        """
        for tensor in tensors:
            self._tags[self._see(tensor)] = tag

    def expect_logits(self, num_logits: int) -> None:
        """From now on, tensors of `num_logits` elements are tagged as logits and loss."""
        self._num_logits = num_logits

    def finish(self) -> tuple[StorageEvent, ...]:
        """The events, ended here: what is freed later is not part of the step.

        Between two allocations, frees are put in the order of the storages' numbers. The order
        does not matter to the bytes, and dictionaries of weak references may free in any.
        """
        self._watched.clear()
        ordered: list[tuple[int, int, Phase, str]] = []
        frees: list[tuple[int, int, Phase, str]] = []
        for entry in self._stream:
            if entry[1] < 0:
                frees.append(entry)
                continue
            ordered += sorted(frees)
            frees.clear()
            ordered.append(entry)
        ordered += sorted(frees)
        return tuple(
            StorageEvent(number, nbytes, self._tags[number], phase, operation)
            for number, nbytes, phase, operation in ordered
        )

    def _see(self, tensor: Tensor, func: Any = None) -> int:
        """The number of the tensor's storage, a new one if it was not seen before."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._watched:
            return self._watched[key][0]
        nbytes = storage.nbytes()
        number = self._appear(nbytes, self._first_tag(tensor), func)

        def freed(_: object) -> None:
            del self._watched[key]
            self._stream.append((number, -nbytes, self.phase, ""))

        self._watched[key] = (number, weakref.ref(storage, freed))
        return number

    def _appear(self, nbytes: int, tag: Tag, func: Any) -> int:
        """The number of a storage that is new."""
        self._tags.append(tag)
        number = len(self._tags) - 1
        self._stream.append((number, nbytes, self.phase, _name(func)))
        return number

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operation, corrected where a fake one differs from the kernel that it stands for."""
        if func is _LAYER_NORM and isinstance(args[0], FakeTensor):
            out, *statistics = func(*args, **kwargs)
            mixed = args[2] is not None and args[2].dtype != args[0].dtype
            if self._on_cuda or mixed:  # kept in float32 there
                statistics = [s.to(torch.promote_types(s.dtype, torch.float32)) for s in statistics]
            return out, *statistics
        if func is _GROUPED_MM and isinstance(args[0], FakeTensor):
            # Kernels take every dtype, their stand-in only one.
            halves = [t.to(torch.bfloat16) for t in args[:2]]
            return func(*halves, *args[2:], **kwargs).to(args[0].dtype)
        return func(*args, **kwargs)

    def _stand_in_value(self, dtype: torch.dtype) -> bool | int | float:
        """What a fake tensor answers to .item(): it has no value, and 1 serves for a step counter.

        A model asks one question of its batch: "is the mask all ones?".
        """
        if dtype == torch.bool:
            return not self._is_padded
        return 1.0 if dtype.is_floating_point else 1

    def _first_tag(self, tensor: Tensor) -> Tag:
        if self.phase == "optimizer":
            return "optimizer"
        return "logits_and_loss" if tensor.numel() == self._num_logits else "activations"


_LAYER_NORM = torch.ops.aten.native_layer_norm.default
_GROUPED_MM = torch.ops.aten._grouped_mm.default


@functools.cache
def _name(func: Any) -> str:
    return "" if func is None else str(func).rpartition(".")[0]


@functools.cache
def _is_pointwise(func: Any) -> bool:
    return torch.Tag.pointwise in func.tags


def _cast_bytes(func: Any, operands: Sequence[Any]) -> list[int]:
    """Bytes of each cast that a pointwise CPU kernel makes while it runs on several dtypes.

    TensorIterator copies operands to the common dtype on the CPU, an operand that is also the
    result once for each; CUDA kernels cast as they load.
    """
    floats = [t for t in operands if isinstance(t, Tensor) and t.is_floating_point()]
    if len({t.dtype for t in floats}) < 2:
        return []
    common = functools.reduce(torch.promote_types, (t.dtype for t in floats))
    if func._schema.name.endswith("_"):
        floats.append(operands[0])
    return [t.numel() * common.itemsize for t in floats if t.dtype != common]
