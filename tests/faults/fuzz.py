"""Coverage-guided fuzzing of everything that reads other people's files.

    pip install atheris
    python tests/faults/fuzz.py study|records|data [CORPUS] [-max_total_time=300]

An input ends in an InputError or is read; any other exception stops the fuzzer, which then writes
the input that raised it. Options are libFuzzer's. Slow imports are not instrumented: what is
guided is rsauto's own readers.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["rsauto"]):
    from rsauto import study_file
    from rsauto.config import DataConfig
    from rsauto.data.load import load_rows
    from rsauto.errors import InputError
    from rsauto.report.table import read_records
    from rsauto.report.verdict import judge

KINDS = (".jsonl", ".json", ".csv", ".jsonl.gz")
PLACE = Path(tempfile.mkdtemp())


def study(data: bytes) -> None:
    """A study file."""
    path = PLACE / "study.yaml"
    path.write_bytes(data)
    study_file.load(path)


def records(data: bytes) -> None:
    """Lines of trials.jsonl, and what is said of them."""
    (PLACE / "trials.jsonl").write_bytes(data)
    judge(study_file.validate({}), read_records(PLACE), {})


def data(data: bytes) -> None:
    """A data file; the first byte says of which kind."""
    kind = KINDS[data[0] % len(KINDS)] if data else ".jsonl"
    path = PLACE / f"train{kind}"
    path.write_bytes(data[1:])
    load_rows(DataConfig(name=str(path)))


def test_one_input(data: bytes) -> None:
    try:
        TARGETS[sys.argv[1]](data)
    except InputError as error:
        assert len(str(error)) < 100_000


TARGETS = {"study": study, "records": records, "data": data}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"say what to fuzz: {', '.join(TARGETS)}")
    atheris.Setup([sys.argv[0], *sys.argv[2:]], test_one_input)
    atheris.Fuzz()
