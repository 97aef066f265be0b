"""Out of memory, in the words of whichever allocator."""

from __future__ import annotations

import torch
from accelerate.utils.memory import should_reduce_batch_size

_WORDS = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)
"""Of allocations that do not go through torch's allocators, on which accelerate is silent."""

NO_ROOM = (RuntimeError, MemoryError)
"""What allocators raise, torch's and Python's own; what else is among them `told` raises."""


class OutOfMemory(MemoryError):
    """The device had no room for the trial; the trial's memory has been given back."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device, or on a CPU the host, had no room."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    is_told = isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
    return is_told or bool(should_reduce_batch_size(error))


def told(error: Exception) -> OutOfMemory:
    """Its first line only: whoever keeps it keeps nothing of the step alive, nor a driver's
    traceback. Raises it as it is where it is another error."""
    if not is_out_of_memory(error):
        raise error
    return OutOfMemory(str(error).split("\n")[0] or "the host's memory is full")
