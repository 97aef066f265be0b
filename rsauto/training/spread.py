"""One trial on several devices: the same command runs in several processes, each with its own.

The first process runs the study; what it trains, all train in lockstep, each on its share of every
batch. Gradients are summed before anything is made of them, so the adapters stay equal, and every
number is that of one process up to rounding. One process is `ALONE`, for which nothing here costs
anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, distributed, nn

from rsauto.errors import InputError, RsautoError, StudyInterrupted
from rsauto.launched import num_processes
from rsauto.training.out_of_memory import is_out_of_memory

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others. A dead one is noticed at once; this is for one that
hangs. The first may be away as long between two trials, to write a report for instance."""

BUCKET_BYTES = 2**22
"""Gradients that are summed in one message, and so the memory that it takes."""

T = TypeVar("T")


class ProcessLost(StudyInterrupted):
    """The processes of a study no longer work together."""


class ElsewhereError(RuntimeError):
    """An error that another process met."""


class _Failure(NamedTuple):
    """An error as it is told to others: some of them cannot be pickled."""

    rank: int
    words: str
    is_memory: bool
    is_input: bool

    @classmethod
    def of(cls, error: Exception, rank: int) -> _Failure:
        words = str(error).split("\n")[0]
        if not isinstance(error, RsautoError):
            words = f"{type(error).__name__}: {words}"
        return cls(rank, words, is_out_of_memory(error), isinstance(error, InputError))

    def error(self) -> Exception:
        words = f"{self.words} (in process {self.rank})"
        if self.is_memory:
            return torch.OutOfMemoryError(words)
        return InputError(words) if self.is_input else ElsewhereError(words)


class Link:
    """What the processes say to each other.

    Over gloo, also between GPUs: the connection to a process that dies is closed, which is noticed
    at once, while NCCL waits.
    """

    def __init__(self) -> None:
        self._group: Any = distributed.new_group(backend="gloo", timeout=TIMEOUT)
        self.lost = ""
        """Why nothing can be said any more."""

    def gather(self, value: T) -> list[T]:
        """What every process has, in their order."""
        found: list[Any] = [None] * distributed.get_world_size()
        with self.kept():
            distributed.all_gather_object(found, value, group=self._group)
        return found

    def broadcast(self, value: T) -> T:
        """What the first process has."""
        box: list[Any] = [value]
        with self.kept():
            distributed.broadcast_object_list(box, src=0, group=self._group)
        said: T = box[0]
        return said

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Around a message: where it fails nobody knows any longer where the others are.

        Raises ProcessLost then, and from then on.
        """
        if self.lost:
            raise ProcessLost(self.lost)
        self.lost = "interrupted in the middle of a message"
        try:
            yield
        except Exception as error:
            self.break_off(error)
        self.lost = ""

    def break_off(self, error: Exception) -> None:
        """Raises ProcessLost, now and at every later message."""
        words = _Failure.of(error, 0).words.split(". ")[0]
        self.lost = (
            "The processes that train together have lost each other; what another one says may "
            f"tell why ({words}). Settled trials are safe; the same command continues."
        )
        raise ProcessLost(self.lost) from None


@dataclass(frozen=True, slots=True)
class Spread:
    """The processes that train one trial together, as one of them sees them."""

    rank: int = 0
    """Of this process."""
    size: int = 1
    """How many there are."""
    shards_base: bool = False
    """Whether each holds only a part of the base's weights, see `rsauto.sharding`."""
    link: Link | None = None
    """None where there is one process."""

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of what is shared out in turn: sorted by length, all get alike."""
        return items[self.rank :: self.size]

    def together(self, work: Callable[[], T], *, in_step: bool = False) -> list[T]:
        """Does ``work`` in every process; what each made of it, which must be small and plain.

        An error in one is raised in all of them. ``in_step`` says that the work itself needs the
        others where the base is sharded: then nobody can be told, and an error there ends the run.
        """
        if self.link is None:
            return [work()]
        value: T | None = None
        error: Exception | None = None
        try:
            value = work()
        except Exception as raised:
            if in_step and self.shards_base:
                self._leave(raised)
            error = raised
        failure = None if error is None else _Failure.of(error, self.rank)
        found = self.link.gather((value, failure))
        if error is not None:
            raise error
        for _, elsewhere in found:
            if elsewhere is not None:
                raise elsewhere.error()
        return [one for one, _ in found]  # type: ignore[misc]

    def _leave(self, error: Exception) -> None:
        """Raises out of memory as it is, so that it is written down; other errors as lost."""
        assert self.link is not None
        try:
            self.link.break_off(error)
        except ProcessLost:
            if is_out_of_memory(error):
                raise error from None
            raise

    def tell(self, order: object) -> None:
        """What all are to do next, or None when they are done. Only the first process tells."""
        if self.link is not None and self.rank == 0:
            self.link.broadcast(order)

    def hear(self) -> object:
        """What the first process tells, in every other one."""
        assert self.link is not None and self.rank > 0
        return self.link.broadcast(None)

    def goes_on(self, wish: bool) -> bool:
        """Whether the first process wants to go on."""
        return wish if self.link is None else self.link.broadcast(wish)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replaces every gradient by its sum over the processes, the same to the bit in all."""
        if self.link is None:
            return
        absent = self.link.gather({n for n, p in enumerate(parameters) if p.grad is None})
        with self.link.kept():
            # What no row anywhere has used keeps no gradient; it takes no part in norms and steps.
            for number in absent[self.rank].difference(absent[0].intersection(*absent)):
                parameters[number].grad = torch.zeros_like(parameters[number])
            for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
                _sum_in_place(bucket)


ALONE = Spread()
"""One process."""


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype that fill a message; what is larger stands alone."""
    bucket: list[Tensor] = []
    num_bytes = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or num_bytes + tensor.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, num_bytes = [], 0
        bucket.append(tensor)
        num_bytes += tensor.nbytes
    if bucket:
        yield bucket


def _sum_in_place(tensors: list[Tensor]) -> None:
    if len(tensors) == 1 and tensors[0].is_contiguous():
        distributed.all_reduce(tensors[0])
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])


def join() -> Spread:
    """Meets the processes that a launcher started with this one; `ALONE` where there are none.

    Raises InputError for what accelerate was asked for and does not exist here.
    """
    if num_processes() == 1:
        return ALONE
    _require_supported()
    if parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available():
        PartialState(cpu=True, backend="gloo", timeout=TIMEOUT)
    else:
        PartialState(timeout=TIMEOUT)
    # Else transformers leaves the weights of all but the first process empty, for accelerate's own
    # preparation to fill in.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return Spread(
        rank=distributed.get_rank(),
        size=distributed.get_world_size(),
        shards_base=parse_flag_from_env("ACCELERATE_USE_FSDP"),
        link=Link(),
    )


_UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "FSDP_OFFLOAD_PARAMS": "offloading of FSDP's parameters to the CPU",
}
"""What accelerate's launcher sets, and what it is."""


def _require_supported() -> None:
    for variable, name in _UNSUPPORTED.items():
        if parse_flag_from_env(variable):
            raise InputError(
                f"accelerate: {name} is asked for, and a trial is spread by data parallelism or "
                "FSDP alone. Launch with --multi_gpu or --use_fsdp."
            )
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available() and local_rank >= torch.cuda.device_count():
        raise InputError(
            f"accelerate: process {local_rank} of this machine has no GPU of its own, there are "
            f"{torch.cuda.device_count()}. Launch at most as many processes."
        )
