"""The embedded fine-tuning task: translate English sentences into an invented language.

The embedded model has read English in docstrings and has never seen the language, so its weights
must change: 32 stems, 10 particles and a word order have to be learnt. A row is

    prompt      "no same method will not get ="
    completion  " pobo ne bebo sofi ma de"        (method no same get will NOT)

and takes 13 to 23 tokens of the embedded tokenizer, end of text included. The grammar, where the
object after the verb is a candidate that was not chosen (`LanguageSpec.transitive`):

    English   DETERMINER [ADJECTIVE] NOUN[s] AUXILIARY [not] VERB [DETERMINER [ADJECTIVE] NOUN[s]] =
    invented  noun [PLURAL] determiner [adjective] [noun [PLURAL] OBJECT determiner [adjective]]
              verb auxiliary [NOT]

* A stem (noun, adjective, verb) is two syllables, a particle one; all are words of their own, so
  the completion is a sequence of independent choices and every one of them must be right.
* The nouns, adjectives and verbs are words of Python's documentation, which the model knows.
* Every slot is drawn evenly; adjective and plural occur half of the time, "not" a quarter.
* A prompt occurs once: the splits share none, while every word of validation and test is in
  training. There are 73728 possible prompts, hence learning by heart does not help.

Rows are made by `random.Random(seed).random()`, the one generator method whose sequence Python
promises to keep; `SPLIT_SHA256` freezes the result, and a change of it needs a new `TASK_VERSION`.
The metric beside the loss is exact match: the completion reproduced to its last word and ended
there. Sizes and alternatives were chosen by experiment: `reports/embedded/task-choice.md`.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar, get_args

Split = Literal["train", "validation", "test"]
Row: TypeAlias = dict[str, str]
"""One example, {"prompt", "completion"}; prompt + completion is the text, without end of text."""

SPLITS: tuple[Split, ...] = get_args(Split)

TASK_VERSION = 1
SPLIT_SHA256: dict[Split, str] = {
    "train": "5ad6f09f1133bf8be23748278751ee7f4ee785ee20c11a5ba837bce8fac262c0",
    "validation": "3b45c919693fcddee58bb27dc555cf56c27be55cb1a97592553d2e5c3eb99dce",
    "test": "6a7267fa6487364c491683127ade573832b05eae0cfa6ed09d582260d9876554",
}

NOUNS = (
    "file list string name line module object method message class type key code number value text "
    "header instance argument tuple filename result option exception context command char node "
    "source error test path"
).split()
ADJECTIVES = (
    "new first base default direct other same old last next empty common local short long main"
).split()
VERBS = (
    "read call set get return raise pass print use try import write find check open load"
).split()
DETERMINERS = "the any some no".split()
AUXILIARIES = "will did can must".split()

# The embedded tokenizer writes a stem as two tokens, a syllable each, and a particle as one: a word
# is as hard as it is long. Left out is what reads as English, which the model has seen.
STEMS = (
    "bebo befo bepa budi budo bufo bula buwa debo debu dedo dema deto devi dewa diri dobu doho "
    "dola hebo hebu hedo hefo hepa hepo heso hevi lebo lebu ledi lefo leho lela lepa lepo lola "
    "loli maho mavi mawa mefo mela mema mepa mepo mevi mewa nefi nela nelo nema nepa nepo neto "
    "nobo noho nola nomo pafi paho pamo pobo poli rabu rama ravi rawa refi reho rera rero revi "
    "sedi sefi seho sepa sepo seri seso seto sobo sofi sudi sudo suho sulo tobu tofo toli tovi "
    "webu wefi weho wema wemo wepa"
).split()
PARTICLES = "bu de di le lo ma ne pa po ra re se su".split()

PLURAL, OBJECT, NOT = "<plural>", "<object>", "<not>"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LanguageSpec:
    """Size of the task; the defaults are the frozen task, other values are for experiments."""

    num_dialects: int = 1
    """Languages with the same grammar and words of their own; above 1, a letter names the one."""

    transitive: bool = False
    """Whether the verb has an object."""

    num_nouns: int = 16
    num_adjectives: int = 8
    num_verbs: int = 8

    num_train: int = 3072
    num_validation: int = 200
    num_test: int = 512
    seed: int = 20240229


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """One invented language."""

    name: str

    words: dict[str, str]
    """English word, or one of PLURAL, OBJECT and NOT, to the invented word."""


@dataclass(frozen=True, kw_only=True)
class NounPhrase:
    """A noun with what belongs to it, in English words."""

    determiner: str
    adjective: str | None
    noun: str
    is_plural: bool

    def english(self) -> str:
        """For example "some new objects"."""
        noun = self.noun + ("s" if self.is_plural else "")
        return " ".join(word for word in (self.determiner, self.adjective, noun) if word)

    def meanings(self, *, is_object: bool) -> list[str]:
        """Keys of `Dialect.words` in the invented order."""
        parts = [
            self.noun,
            PLURAL if self.is_plural else None,
            OBJECT if is_object else None,
            self.determiner,
            self.adjective,
        ]
        return [part for part in parts if part]


def _pick(items: Sequence[T], rng: random.Random) -> T:
    return items[int(rng.random() * len(items))]


def _shuffled(items: Sequence[T], rng: random.Random) -> list[T]:
    return sorted(items, key=lambda _: rng.random())


def _make_dialect(name: str, content_words: Sequence[str], rng: random.Random) -> Dialect:
    function_words = [*DETERMINERS, *AUXILIARIES, PLURAL, OBJECT, NOT]
    words = dict(zip(content_words, _shuffled(STEMS, rng), strict=False))
    words.update(zip(function_words, _shuffled(PARTICLES, rng), strict=False))
    return Dialect(name=name, words=words)


def _make_phrase(spec: LanguageSpec, rng: random.Random) -> NounPhrase:
    return NounPhrase(
        determiner=_pick(DETERMINERS, rng),
        adjective=_pick(ADJECTIVES[: spec.num_adjectives], rng) if rng.random() < 0.5 else None,
        noun=_pick(NOUNS[: spec.num_nouns], rng),
        is_plural=rng.random() < 0.5,
    )


def _make_row(spec: LanguageSpec, dialects: Sequence[Dialect], rng: random.Random) -> Row:
    dialect = _pick(dialects, rng)
    subject = _make_phrase(spec, rng)
    auxiliary = _pick(AUXILIARIES, rng)
    verb = _pick(VERBS[: spec.num_verbs], rng)
    is_negated = rng.random() < 0.25

    english = [subject.english(), auxiliary, "not" if is_negated else "", verb]
    meanings = subject.meanings(is_object=False)
    if spec.transitive:
        target = _make_phrase(spec, rng)
        english.append(target.english())
        meanings += target.meanings(is_object=True)
    meanings += [verb, auxiliary, *([NOT] if is_negated else [])]

    tag = f"{dialect.name}: " if spec.num_dialects > 1 else ""
    return {
        "prompt": f"{tag}{' '.join(word for word in english if word)} =",
        # The space is part of the first word's token, so the completion owns it, not the prompt.
        "completion": "".join(f" {dialect.words[meaning]}" for meaning in meanings),
    }


def generate_splits(spec: LanguageSpec) -> dict[Split, list[Row]]:
    """Draw rows until there are enough distinct prompts, and cut them into the three splits."""
    rng = random.Random(spec.seed)
    content_words = [
        *NOUNS[: spec.num_nouns],
        *ADJECTIVES[: spec.num_adjectives],
        *VERBS[: spec.num_verbs],
    ]
    dialects = [_make_dialect("ABCDEFGH"[i], content_words, rng) for i in range(spec.num_dialects)]
    by_prompt: dict[str, Row] = {}
    while len(by_prompt) < spec.num_train + spec.num_validation + spec.num_test:
        row = _make_row(spec, dialects, rng)
        by_prompt[row["prompt"]] = row
    rows = list(by_prompt.values())
    train_end, validation_end = spec.num_train, spec.num_train + spec.num_validation
    return {
        "train": rows[:train_end],
        "validation": rows[train_end:validation_end],
        "test": rows[validation_end:],
    }


def load_split(split: Split) -> list[Row]:
    """Rows of the frozen task: 3072 for "train", 200 for "validation", 512 for "test"."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, but got {split=}.")
    return generate_splits(LanguageSpec())[split]


def split_sha256(rows: Sequence[Row]) -> str:
    """SHA-256 over the rows as JSON lines, to compare with `SPLIT_SHA256`."""
    lines = (json.dumps([row["prompt"], row["completion"]]) + "\n" for row in rows)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
