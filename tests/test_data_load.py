"""Rows come from everywhere they may be, never from a test split, and errors say what to do."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from rsauto.config import DataConfig
from rsauto.data import Splits, load_rows, splits_from_objects
from rsauto.data.load import is_test
from rsauto.errors import InputError

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"


def rows(count: int, tag: str = "") -> list[dict[str, Any]]:
    return [{"prompt": f"{tag}{i}:", "completion": f" {i}"} for i in range(count)]


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in records), encoding="utf-8")
    return path


def write_gzip(path: Path, records: list[dict[str, Any]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in records)


def write_csv(path: Path, records: list[dict[str, Any]]) -> None:
    lines = [f'"{row["prompt"]}",{row["completion"]}' for row in records]
    path.write_text("\n".join(["prompt,completion", *lines]), encoding="utf-8")


def write_parquet(path: Path, records: list[dict[str, Any]]) -> None:
    datasets.Dataset.from_list(records).to_parquet(str(path))


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Any]] = {
    "a.jsonl": write_lines,
    "b.json": lambda path, records: path.write_text(json.dumps(records, indent=1)),
    "lines.json": write_lines,
    "wrapped.json": lambda path, records: path.write_text(json.dumps({"v": 1, "data": records})),
    "c.csv": write_csv,
    "d.parquet": write_parquet,
    "e.jsonl.gz": write_gzip,
    "BOM.JSONL": lambda path, records: path.write_bytes(
        b"\xef\xbb\xbf" + "\r\n\r\n".join(json.dumps(row) for row in records).encode()
    ),
}


def content(splits: Splits) -> set[tuple[str, str]]:
    return {(row.prompt, row.completion) for row in (*splits.train, *splits.validation)}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_type_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, rows(40))
    splits = load_rows(DataConfig(name=str(tmp_path / name)))
    assert (len(splits.train), len(splits.validation)) == (36, 4)
    assert content(splits) == {(row["prompt"], row["completion"]) for row in rows(40)}
    assert name in splits.train_source
    assert "4 rows held back" in splits.validation_source


@pytest.mark.parametrize("name", ["values.jsonl", "values.csv"])
def test_values_are_not_reinterpreted(name: str, tmp_path: Path) -> None:
    # The builders of `datasets` turn these into datetimes, nulls, 7 and 1.0.
    values = ["2020-01-01", "NA", "null", "007", "1.50"] * 4
    if name.endswith("csv"):
        (tmp_path / name).write_text("text\n" + "\n".join(values))
    else:
        write_lines(tmp_path / name, [{"text": value} for value in values])
    splits = splits_of(tmp_path / name, validation=tmp_path / name, count=20)
    assert {row.completion for row in splits.train} == set(values)


def splits_of(path: Path, validation: Path, count: int) -> Splits:
    folder = path.parent / "copy"
    folder.mkdir()
    copy = folder / path.name
    copy.write_bytes(validation.read_bytes())
    return load_rows(DataConfig(name=str(path), validation_file=str(copy), validation_rows=count))


def test_line_separators_inside_json_strings_do_not_break_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"{i}\u2028\x85b"}, ensure_ascii=False) for i in range(20)]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert len(load_rows(DataConfig(name=str(path))).train) == 18


def test_folder_splits_by_name_and_test_is_not_read(tmp_path: Path) -> None:
    write_lines(tmp_path / "train-00000-of-00002.jsonl", rows(5, "a"))
    write_lines(tmp_path / "train-00001-of-00002.jsonl", rows(5, "b"))
    write_lines(tmp_path / "dev.jsonl", rows(3, "v"))
    (tmp_path / "test.jsonl").write_text("reading this would fail")
    (tmp_path / "README.md").write_text("no data")
    splits = load_rows(DataConfig(name=str(tmp_path)))
    assert (len(splits.train), len(splits.validation), splits.test_name) == (10, 3, "test")
    assert splits.validation_source.endswith("dev.jsonl, all 3 rows")
    named = load_rows(DataConfig(name=str(tmp_path), train_split="dev", validation_split="train"))
    assert (len(named.train), len(named.validation)) == (3, 10)


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        (["test.jsonl"], {}, r"'.*: test' is a test split by its name"),
        (["train.jsonl"], {"validation_split": "vali"}, r"no split 'vali'\. There are train"),
        (["data.jsonl"], {}, r"train_split: .* has no split 'train'\. There are data"),
        (["train.jsonl"], {"train_split": "train[:10%]"}, "Slices are not supported; max_train"),
        (["train.jsonl", "train.csv"], {}, "train.csv and train.jsonl .* are the same split"),
        (["train.jsonl", "dev.jsonl", "valid.jsonl"], {}, "more than one validation split: dev, v"),
        (["train.jsonl"], {"validation_split": "train"}, "cannot be both"),
        (["train.jsonl"], {"subset": "main"}, r"data\.subset: 'main' has no effect"),
        (["notes.md"], {}, "has no data file.*train.jsonl"),
        (["train.jsonl", "my_test.csv"], {"validation_split": "my_test"}, "no split 'my_test'"),
    ],
)
def test_folders_that_are_unclear_are_refused(
    files: list[str], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    for name in files:
        write_lines(tmp_path / name, rows(30))
    with pytest.raises(InputError, match=message):
        load_rows(DataConfig(name=str(tmp_path), **settings))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("test", True),
        ("test-00000-of-00001", True),
        ("sst2_test", True),
        ("Testing", True),
        ("testimonials", False),
        ("latest", False),
        ("ab_test_results", False),
        ("train", False),
    ],
)
def test_test_splits_are_known_by_their_words(name: str, expected: bool) -> None:
    assert is_test(name) is expected


def test_a_test_file_is_refused_wherever_it_is_named(tmp_path: Path) -> None:
    test = write_lines(tmp_path / "test.jsonl", rows(30))
    train = write_lines(tmp_path / "train.jsonl", rows(30))
    with pytest.raises(InputError, match=r"data\.name: .* is a test split by its name"):
        load_rows(DataConfig(name=str(test)))
    with pytest.raises(InputError, match=r"data\.validation_file: .* is a test split"):
        load_rows(DataConfig(name=str(train), validation_file=str(test)))
    with pytest.raises(InputError, match=r"data\.validation_file: .* is data\.name too"):
        load_rows(DataConfig(name=str(train), validation_file=str(train)))
    of_test = datasets.Dataset.from_list(rows(3), split="test")
    with pytest.raises(InputError, match="validation: 'test' is a test split"):
        splits_from_objects(rows(3), of_test, DataConfig())


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b" "c"}\n', "line 3: not valid JSON: Expecting"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "line 2: a row must be an object"),
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b" \n\n", "the file is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2: not valid UTF-8. It may be L"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "line 1: not valid UTF-8. It looks like U"),
        ("a.jsonl", b"[" * 99999, "line 1: not usable as JSON"),
        ("a.json", b'[\n{"text": "a"},\n{"text": }]', "line 3: not valid JSON"),
        ("a.json", b'{"text": "a"}\n{"text": }', "line 2: not valid JSON"),
        ("a.json", b"[]", "has no rows"),
        ("a.json", b'{"q": {"0": "a"}}', 'one object with the keys .q., .*orient="records"'),
        ("a.json", b'{"train": [], "test": []}', "one file per split"),
        ("a.json", b'[{"text": "a"}, 5]', "row 2 is a int, not an object"),
        ("a.csv", b"text,label\na,1\nb,2,3\n", "line 3: 3 fields, but the header has 2"),
        ("a.csv", b"text\n", "has no rows"),
        ("a.csv", b"text,text\na,b\n", "names 'text' twice"),
        ("a.csv", b"text;label\na;1\n", "separated by ';'"),
        ("a.csv", b'text\n"a\n', "not valid CSV"),
        ("a.parquet", b"PAR1 no", "cannot be read as Parquet"),
        ("a.jsonl.gz", b"no gzip", "the gzip data is damaged"),
        ("a.jsonl.gz", gzip.compress(b"x" * 999, mtime=0)[:20], "the gzip data is damaged"),
        ("a.txt", b"text", r"is no data file that rsauto reads.*\.jsonl.*one .\"text\""),
        ("a.jsonl", b'{"text": "a"}\n' * 9, "9 rows are too few to hold a tenth back"),
        ("a.jsonl", b'{"text": "a"}\n' * 30, "rows repeat each other"),
    ],
)
def test_unusable_files_say_where_and_why(
    name: str, data: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        load_rows(DataConfig(name=str(path)))
    assert name in str(caught.value)


def test_missing_files_name_the_nearest(tmp_path: Path) -> None:
    write_lines(tmp_path / "reviews.jsonl", rows(30))
    with pytest.raises(InputError, match=r"data\.name: .*Did you mean 'reviews\.jsonl'\?"):
        load_rows(DataConfig(name=str(tmp_path / "review.jsonl")))
    with pytest.raises(InputError, match="nor does the folder"):
        load_rows(DataConfig(name=str(tmp_path / "no" / "review.jsonl")))
    with pytest.raises(InputError, match=r"data\.validation_file: .* does not exist"):
        load_rows(
            DataConfig(
                name=str(tmp_path / "reviews.jsonl"), validation_file=str(tmp_path / "v.csv")
            )
        )


def split_hash(splits: Splits) -> str:
    numbers = [[row.number for row in part] for part in (splits.train, splits.validation)]
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()


def test_held_back_rows_are_frozen_and_leave_training() -> None:
    splits = splits_from_objects(rows(300), None, DataConfig(validation_rows=20))
    # Of the row numbers; must never change, or a resumed study would be trained on other rows.
    assert split_hash(splits)[:16] == "81b6f6d93fb8b9a9"
    held = {row.number for row in splits.validation}
    assert (len(splits.train), len(held)) == (280, 20)
    assert held.isdisjoint(row.number for row in splits.train)
    assert held != set(range(1, 21))
    other = splits_from_objects(rows(300), None, DataConfig(validation_rows=20, split_seed=1))
    assert split_hash(other) != split_hash(splits)


def test_no_more_than_a_tenth_is_held_back_and_no_copy_of_it_is_trained_on() -> None:
    splits = splits_from_objects(rows(50), None, DataConfig(validation_rows=20))
    assert len(splits.validation) == 5
    doubled = splits_from_objects(rows(50) * 2, None, DataConfig())
    held = {(row.prompt, row.completion) for row in doubled.validation}
    assert held.isdisjoint((row.prompt, row.completion) for row in doubled.train)
    assert "equal to held back rows left out" in doubled.train_source


def test_large_splits_are_sampled_and_rows_keep_their_numbers() -> None:
    config = DataConfig(validation_rows=10, max_train_rows=30)
    train, validation = rows(100), rows(60, "v")
    splits = splits_from_objects(datasets.Dataset.from_list(train), validation, config)
    assert (len(splits.train), len(splits.validation)) == (30, 10)
    assert [row.number for row in splits.train] != list(range(1, 31))
    assert [row.number for row in splits.validation] != list(range(1, 11))
    for row in splits.train:
        assert row.prompt == train[row.number - 1]["prompt"]
    assert splits == splits_from_objects(train, validation, config)
    assert splits.train_source == "train rows, 30 of 100 rows"


def test_a_dataset_needs_only_its_used_columns_to_be_plain() -> None:
    table = datasets.Dataset.from_list([{"text": str(i), "tags": ["a"]} for i in range(30)])
    splits = splits_from_objects(table, None, DataConfig())
    assert splits.unused_columns == ("tags",)


def test_objects_of_another_kind_are_refused() -> None:
    with pytest.raises(InputError, match=r"train: a DatasetDict .*needed"):
        splits_from_objects(datasets.DatasetDict(), None, DataConfig())
    with pytest.raises(InputError, match="train: a str was given"):
        splits_from_objects("train.jsonl", None, DataConfig())
    with pytest.raises(InputError, match="train rows: there are no rows"):
        splits_from_objects([], None, DataConfig())
    with pytest.raises(InputError, match="validation rows: has no column 'completion'"):
        splits_from_objects(rows(3), [{"prompt": "p"}], DataConfig())


def test_embedded_task_needs_nothing_but_this_package() -> None:
    task = pytest.importorskip("rsauto.embedded.task")
    if not hasattr(task, "load_split"):
        pytest.skip("the embedded task is not there")
    splits = load_rows(DataConfig())
    assert len(splits.train) == len(task.load_split("train"))
    assert {row.prompt for row in splits.validation} <= {
        row["prompt"] for row in task.load_split("validation")
    }


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not there")
def test_gsm8k_with_and_without_a_template() -> None:
    splits = load_rows(DataConfig(name=str(GSM8K)))
    lines = (GSM8K / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert (len(splits.train), len(splits.validation)) == (len(lines) - 200, 200)
    first = splits.train[0]
    record = json.loads(lines[first.number - 1])
    assert (first.prompt, first.completion) == (record["question"] + "\n", record["answer"])
    assert splits.test_name == "test"
    file = str(GSM8K / "train.jsonl")
    config = DataConfig(name=file, prompt="Q: {question} A:", completion="answer")
    assert load_rows(config).train[0].prompt == f"Q: {record['question']} A:"
    tests = (GSM8K / "test.jsonl").read_text(encoding="utf-8").splitlines()
    questions = {json.loads(line)["question"] + "\n" for line in tests}
    assert questions.isdisjoint(prompt for prompt, _ in content(splits))
