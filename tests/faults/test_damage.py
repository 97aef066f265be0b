"""Flipped bits and missing ends: the journal and adapters know what was written."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from io import BufferedReader, FileIO
from pathlib import Path

import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_ledger import config_of, journal_ledger, settle, spec_of

from rsauto.adapters.export import write_adapter
from rsauto.adapters.sealed import load_sealed, sealed
from rsauto.atomic import beside
from rsauto.errors import InputError
from rsauto.exports.adapter_config import load_plain_lora
from rsauto.records import TrialRecord
from rsauto.search.folder import StudyFolder
from rsauto.search.identity import require_nothing_lost, require_own_journal
from rsauto.search.journal import Journal
from rsauto.search.ledger import Ledger
from rsauto.search.storage import open_storage

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


@pytest.mark.parametrize("end", [b"", b"\x0b", b"\x8a"])
def test_the_damaged_end_of_the_last_line_costs_no_entry(journal: Path, end: bytes) -> None:
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-1] + end)
    journal_ledger(journal.parent)  # which adds entries of its own
    assert journal.read_bytes().startswith(whole)


@pytest.mark.parametrize("content", [b"12:00 started\n12:01 ended", b"no line", b"{}\n{"])
def test_a_file_of_somebody_else_is_refused_and_left_as_it_is(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "journal.log"
    path.write_bytes(content)
    with pytest.raises(InputError, match="does not begin as an entry does"):
        open_storage(None, path)
    assert path.read_bytes() == content


def test_a_reader_sees_nothing_of_a_line_that_is_cut_off_meanwhile(
    journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the size and the reading, another process mends the end and writes."""
    whole = journal.read_bytes()
    torn = whole + b'{"op_code":2,"half an ent'
    reader = Journal(journal)
    journal.write_bytes(torn)
    seek = BufferedReader.seek

    class Late(BufferedReader):
        def seek(self, target: int, whence: int = 0) -> int:
            found = seek(self, target, whence)
            if whence == 0:  # the size is known
                journal.write_bytes(whole + whole.splitlines(keepends=True)[-1] * 3)
            return found

    monkeypatch.setattr("builtins.open", lambda path, mode: Late(FileIO(path)))
    found = list(reader.read_logs(0))
    monkeypatch.undo()
    assert len(found) in (whole.count(b"\n"), whole.count(b"\n") + 1)


def test_a_journal_of_another_study_is_not_gone_on_with(journal: Path) -> None:
    storage = open_storage(None, journal)
    other = config_of().model_copy(update={"name": "other"})
    with pytest.raises(InputError, match="holds the study 'tiny', and this one is 'other'"):
        require_own_journal(storage, other, StudyFolder(journal.parent))
    require_own_journal(storage, config_of(), StudyFolder(journal.parent))


def test_lines_of_records_end_at_line_ends_alone(journal: Path) -> None:
    """An error's text may have other separators, which JSON leaves as they are."""
    ledger, folder = journal_ledger(journal.parent), StudyFolder(journal.parent)
    folder.write_records(replace(r, error="one\u2028two\x85three") for r in ledger.records())
    assert "\u2028" in folder.records_file.read_text(encoding="utf-8")
    require_nothing_lost(folder, ledger)


def test_an_adapter_is_published_over_what_a_process_of_this_number_left(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    (folder.adapter(3) / ".ipynb_checkpoints").mkdir(parents=True)
    (folder.adapter(3) / "adapter_model.safetensors").write_bytes(b"x")
    beside(tmp_path / "best", "partial").mkdir()
    published = folder.publish_adapter(3, "best")
    assert [path.name for path in published.iterdir()] == ["adapter_model.safetensors"]


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


@pytest.mark.filterwarnings("ignore:Unexpected keyword")
def test_a_flipped_bit_in_an_adapters_configuration_changes_no_logit(tmp_path: Path) -> None:
    """Where it is not told. Alpha and rank are equal, and modules are named by the weights, too."""
    path, draw = tmp_path / "adapter_config.json", random.Random(0)
    ranks = {"layers.0.up_proj": 12, "layers.1.q_proj": 3}
    written = LoraConfig(
        r=8, lora_alpha=8, rank_pattern=ranks, alpha_pattern=ranks, modules_to_save=["score"],
        target_modules=["q_proj", "up_proj"], task_type="SEQ_CLS", base_model_name_or_path="base",
    )  # fmt: skip
    written.target_modules = ["q_proj", "up_proj"]  # type: ignore[assignment]
    tensors = {f"base_model.model.{name}.lora_A.weight": torch.zeros(2, 2) for name in ranks}
    write_adapter(tmp_path, {**tensors, "base_model.model.score.weight": torch.zeros(2)}, written)
    data, told = path.read_bytes(), 0
    load_plain_lora(tmp_path)
    for _ in range(FLIPS):
        path.write_bytes(flipped(data, draw))
        try:
            load_plain_lora(tmp_path)
            found = LoraConfig.from_pretrained(str(tmp_path))
        except (ValueError, TypeError, AttributeError):
            told += 1
            continue
        assert (found.r, found.lora_alpha, found.use_rslora) == (8, 8, False)
        assert list(found.rank_pattern.values()) == list(found.alpha_pattern.values()) == [12, 3]
        assert set(found.target_modules or ()) == {"q_proj", "up_proj"}
    assert told > 0.3 * FLIPS, "the rest fell on names and on what is not rsauto's"


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
