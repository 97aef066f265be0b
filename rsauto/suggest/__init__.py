"""A first study file for a model and a dataset: `rsauto init`.

    seen = look(wishes)                    figures: positions, columns, lengths, classes
    suggestion = suggest(seen)             settings, each with its reason
    text = study_text(suggestion, ...)     the commented study file

`write_study` does all of it, checks that the study would start, and writes the file.
"""

from __future__ import annotations

from rsauto.suggest.decide import Setting, Suggestion, suggest
from rsauto.suggest.look import Seen, Wishes, look
from rsauto.suggest.write import study_text, write_study

__all__ = [
    "Seen",
    "Setting",
    "Suggestion",
    "Wishes",
    "look",
    "study_text",
    "suggest",
    "write_study",
]
