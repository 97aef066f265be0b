"""Python's garbage collection, paused where it only costs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """Nothing is collected within it.

    Importing the large libraries makes millions of objects that stay, and is a quarter faster; and
    what a trace watches must be freed by its last reference, not at a random moment.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
