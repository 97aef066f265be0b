"""Two workers on a local Ray cluster, one of them placed by Ray."""

from __future__ import annotations

from pathlib import Path

import postgres
import pytest
from processes import command_line
from test_workers_postgres import check_books, trials_of
from tiny_study import records, write_study

pytest.importorskip("ray", reason="ray is missing: pip install 'rsauto[ray]'")


def test_a_study_with_a_worker_on_ray(tmp_path: Path) -> None:
    study, out = write_study(tmp_path, trials=12), tmp_path / "out"
    with postgres.server() as url:
        # The other one, which takes its time to come, is not slowed down.
        host = command_line(
            "study", study, "--out", out, "--storage", url, "--launcher", "ray", "--workers", "2",
            step_seconds=1.5,
        )  # fmt: skip
        try:
            output, _ = host.communicate(timeout=280)
        finally:
            host.kill()
            host.communicate()
        assert host.returncode == 0, output
        assert "placed by Ray" in output
        assert "the study goes on without it" not in output
        check_books(trials_of(url), records(out), 12)
    assert len({line["worker"] for line in records(out)}) == 2, "both have run trials"
