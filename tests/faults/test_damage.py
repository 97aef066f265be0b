"""Flipped bits and missing ends: the journal and adapters know what was written."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_ledger import journal_ledger, settle, spec_of

from rsauto.adapters.sealed import load_sealed, sealed
from rsauto.errors import InputError
from rsauto.records import TrialRecord
from rsauto.search.ledger import Ledger

FLIPS = 400


@pytest.fixture
def journal(tmp_path: Path, record_of: Callable[..., TrialRecord]) -> Path:
    ledger = journal_ledger(tmp_path)
    for rank in (4, 8, 16):
        trial, spec = ledger.begin_new(spec_of(rank))
        settle(ledger, trial, record_of(spec, trial.number, 1.5, "complete"))
    return tmp_path / "journal.log"


def flipped(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def records_of(ledger: Ledger) -> list[TrialRecord]:
    return ledger.records()


def test_a_flipped_bit_in_the_journal_is_named_or_changes_nothing(journal: Path) -> None:
    whole, draw = journal.read_bytes(), random.Random(0)
    expected = records_of(journal_ledger(journal.parent))
    told = 0
    for _ in range(FLIPS):
        journal.write_bytes(flipped(whole, draw))
        try:
            found = records_of(journal_ledger(journal.parent))
        except InputError as error:
            told += 1
            assert str(journal) in str(error) and "line" in str(error)
            assert "Bring back a copy" in str(error)
        else:
            assert found == expected
    assert told > 0.9 * FLIPS, "the rest fell on names of checksums and the last line's end"


def test_a_journal_without_checksums_is_read_and_goes_on_with_them(journal: Path) -> None:
    """As older versions and Optuna itself write it."""
    sealed_lines = journal.read_bytes().splitlines()
    bare = [line[: line.rindex(b',"crc32":"')] + b"}\n" for line in sealed_lines]
    expected = records_of(journal_ledger(journal.parent))
    journal.write_bytes(b"".join(bare))
    ledger = journal_ledger(journal.parent)
    assert records_of(ledger) == expected
    ledger.set_attribute("more", 1)
    assert b'"crc32":"' in journal.read_bytes().splitlines()[-1]
    assert journal_ledger(journal.parent).attributes()["more"] == 1


def test_optuna_itself_reads_and_writes_it(journal: Path) -> None:
    storage = JournalStorage(JournalFileBackend(str(journal)))
    study = optuna.load_study(study_name="tiny", storage=storage)
    assert len(study.trials) == 3
    study.set_user_attr("by", "optuna")
    assert journal_ledger(journal.parent).attributes()["by"] == "optuna"


def test_entries_of_no_known_form_are_damage_too(journal: Path) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    for line in (b"[]\n", b'{"op_code":4}\n', b'{"op_code":99,"worker_id":"x"}\n', b"\xff\n"):
        journal.write_bytes(b"".join([*lines[:5], line, *lines[5:]]))
        with pytest.raises(InputError, match=r"journal\.log: the journal is damaged"):
            journal_ledger(journal.parent)


def test_a_journal_that_gets_shorter_under_a_running_study_is_told(journal: Path) -> None:
    ledger = journal_ledger(journal.parent)
    journal.write_bytes(journal.read_bytes()[:200])
    with pytest.raises(InputError, match="it ends before entry"):
        ledger.attributes()


TENSORS = {
    "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "a": torch.linspace(0, 1, 40),
}


def test_a_flipped_bit_in_an_adapter_is_told_or_changes_nothing(tmp_path: Path) -> None:
    path, data, draw = tmp_path / "adapter_model.safetensors", sealed(TENSORS), random.Random(0)
    told = 0
    for _ in range(FLIPS):
        path.write_bytes(flipped(data, draw))
        try:
            found = load_sealed(path)
        except (ValueError, SafetensorError):
            told += 1
            continue
        assert found.keys() == TENSORS.keys()
        assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert told > 0.9 * FLIPS, "the rest fell on names within the metadata"


def test_an_adapter_that_was_cut_off_is_told(tmp_path: Path) -> None:
    path, data = tmp_path / "adapter_model.safetensors", sealed(TENSORS)
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises((ValueError, SafetensorError)):
            load_sealed(path)


def test_a_sealed_adapter_is_safetensors_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(sealed(TENSORS))
    found = load_file(path)
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert sealed(dict(reversed(TENSORS.items()))) == sealed(TENSORS)
