"""Profiles and predictions, each made once: kept in memory, and on disk for the next process.

The folder is $RSAUTO_CACHE_DIR, or rsauto in the user's cache folder. A kind of step has a folder
of its own there, named by a hash of everything that changes its bytes: the kind, the versions of
the libraries, and the code that traces. Whatever is broken or missing is simply made again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from rsauto.atomic import write_bytes
from rsauto.garbage import collection_paused
from rsauto.memory.estimate import EstimatedProfile
from rsauto.memory.kinds import Prediction, StepKind, StepSize
from rsauto.memory.profile import OtherOperationsError, StepProfile, profile_from, second_sizes

LIBRARIES = ("torch", "transformers", "peft")
TRACING_CODE = (
    "memory", "adalora", "adapters", "packing", "training", "base.py", "architecture.py",
    "quantisation.py",
)  # fmt: skip

KEPT_KINDS = 256
"""Folders kept on disk, the ones written last."""

PREDICTIONS, ESTIMATE = "predictions.json", "estimate.json"
"""Files in the folder of a kind; its traced profiles are beside them."""

FIRST_RANK = 8
"""Any would do; this one meets no dimension of a usual model."""

_BROKEN = (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile)


def cache_folder() -> Path:
    """Where profiles are kept between processes."""
    chosen = os.environ.get("RSAUTO_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rsauto"


def _nothing(_kind: StepKind, _size: StepSize) -> None:
    pass


class Profiles:
    """Every kind of step that was asked for so far."""

    def __init__(
        self, folder: Path | None = None, on_trace: Callable[[StepKind, StepSize], None] = _nothing
    ) -> None:
        """`folder` is where they are kept; None keeps them in memory only. `on_trace` is told of
        every step before it is traced, which takes seconds."""
        self._folder = folder
        self._on_trace = on_trace
        self._known: dict[StepKind, list[StepProfile | EstimatedProfile]] = {}
        self._predictions: dict[StepKind, dict[StepSize, Prediction]] = {}

    @classmethod
    def on_disk(cls, on_trace: Callable[[StepKind, StepSize], None] = _nothing) -> Profiles:
        return cls(cache_folder() / "plans", on_trace)

    def predict(self, kind: StepKind, size: StepSize) -> Prediction:
        """The peak of `kind` at `size`, what makes it, and what must be reserved for it.

        Raises InputError where the model cannot be built or adapted.
        """
        if kind not in self._predictions:
            self._predictions[kind] = self._read_predictions(kind)
        found = self._predictions[kind]
        if size not in found:
            profile = self.of(kind, size)
            prediction = profile.predict(size, kind.device_type)
            if not profile.is_lasting:
                return prediction
            found[size] = prediction
            self._write_predictions(kind)
        return found[size]

    def fits(self, kind: StepKind, size: StepSize, limit_bytes: int) -> bool:
        """Whether `predict` would have to reserve no more than the limit; much faster."""
        known = self._predictions.get(kind, {}).get(size)
        if known is not None:
            return known.reserved_bytes <= limit_bytes
        return self.of(kind, size).fits(size, kind.device_type, limit_bytes)

    def of(self, kind: StepKind, size: StepSize) -> StepProfile | EstimatedProfile:
        """A profile that covers `size`, traced at its lengths if there is none yet."""
        if kind not in self._known:
            self._known[kind] = list(self._read(kind))
        for profile in self._known[kind]:
            if profile.covers(size):
                return profile
        self._on_trace(kind, size)
        profile = _make(kind, size._replace(rank=FIRST_RANK))
        self._known[kind].append(profile)
        if profile.is_lasting:
            self._write(kind, profile)
        return profile

    def _read(self, kind: StepKind) -> Iterator[StepProfile | EstimatedProfile]:
        if self._folder is None:
            return
        folder = self._folder / _key(kind)
        with suppress(*_BROKEN):
            yield EstimatedProfile(**_checked((folder / ESTIMATE).read_bytes()))
        for path in sorted(folder.glob("*.npz")):
            with suppress(*_BROKEN):
                yield _decoded(path)

    def _write(self, kind: StepKind, profile: StepProfile | EstimatedProfile) -> None:
        if isinstance(profile, StepProfile):
            name = "-".join(str(n) for n in (*profile.low, *profile.high))
            self._store(kind, f"{name}.npz", _encoded(profile))
        else:
            self._store(kind, ESTIMATE, _sealed(asdict(profile)))
        if self._folder is not None:
            _forget_oldest(self._folder)

    def _read_predictions(self, kind: StepKind) -> dict[StepSize, Prediction]:
        if self._folder is None:
            return {}
        try:
            rows = _checked((self._folder / _key(kind) / PREDICTIONS).read_bytes())
            return {StepSize(*size): Prediction(**fields) for size, fields in rows}
        except _BROKEN:
            return {}

    def _write_predictions(self, kind: StepKind) -> None:
        rows = [[size, asdict(found)] for size, found in self._predictions[kind].items()]
        self._store(kind, PREDICTIONS, _sealed(rows))

    def _store(self, kind: StepKind, name: str, data: bytes) -> None:
        """A disk that refuses costs time, not the plan."""
        if self._folder is None:
            return
        folder = self._folder / _key(kind)
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            write_bytes(folder / name, data)


def _make(kind: StepKind, first: StepSize) -> StepProfile | EstimatedProfile:
    """Traced at `first` and beside it; an estimate where a step cannot be followed."""
    # Only what is not known yet needs torch and transformers.
    with collection_paused():
        from rsauto.memory.trace import (
            UNTRACEABLE,
            estimated_profile,
            require_positions,
            trace_step,
        )

    require_positions(kind, first)
    try:
        low = trace_step(kind, first, may_cut=True)
        for second in second_sizes(first, kind.device_type):
            try:
                high = trace_step(kind, second, may_cut=True)
                return profile_from(low, high, kind.device_type)
            except OtherOperationsError as error:
                found: Exception = error
    except UNTRACEABLE as error:
        # Steps that depend on values, such as a count of end-of-text tokens, at every size.
        return estimated_profile(kind, _reason(error))
    except (RuntimeError, AttributeError) as error:
        found = error
    return replace(estimated_profile(kind, _reason(found)), size=first)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().split("\n")[0]


def _key(kind: StepKind) -> str:
    """Changes when anything does that may change the bytes of the kind's steps."""
    said = json.dumps([asdict(kind), _versions()], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:32]


@cache
def _versions() -> list[str]:
    """Of the libraries, without importing them, and of the code that traces."""
    found = [f"{name} {metadata.version(name)}" for name in LIBRARIES]
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for entry in TRACING_CODE:
        for path in sorted([package / entry, *(package / entry).glob("*.py")]):
            if path.is_file():
                digest.update(path.read_bytes())
    return [*found, digest.hexdigest()]


_ARRAYS = ("storages", "signs", "terms", "coefficients", "exponents", "shifts", "labels")
_SMALLER = {"storages": np.int32, "signs": np.int8, "terms": np.int32, "labels": np.int16}
_PLAIN = (
    "low", "high", "step", "words", "params", "frozen_linear_weights", "trainable_linear_weights",
)  # fmt: skip


def _sealed(value: Any) -> bytes:
    """JSON after a line with its hash."""
    text = json.dumps(value).encode()
    return hashlib.sha256(text).hexdigest().encode() + b"\n" + text


def _checked(data: bytes) -> Any:
    """What was sealed. Raises ValueError where a bit has changed."""
    digest, _, text = data.partition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise ValueError("not what was written")
    return json.loads(text)


def _encoded(profile: StepProfile) -> bytes:
    plain = json.dumps({name: getattr(profile, name) for name in _PLAIN})
    arrays = {
        name: getattr(profile, name).astype(_SMALLER.get(name, getattr(profile, name).dtype))
        for name in _ARRAYS
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, plain=np.frombuffer(plain.encode(), np.uint8), **arrays)
    return buffer.getvalue()


def _decoded(path: Path) -> StepProfile:
    with np.load(path, allow_pickle=False) as stored:
        plain = json.loads(stored["plain"].tobytes())
        arrays = {name: stored[name] for name in _ARRAYS}
    for name in _SMALLER:
        arrays[name] = arrays[name].astype(np.int64)
    return StepProfile(
        low=StepSize(*plain["low"]),
        high=StepSize(*plain["high"]),
        step=plain["step"],
        words=tuple(plain["words"]),
        params=(plain["params"][0], plain["params"][1]),
        frozen_linear_weights=plain["frozen_linear_weights"],
        trainable_linear_weights=tuple(plain["trainable_linear_weights"]),
        **arrays,
    )


def _forget_oldest(folder: Path) -> None:
    with suppress(OSError):
        kinds = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
        for path in kinds[:-KEPT_KINDS]:
            shutil.rmtree(path, ignore_errors=True)
