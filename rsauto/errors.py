"""Every error a user can meet, each with the exit code the command line ends with.

    RsautoError
      InputError            2   configuration, data or folder are wrong; nothing was started
        NotBegunError       2   the study to join is not there yet
        StorageAwayError    2   the study's database does not answer
      BudgetError           3   no configuration fits the memory budget
      StudyInterrupted      4   stopped early, the same command continues
      AllTrialsFailedError  5   trials ran, and every one of them failed

Anything else that escapes is a bug in rsauto and ends with exit code 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from itertools import islice

MOST_SHOWN = 20
"""Problems in one message, and names in one list."""

LONGEST_NAME = 80
"""Characters of a name, as a message shows it."""


class RsautoError(Exception):
    """Base of all errors that are the user's to read; the message stands on its own."""

    exit_code = 1


class InputError(RsautoError, ValueError):
    """Something the user gave is wrong. Carries every problem found, not only the first."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (
            (problems,) if isinstance(problems, str) else tuple(problems)
        )
        shown, more = self.problems[:MOST_SHOWN], len(self.problems) - MOST_SHOWN
        super().__init__("\n".join([*shown, f"... and {more} more."] if more > 0 else shown))


class NotBegunError(InputError):
    """The study that a worker is to join is not there, and may yet come."""


class StorageAwayError(InputError):
    """The database of a study does not answer, and may yet."""


class BudgetError(RsautoError):
    """No configuration of the search space fits the memory budget."""

    exit_code = 3


class StudyInterrupted(RsautoError):
    """The study was stopped by the user or a limit and can be continued."""

    exit_code = 4


class AllTrialsFailedError(RsautoError):
    """Trials ran, none of them gave a result."""

    exit_code = 5


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def listed(names: Collection[str]) -> str:
    """'a', 'b', 'c' for a message, of a length that a person reads whatever the names are."""
    shown = [repr(shortened(name)) for name in islice(names, MOST_SHOWN)]
    more = len(names) - len(shown)
    return ", ".join([*shown, f"{more} more"] if more else shown) or "none"


def shortened(name: str) -> str:
    """At most LONGEST_NAME characters of it, for a message."""
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."
