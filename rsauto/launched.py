"""Whether a launcher (`accelerate launch`, `torchrun`) started this process beside others.

Standard library only, so that a command knows before it imports anything heavy.
"""

from __future__ import annotations

import os


def num_processes() -> int:
    """Processes that were started together, 1 without a launcher."""
    # A cluster may set WORLD_SIZE for whatever runs on it; LOCAL_RANK comes from a launcher.
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def is_follower() -> bool:
    """Whether another one of them, the first, runs the study."""
    return num_processes() > 1 and int(os.environ.get("RANK", 0)) > 0
