"""Where a study stands, from its records alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rsauto.records import SETTLED_OUTCOMES
from rsauto.report.table import Study
from rsauto.report.verdict import judge
from rsauto.units import objective_text, value_text


def status_values(study: Study) -> dict[str, Any]:
    """Counts and the best trial so far, JSON values."""
    verdict = judge(study.config, study.records, study.environment)
    outcomes = Counter(record.outcome for record in study.records)
    return {
        "out": str(study.folder),
        "trials": study.config.search.trials,
        "settled": sum(outcomes[outcome] for outcome in SETTLED_OUTCOMES),
        "outcomes": dict(outcomes),
        "best": verdict.best.to_json() if verdict.best else None,
        "recommended": verdict.recommended.to_json() if verdict.recommended else None,
    }


def status_lines(study: Study) -> list[str]:
    """The same for people."""
    values = status_values(study)
    verdict = judge(study.config, study.records, study.environment)
    counts = ", ".join(f"{count} {name}" for name, count in values["outcomes"].items()) or "none"
    lines = [
        f"study         {study.config.name} in {study.folder}",
        f"trials        {values['settled']} of {values['trials']} settled ({counts})",
    ]
    for name in ("default", "default_tuned", "best", "recommended"):
        standing = verdict.standings.get(name)
        if standing is not None:
            lines.append(
                f"{name:<14}{objective_text(verdict.objective)} {value_text(standing.objective)}, "
                f"rank {standing.record.rank} (trial {standing.record.number})"
            )
    return lines + list(verdict.sentences)
