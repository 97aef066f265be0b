"""Safetensors files that know the checksum of what they hold, so that damage to a weight shows.

Safetensors itself notices a damaged header and a file that was cut off. A flipped bit in a weight
is a weight like any other; whoever loads such an adapter would never learn of it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

_METADATA = "__metadata__"
_CHECKSUM = "sha256"


def sealed(tensors: dict[str, Tensor]) -> bytes:
    """Tensors as a safetensors file; the same ones give the same bytes."""
    header, content = _parts(save(tensors))
    header[_METADATA] = {"format": "pt", _CHECKSUM: _checksum(header, content)}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content


def load_sealed(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, as they were written; one without a checksum is taken as it is.

    Raises ValueError where they are not, OSError and SafetensorError as safetensors does.
    """
    data = path.read_bytes()
    tensors = load(data)  # which checks that it is safetensors
    header, content = _parts(data)
    written = (header.get(_METADATA) or {}).get(_CHECKSUM)
    if written is not None and written != _checksum(header, content):
        raise ValueError(
            f"{path.name} was damaged: its content does not have the checksum it was written with"
        )
    return tensors


def _parts(data: bytes) -> tuple[dict[str, dict[str, str]], bytes]:
    """The header of a safetensors file, and the tensors' bytes behind it."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def _checksum(header: dict[str, dict[str, str]], content: bytes) -> str:
    described = {name: entry for name, entry in header.items() if name != _METADATA}
    found = hashlib.sha256(json.dumps(described, sort_keys=True).encode("utf-8"))
    found.update(content)
    return found.hexdigest()
