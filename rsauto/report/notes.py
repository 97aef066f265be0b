"""What a report says beside its tables: the rate's law, where tokens went, how trials ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rsauto.records import Role, TrialRecord
from rsauto.report.cells import Grid
from rsauto.report.ranks import packing_note
from rsauto.report.rates import rate_findings
from rsauto.report.verdict import Verdict
from rsauto.units import count_text, percent_text

ROLE_NAMES: Mapping[Role, str] = {
    "default": "default",
    "default_tuned": "tuned default",
    "search": "search",
    "seed": "other seed",
    "refit": "refit",
}


def notes(records: Sequence[TrialRecord], verdict: Verdict) -> tuple[str, ...]:
    """Sentences that stand on their own: the law of the rate, what was trained, why it ended."""
    found = [finding.sentence for finding in rate_findings(records)]
    found += [text for text in (token_note(records), packing_note(records)) if text is not None]
    if verdict.ended is not None:
        found.append(f"Why the search ended: {verdict.ended.removesuffix('.')}.")
    return tuple(found)


def token_note(records: Sequence[TrialRecord]) -> str | None:
    """How many tokens were trained on in all, and what share went to pruned trials; None before
    any was."""
    total = _tokens(records)
    if not total:
        return None
    pruned = [record for record in records if record.outcome == "pruned"]
    text = f"{count_text(total)} tokens were trained on in all"
    if not pruned:
        return f"{text}; no trial was pruned."
    trials = "1 trial that was" if len(pruned) == 1 else f"{len(pruned)} trials that were"
    return f"{text}; {percent_text(_tokens(pruned) / total)} went to {trials} pruned."


def token_grid(records: Sequence[TrialRecord]) -> Grid:
    """Tokens trained on by role, and how much of that went to pruned trials; no rows before any."""
    total = _tokens(records)
    rows = []
    for role, name in ROLE_NAMES.items():
        ours = [record for record in records if record.role == role]
        if ours and total:
            rows.append(_token_row(name, ours, total))
    if rows:
        rows.append(_token_row("all", records, total))
    return Grid(
        headers=("role", "trials", "pruned", "tokens", "share", "of it pruned"),
        rows=tuple(rows),
        is_number=(False, True, True, True, True, True),
    )


def endings(records: Sequence[TrialRecord]) -> str:
    """'22 complete, 4 pruned (after 25 % of full length 3, 50 % 1)'."""
    counts = Counter(record.outcome for record in records)
    told = []
    for outcome, number in sorted(counts.items()):
        told.append(f"{number} {outcome}")
        if outcome == "pruned":
            told[-1] += _shares(records)
    return ", ".join(told)


def _shares(records: Sequence[TrialRecord]) -> str:
    """At which shares of a full-length run trials were stopped."""
    shares = Counter(
        percent_text(record.fidelity)
        for record in sorted(records, key=lambda r: r.fidelity or 0)
        if record.outcome == "pruned" and record.fidelity is not None
    )
    if not shares:
        return ""
    return f" ({', '.join(f'{number} after {share}' for share, number in shares.items())})"


def _token_row(name: str, records: Sequence[TrialRecord], total: int) -> tuple[str, ...]:
    ours = _tokens(records)
    pruned = [record for record in records if record.outcome == "pruned"]
    return (
        name,
        str(len(records)),
        str(len(pruned)),
        count_text(ours),
        percent_text(ours / total),
        percent_text(_tokens(pruned) / ours) if ours else "-",
    )


def _tokens(records: Sequence[TrialRecord]) -> int:
    return sum(record.tokens or 0 for record in records)
