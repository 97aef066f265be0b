"""Asking a running study to stop. Imports nothing, so that signals are heard from the start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StopFlag:
    """Set from outside, by a signal handler for instance, to end a study cleanly."""

    requested: bool = False
