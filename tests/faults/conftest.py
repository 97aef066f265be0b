"""What tests of several faults share: one study that nothing happens to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from forked import Undisturbed


@pytest.fixture(scope="session")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, _plans_of_this_session: None
) -> Undisturbed:
    from forked import undisturbed_in

    return undisturbed_in(tmp_path_factory.mktemp("undisturbed"))
