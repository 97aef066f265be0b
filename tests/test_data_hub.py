"""What the hub gives, and every way of not getting it, without a network."""

from __future__ import annotations

from typing import Any

import datasets
import huggingface_hub.constants
import pytest
from datasets.exceptions import DatasetNotFoundError

from rsauto.config import DataConfig
from rsauto.data import load_rows
from rsauto.errors import InputError


def answer_with(monkeypatch: pytest.MonkeyPatch, result: Any) -> list[tuple[Any, ...]]:
    """Make datasets.load_dataset return or raise `result`; its calls are recorded."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, subset: str | None, revision: str | None) -> Any:
        calls.append((name, subset, revision))
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def split(count: int, tag: str) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [{"question": f"{tag}{i}", "answer": str(i), "id": i} for i in range(count)]
    )


def test_hub_splits_are_found_and_test_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = datasets.DatasetDict(
        train_sft=split(30, "t"), validation=split(5, "v"), test=split(5, "x")
    )
    calls = answer_with(monkeypatch, found)
    splits = load_rows(DataConfig(name="someone/maths", subset="main", revision="abc"))
    assert calls == [("someone/maths", "main", "abc")]
    assert {row.prompt[0] for row in splits.train} == {"t"}
    assert {row.prompt[0] for row in splits.validation} == {"v"}
    assert splits.test_name == "test"
    assert splits.train_source == "someone/maths/main@abc, split train_sft, all 30 rows"


def test_only_a_test_split_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, datasets.DatasetDict(test=split(30, "x")))
    with pytest.raises(InputError, match="is a test split by its name"):
        load_rows(DataConfig(name="someone/maths"))


def test_an_empty_split_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = split(1, "v").select([])
    answer_with(monkeypatch, datasets.DatasetDict(train=split(30, "t"), validation=empty))
    with pytest.raises(InputError, match="split validation: there are no rows"):
        load_rows(DataConfig(name="someone/maths"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ValueError("BuilderConfig 'mian' not found. Available: ['main', 'socratic']"),
            r"data\.subset: 'mian' is no subset .*Did you mean 'main'\? There are main, socratic",
        ),
        (DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."), "is gated. Ask"),
        (DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"), "no dataset of that name"),
        (DatasetNotFoundError("Revision 'r' doesn't exist for"), r"data\.revision: a/b has no rev"),
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "HF_HUB_OFFLINE"),
        (RuntimeError("Dataset scripts are no longer supported"), "refs/convert/parquet"),
        (KeyError("odd"), "data.name: a/b could not be loaded: KeyError"),
    ],
)
def test_hub_errors_say_what_to_do(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(monkeypatch, error)
    with pytest.raises(InputError, match=message):
        load_rows(DataConfig(name="a/b", subset="mian", revision="r"))


def test_a_missing_subset_lists_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = "Config name is missing.\nPlease pick one among the available configs: ['x', 'y']"
    answer_with(monkeypatch, ValueError(missing))
    with pytest.raises(InputError, match=r"several subsets: choose one\. There are x, y"):
        load_rows(DataConfig(name="a/b"))


def test_offline_is_explained_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # What HF_HUB_OFFLINE=1 sets when the libraries are imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="'nobody/nothing' is no file or folder here, and"):
        load_rows(DataConfig(name="nobody/nothing"))
