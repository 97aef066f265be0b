"""The embedded default: a small pre-trained model and a generated task, usable without a network.

`pretrain` makes the model (`MODEL_DIR`), `task` generates the fine-tuning data. Importing this
package loads neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rsauto.embedded.task import SPLITS, TASK_VERSION, Row, Split, load_split

__all__ = [
    "MODEL_DIR",
    "SPLITS",
    "TASK_VERSION",
    "Row",
    "Split",
    "load_split",
    "provenance",
    "verify",
]

MODEL_DIR: Path = Path(__file__).parent / "model"
"""Folder for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`."""

_PROVENANCE_PATH = MODEL_DIR / "PROVENANCE.json"


def provenance() -> dict[str, Any]:
    """How the model was made: data, its licence, settings, losses, and the hash of every file."""
    record: dict[str, Any] = json.loads(_PROVENANCE_PATH.read_text(encoding="utf-8"))
    return record


def verify(folder: Path = MODEL_DIR) -> None:
    """Compare every file of `folder` with the SHA-256 that the provenance record gives for it.

    Raises ValueError naming the first file that is missing or differs.
    """
    for name, expected in provenance()["sha256"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"Embedded model: {name} is missing in {folder}. Reinstall rsauto.")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(
                f"Embedded model: {name} has SHA-256 {found}, but PROVENANCE.json says {expected}. "
                f"Reinstall rsauto, or rerun rsauto.embedded.pretrain if you changed it on purpose."
            )
