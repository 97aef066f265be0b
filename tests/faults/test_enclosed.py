"""A study folder from somebody else: it writes nowhere but into itself, and imports nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from test_report_records import study_records, write_study

from rsauto.enclosed import require_enclosed
from rsauto.errors import InputError
from rsauto.exports.adapter_config import require_plain_lora
from rsauto.report.page import write_report
from rsauto.report.table import load_study
from rsauto.search.folder import StudyFolder

WRITTEN = ["figures", "trained", "exports", "adapters", ".lock", "journal.log", "trials.jsonl",
           "environment.json", "study.yaml", "report.html"]  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_a_link_out_of_the_folder_is_refused_and_nothing_outside_is_touched(
    tmp_path: Path, name: str
) -> None:
    folder = write_study(tmp_path / "study", study_records()[:2])
    outside = tmp_path / "outside"
    if "." in name:
        outside.write_text("mine", encoding="utf-8")
    else:
        outside.mkdir()
        (outside / "memory.svg").write_text("mine", encoding="utf-8")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    with pytest.raises(InputError, match=r"link to .*outside"):
        write_report(folder)
    with pytest.raises(InputError, match=r"link to .*outside"), StudyFolder(folder).locked():
        pass
    mine = outside if outside.is_file() else outside / "memory.svg"
    assert mine.read_text(encoding="utf-8") == "mine"


def test_links_that_stay_inside_and_a_folder_that_is_a_link_are_fine(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", study_records()[:2])
    (folder / "latest").symlink_to("study.yaml")
    (folder / "gone").symlink_to("not-there")
    (tmp_path / "link").symlink_to(folder)
    assert len(load_study(tmp_path / "link").records) == 2
    require_enclosed(tmp_path / "not there yet")


def test_a_pipe_does_not_keep_a_reader_waiting(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", study_records()[:2])
    (folder / "environment.json").unlink()
    os.mkfifo(folder / "environment.json")
    with pytest.raises(InputError, match=r"environment.json is neither a file nor a folder"):
        load_study(folder)


PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"],
         "rank_pattern": {"model.layers.0.q_proj": 2},
         "alpha_pattern": {"model.layers.0.q_proj": 2}, "base_model_name_or_path": "x"}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"megatron_core": "antigravity", "megatron_config": {"a": 1}},
        {"auto_mapping": {"parent_library": "antigravity", "base_model_class": "x"}},
        {"corda_config": {"cache_file": "evil.pt"}, "init_lora_weights": "corda"},
        {"target_modules": "(a+)+$"},
        {"rank_pattern": {"(a+)+b": 4}},
        {"target_modules": ["../../x"]},
        {"modules_to_save": "lm_head"},
        {"peft_type": "MIXED"},
        {"lora_alpha": 5},
        {"alpha_pattern": {}},
        {"use_rslora": True},
    ],
)
def test_an_adapter_says_nothing_but_plain_lora(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(PLAIN), encoding="utf-8")
    require_plain_lora(path)
    path.write_text(json.dumps({**PLAIN, **changes}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"is not (what rsauto writes|of LoRA)"):
        require_plain_lora(path)
