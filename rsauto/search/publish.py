"""The end of a study: the verdict, its adapters, the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rsauto.config import StudyConfig
from rsauto.records import TrialRecord
from rsauto.report.page import write_report
from rsauto.report.verdict import judge
from rsauto.search.folder import StudyFolder


def publish(
    folder: StudyFolder,
    config: StudyConfig,
    records: Sequence[TrialRecord],
    environment: dict[str, Any],
    train_again: Callable[[TrialRecord], None],
) -> None:
    """Writes best/ and recommended/, and the report. An adapter no longer there is made again."""
    folder.write_records(records)
    verdict = judge(config, records, environment)
    for name, chosen in (("best", verdict.best), ("recommended", verdict.recommended)):
        if chosen is None:
            continue
        if not (folder.adapter(chosen.number) / "adapter_config.json").is_file():
            train_again(chosen)
        folder.publish_adapter(chosen.number, name)
    write_report(folder.path)
