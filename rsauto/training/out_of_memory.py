"""Out of memory, in the words of whichever allocator."""

from __future__ import annotations

import torch
from accelerate.utils.memory import should_reduce_batch_size


class OutOfMemory(MemoryError):
    """The device had no room for the trial; the trial's memory has been given back."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device had no room."""
    return isinstance(error, torch.OutOfMemoryError) or bool(should_reduce_batch_size(error))
