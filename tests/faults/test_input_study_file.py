"""Study files as no person would write them: refused in words, quickly, or read and kept."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rsauto.config import StudyConfig
from rsauto.errors import InputError
from rsauto.study_file import MOST_BYTES, dump, load, validate

FAR_LONGER_THAN_EVER_SECONDS = 60
"""Of a file that is read in a second at most; told apart from one that is never read."""

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(2**62, 2**70), st.floats(),
    st.text(max_size=12), st.binary(max_size=4), st.dates(),
    st.sampled_from(["auto", "embedded", "24GiB", "1e-3", "rslora", "", "\0", "=1+1", "{x}"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


def _keys(model: type[Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, field in model.model_fields.items():
        found.append((*path, name))
        if hasattr(field.annotation, "model_fields"):
            found += _keys(field.annotation, (*path, name))
    return found


KEYS = st.sampled_from(_keys(StudyConfig))


def aliases_of_aliases(line: str, first: str) -> str:
    """Nine lines that stand for ten to the ninth values."""
    lines = [f"a: &a {first}"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} {line.replace('*', '*' + before)}")
    return "\n".join(lines)


HOSTILE = {
    "aliases in lists": aliases_of_aliases(f"[{','.join(['*'] * 10)}]", "[x]"),
    "merged mappings": aliases_of_aliases(f"{{<<: [{','.join(['*'] * 10)}]}}", "{x: 1}"),
    "the same key": aliases_of_aliases("{k: *, k: *}", "{k: 1}") + "\nz: 1",
    "an alias as a key": aliases_of_aliases(f"[{','.join(['*'] * 10)}]", "[x]") + "\n? *i\n: 1",
    "it holds itself": "a: &a [*a]",
    "a thousand brackets": "a: " + "[" * 1000,
    "far too long": "name: x #" + "x" * MOST_BYTES,
    "a long number": f"search: {{trials: {'9' * 5000}}}",
    "a longer number": f"search: {{trials: 0x{'f' * 5000}}}",
    "more memory than there is": f"memory_budget: 0x{'f' * 5000}",
    "a micro-batch of a trillion": "training: {steps: 5, batch_size: 1000000000000, "
    "micro_batch_size: 7}",
    "a key that is no text": "? \n: 1",
    "a date as a key": "2024-01-01: 1",
    "a lone surrogate": 'model: {name: "\\ud800"}',
    "a NUL": 'model: {name: "a\\0b"}',
    "bytes in a preset": "presets: {a: {b: !!binary /w==}}",
    "a path as a name": "name: ../../elsewhere",
    "an object": 'model: !!python/object/apply:os.system ["touch stolen"]',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_meant_to_do_harm_is_refused_at_once(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "s.yaml"
    path.write_text(HOSTILE[name], encoding="utf-8")
    begin = time.process_time()
    with pytest.raises(InputError) as caught:
        load(path)
    assert time.process_time() - begin < FAR_LONGER_THAN_EVER_SECONDS
    assert len(str(caught.value)) < 4000 and str(caught.value).startswith(str(path))
    assert not Path("stolen").exists()


def test_a_file_without_an_end_and_a_name_that_is_none() -> None:
    for path in (Path("/dev/zero"), Path("a\0b")):
        with pytest.raises(InputError):
            load(path)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=4))
def test_any_value_anywhere_is_refused_in_words_or_comes_back(
    changes: list[tuple[tuple[str, ...], Any]],
) -> None:
    raw: dict[str, Any] = {}
    for path, value in changes:
        inner = raw
        for step in path[:-1]:
            below = inner.setdefault(step, {})
            inner = below if isinstance(below, dict) else inner
        inner[path[-1]] = value
    try:
        config = validate(raw)
    except InputError as error:
        assert all(len(problem) < 2000 for problem in error.problems)
        return
    text = dump(config)
    text.encode("utf-8")
    assert dump(validate(yaml.safe_load(text))) == text


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files") / "s.yaml"


@settings(deadline=None, max_examples=150)
@given(st.one_of(
    st.binary(max_size=60),
    st.text("abx:-[]{}&*!|>?#'\"%@,\n\t 0123.<~=\\", max_size=60).map(str.encode),
    VALUES.map(lambda value: yaml.dump(value).encode("utf-8", "surrogatepass")),
))  # fmt: skip
def test_any_bytes_are_refused_in_words_or_read(place: Path, data: bytes) -> None:
    place.write_bytes(data)
    try:
        load(place)
    except InputError as error:
        assert str(place) in str(error)
