"""The folder of one training.

training.json    what is trained here, written before the first step
curve.jsonl      one line a step, with the evaluation where there was one
checkpoints/     the last two, until the training has ended
adapter/         plain LoRA of scale 1, with its model card
record.json      the trial's record and the results on the test split, written last
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rsauto.atomic import write_text
from rsauto.errors import InputError
from rsauto.finetuning.request import Job
from rsauto.records import StepPoint, TrialSpec

_MAY_DIFFER = {"role", "retry_of", "cohort", "cohort_size", "micro_batch_size", "product_order"}
"""Of a spec: what changes its results by rounding alone, or not at all."""
_SHOWN = {"eval_loss", "perplexity", "metrics", "test", "test_source"}
"""Of the results: what a finished training tells once more."""
_OF_LENGTH = {"steps", "num_evals", "allocation"}


class OutFolder:
    """Paths of a training, and its files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.training_file = path / "training.json"
        self.curve_file = path / "curve.jsonl"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.record_file = path / "record.json"

    def check(self, job: Job) -> None:
        """Refuses a folder that holds something else. Changes nothing. Raises InputError."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--out {self.path}: is a file, not a folder. Choose another --out.")
        begun = self.begun()
        if begun is not None:
            steps = job.known_steps
            self.require_same(begun, job, job.spec(steps or 1), length_known=steps is not None)
        elif self.path.is_dir() and any(p.name != ".lock" for p in self.path.iterdir()):
            raise InputError(
                f"--out {self.path}: the folder is not empty and holds no training. Choose another "
                "--out, or empty it."
            )
        parent = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not os.access(parent, os.W_OK | os.X_OK):
            raise InputError(f"--out {self.path}: no permission to write in {parent}.")

    def require_same(
        self, begun: Mapping[str, Any], job: Job, spec: TrialSpec, *, length_known: bool = True
    ) -> None:
        """Raises InputError that names how what was begun here differs from what is asked for."""
        left_out = _MAY_DIFFER | (set() if length_known else _OF_LENGTH)
        before = _compared(job.config.name, begun["trial"], begun["spec"], left_out)
        before["study"] = begun["study"]
        now = _compared(job.config.name, job.record.number, _as_json(spec), left_out)
        listed = [
            f"  {name}: was {before.get(name)!r}, is {now.get(name)!r}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if listed:
            state = "finished" if self.is_finished else "begun"
            raise InputError(
                f"--out {self.path}: another training was {state} here:\n"
                + "\n".join(listed)
                + f"\nGive the options it was {state} with (--trial {begun['trial']} is its "
                "trial), or choose another --out."
            )

    @property
    def is_finished(self) -> bool:
        return self.record_file.exists()

    def begun(self) -> dict[str, Any] | None:
        """What `begin` wrote, None where nothing was begun. Raises InputError for another file."""
        found = self._read(self.training_file)
        if found is not None and not _is_begun(found):
            raise InputError(
                f"{self.training_file}: is not what rsauto train wrote. Choose another --out."
            )
        return found

    def begin(
        self, job: Job, spec: TrialSpec, fingerprints: Mapping[str, str], training_id: str | None
    ) -> dict[str, Any]:
        """Writes down what is trained here, from now on; returns it. None makes a new id."""
        values = {
            "study": job.config.name,
            "trial": job.record.number,
            "spec": _as_json(spec),
            "fingerprints": dict(fingerprints),
            "id": training_id or uuid.uuid4().hex,
        }
        write_text(self.training_file, json.dumps(values, indent=2) + "\n")
        return values

    def finished(self) -> dict[str, Any]:
        """The results of a training that has ended.

        Raises InputError for another file, or where the adapter is gone.
        """
        found = self._read(self.record_file)
        assert found is not None, "asked for once it is finished"
        if not _SHOWN <= found.keys():
            raise InputError(
                f"{self.record_file}: is not what rsauto train wrote. Choose another --out."
            )
        if not any(self.adapter.glob("*.safetensors")):
            raise InputError(
                f"{self.path}: this training is finished, but its adapter, {self.adapter}, is "
                f"gone. To train it anew, remove {self.record_file} and give the same command; "
                "or choose another --out."
            )
        return found

    def finish(self, values: Mapping[str, Any]) -> None:
        """Writes the results, after which there is nothing to continue."""
        write_text(self.record_file, json.dumps(values, indent=2, allow_nan=False) + "\n")
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def cut_curve(self, step: int) -> None:
        """Drops what a killed process wrote of steps that will be done again."""
        if not self.curve_file.exists():
            return
        kept = []
        for line in self.curve_file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError, RecursionError):
                break  # cut off in the middle
            kept.append(line + "\n")
        write_text(self.curve_file, "".join(kept))

    def add_point(self, point: StepPoint) -> None:
        """Adds a step to the curve."""
        values: dict[str, Any] = {
            "step": point.step,
            "train_loss": point.train_loss,
            "grad_norm": point.grad_norm,
            "learning_rate": point.learning_rate,
            "tokens": point.tokens,
            "seconds": round(point.seconds, 6),
        }
        if point.evaluation is not None:
            values |= {"eval_loss": point.evaluation.eval_loss, **point.evaluation.metrics}
        with self.curve_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: cannot be read ({error}). Choose another --out.") from None
        if not isinstance(found, dict):
            raise InputError(f"{path}: is not what rsauto train wrote. Choose another --out.")
        return found


def _is_begun(found: Mapping[str, Any]) -> bool:
    """Whether this is what `OutFolder.begin` writes, in this version."""
    if not {"study", "trial", "spec", "fingerprints", "id"} <= set(found):
        return False
    try:
        TrialSpec.from_json(found["spec"])
    except (TypeError, ValueError, AttributeError):
        return False
    return isinstance(found["fingerprints"], dict)


def _as_json(spec: TrialSpec) -> dict[str, Any]:
    """As it comes back from a file."""
    values: dict[str, Any] = json.loads(json.dumps(spec.to_json()))
    return values


def _compared(
    study: str, trial: int, spec: Mapping[str, Any], left_out: set[str]
) -> dict[str, Any]:
    kept = {name: value for name, value in spec.items() if name not in left_out}
    return {"study": study, "trial": trial, **kept}
