"""Data files that are broken, hostile or huge: read, or refused in words that name the file."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_input_records import JUNK, TEXTS
from tiny_study import environment
from transformers import AutoTokenizer

from rsauto.config import DataConfig
from rsauto.data.encoding import CHARACTERS, _calls
from rsauto.data.load import load_rows
from rsauto.data.tokens import tokenise
from rsauto.embedded import MODEL_DIR
from rsauto.errors import InputError

TOKENIZER = AutoTokenizer.from_pretrained(MODEL_DIR)
GOOD = "".join(f'{{"prompt": "{n}", "completion": " {n} down"}}\n' for n in range(30)).encode()
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
LONG_LINE = 100_000_000


def told(path: Path, **settings: Any) -> str | None:
    """What a user reads of the file; None where it is trained on."""
    config = DataConfig(name=str(path), max_length=16, **settings)
    try:
        tokenise(load_rows(config), config, TOKENIZER)
    except InputError as error:
        assert len(str(error)) < 5000
        assert "data" in str(error) or str(path) in str(error)
        return str(error)
    return None


HOSTILE = {
    "nothing.jsonl": (b"", "is empty"),
    "blank.csv": (b"\n \n\n", "is empty"),
    "nested.json": (b"[" * 200_000, "not usable as JSON"),
    "nested object.json": (b'{"a":' * 200_000 + b"\n" + GOOD, "not usable as JSON"),
    "nested line.jsonl": (GOOD + b"[" * 200_000, "line 31: not usable as JSON"),
    "nested value.jsonl": (
        GOOD + b'{"prompt":' + b"[" * 400 + b"]" * 400 + b',"completion":"x"}', "neither text nor",
    ),
    "cut.jsonl": (GOOD[:-9], "line 30: not valid JSON"),
    "list.jsonl": (b"[1, 2]\n" * 30, "a row must be an object"),
    "one number.json": (b"2", "holds one int"),
    "null.json": (b" null ", "holds one NoneType"),
    "number.jsonl": (GOOD + b'{"prompt": ' + b"9" * 5000 + b"}", "line 31: not usable as JSON"),
    "nan.jsonl": (b'{"prompt": NaN, "completion": -Infinity}\n' * 30, "no value"),
    "surrogate.jsonl": (b'{"prompt": "a", "completion": "\\ud800"}\n' * 30, "half a surrogate"),
    "wide.jsonl": (GOOD.decode().encode("utf-16"), "UTF-16"),
    "wider.jsonl": (GOOD.decode().encode("utf-32"), "Save it as UTF-8"),
    "latin.jsonl": ('{"prompt": "é", "completion": "x"}\n'.encode("latin-1"), "Latin-1"),
    "commas.csv": (b"," * 300_000 + b"\n", "twice"),
    "columns.csv": (b",".join(b"c%d" % n for n in range(20_000)) + b"\n", "no rows"),
    "rows of columns.csv": (
        (b",".join(b"c%d" % n for n in range(20_000)) + b"\n") * 2, "20000 columns",
    ),
    "keys.jsonl": (json.dumps(dict.fromkeys(map(str, range(20_000)), 1)).encode(), "20000 columns"),
    "quote.csv": (b'prompt,completion\n"a,b\n' * 30, "not valid CSV"),
    "field.csv": (b"prompt,completion\na," + b"x" * 200_000 + b"\n", "field limit"),
    "ragged.csv": (b"prompt,completion\na\n", "1 fields"),
    "cut.jsonl.gz": (gzip.compress(GOOD)[:-20], "gzip data is damaged"),
    "not.jsonl.gz": (GOOD, "gzip data is damaged"),
    "not.parquet": (GOOD, "cannot be read as Parquet"),
    "key.jsonl": (json.dumps({"k" * 200_000: 1}).encode(), "a column's name has 200000"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_broken_file_is_refused_with_its_cause(tmp_path: Path, name: str) -> None:
    data, words = HOSTILE[name]
    path = tmp_path / name
    path.write_bytes(data)
    found = told(path)
    assert found is not None and words in found


LABELS = st.one_of(JUNK, st.sampled_from(["0", "1", "-1", "9" * 5000, 1e300, -0.0, True]))
MESSAGES = st.one_of(
    st.lists(
        st.one_of(
            JUNK,
            st.fixed_dictionaries(
                {"role": st.sampled_from(["user", "assistant", "tool", "", "x"]), "content": JUNK},
                optional={"tool_calls": JUNK, "weight": JUNK, "name": TEXTS},
            ),
            st.fixed_dictionaries({"from": TEXTS, "value": JUNK}),
        ),
        max_size=3,
    ),
    JUNK,
)


@settings(max_examples=120, deadline=None)
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {"prompt": JUNK, "completion": JUNK}, optional={"label": LABELS, "x": JUNK}
        ),
        max_size=3,
    )
)
def test_any_values_are_trained_on_or_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("junk") / "train.jsonl"
    path.write_bytes(GOOD + "".join(json.dumps(row) + "\n" for row in rows).encode())
    told(path)
    told(path, text="{prompt}{x}", label="label")


@settings(max_examples=120, deadline=None)
@given(messages=MESSAGES, tools=st.one_of(JUNK, st.just("[" * 5000)))
def test_any_messages_are_trained_on_or_refused(
    tmp_path_factory: pytest.TempPathFactory, messages: Any, tools: Any
) -> None:
    path = tmp_path_factory.mktemp("chat") / "train.jsonl"
    template = path.with_name("template.jinja")
    template.write_text("{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}")
    good = [{"messages": [{**CHAT[0], "content": str(n)}, CHAT[1]]} for n in range(30)]
    found = [*good, {"messages": messages, "tools": tools}]
    path.write_bytes("".join(json.dumps(row) + "\n" for row in found).encode())
    told(path, chat_template=str(template), loss_on="all")


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    kind=st.sampled_from([".jsonl", ".json", ".csv", ".jsonl.gz", ".csv.gz", ".parquet"]),
)
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str
) -> None:
    """Random bytes, and good ones with a piece cut out or replaced."""
    good = gzip.compress(GOOD) if kind.endswith(".gz") else GOOD
    start = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(start, len(good)))
    path = tmp_path_factory.mktemp("bytes") / f"train{kind}"
    path.write_bytes(good[:start] + data.draw(st.binary(max_size=30)) + good[end:])
    told(path)


def test_a_packed_file_that_unfolds_to_any_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train.jsonl.gz"
    with gzip.open(path, "wb") as stream:
        for _ in range(64):
            stream.write(b"\n" * 2**20)
    small = type("Memory", (), {"available": 64 * 2**20})()
    monkeypatch.setattr("psutil.virtual_memory", lambda: small)
    found = told(path)
    assert found is not None and "do not fit into the memory" in found


def test_rows_that_use_up_the_memory_are_refused_while_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, head, row in (("a.jsonl", "", '{"text": 1}\n'), ("a.csv", "text\n", "1\n")):
        path = tmp_path / name
        path.write_text(head + row * 70_000)
        looks = iter([2**40, 2**20])
        memory = type("Memory", (), {"available": property(lambda self: next(looks))})()  # noqa: B023
        monkeypatch.setattr("psutil.virtual_memory", lambda: memory)  # noqa: B023
        found = told(path)
        assert found is not None and "do not fit into the memory" in found


@pytest.mark.parametrize("line", ["text", "junk", "nested"])
@pytest.mark.sample(1)
def test_a_line_of_100_mb_takes_bounded_memory(tmp_path: Path, line: str) -> None:
    path = tmp_path / "train.jsonl"
    with path.open("wb") as stream:
        stream.write(GOOD)
        if line == "text":
            stream.write(b'{"prompt": "' + b"x" * LONG_LINE + b'", "completion": "y"}\n')
        else:
            stream.write({"junk": b"x", "nested": b"[[],"}[line] * (LONG_LINE // len(line)))
    program = (
        f"import resource, sys; sys.path[:0] = {sys.path!r}\n"
        f"from pathlib import Path; from test_input_data import told\n"
        f"before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"print(told(Path({str(path)!r})))\n"
        f"print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    words, grown = done.stdout.rsplit("\n", 2)[:2]
    expected = {"text": "characters", "junk": "line 31: not valid JSON", "nested": "line 31: not"}
    assert expected[line] in words
    assert int(grown) * 1024 < 10 * LONG_LINE, f"{int(grown) / 1024:.0f} MiB"


def test_long_texts_are_tokenised_a_few_at_a_time() -> None:
    """As many as fit, in their order, none left out; a longer one by itself."""
    texts = ["a" * size for size in (1, CHARACTERS - 1, 1, CHARACTERS, 2, 2, 2)]
    assert [(part.start, part.stop) for part in _calls(texts, None)] == [
        (0, 2), (2, 3), (3, 4), (4, 7),
    ]  # fmt: skip
    assert [part.stop for part in _calls(["a"] * 2500, ["b"] * 2500)] == [1000, 2000, 2500]
    assert list(_calls([], None)) == []
