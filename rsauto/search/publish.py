"""The end of a study: the verdict, and its adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rsauto.config import StudyConfig
from rsauto.exports.adapter_config import load_plain_lora
from rsauto.records import TrialRecord
from rsauto.report.verdict import judge
from rsauto.search.folder import StudyFolder


def publish(
    folder: StudyFolder,
    config: StudyConfig,
    records: Sequence[TrialRecord],
    environment: dict[str, Any],
    train_again: Callable[[TrialRecord], None],
) -> None:
    """Writes best/ and recommended/.

    An adapter that is no longer there, or not as it was written, is made again.
    """
    folder.write_records(records)
    verdict = judge(config, records, environment)
    for name, chosen in (("best", verdict.best), ("recommended", verdict.recommended)):
        if chosen is None:
            continue
        if not _is_whole(folder.adapter(chosen.number)):
            train_again(chosen)
        folder.publish_adapter(chosen.number, name)


def _is_whole(adapter: Path) -> bool:
    """Whether it is there as it was written, as far as its configuration and weights tell."""
    try:
        load_plain_lora(adapter)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, SafetensorError):
        return False
    return True
