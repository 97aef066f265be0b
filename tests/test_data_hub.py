"""Datasets from the hub: what is read of them, and every way of not getting them, on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hub_server import Accident, Files, Hub, Reader

SUBSETS = b"""---
configs:
- config_name: main
  data_files: main/*.jsonl
- config_name: socratic
  data_files: socratic/*.jsonl
---
"""
SPLITS = b"""---
configs:
- config_name: default
  data_files:
  - {split: train_sft, path: train_sft.jsonl}
  - {split: validation, path: validation.jsonl}
  - {split: test, path: test.jsonl}
---
"""


def rows(tag: str, count: int = 30) -> bytes:
    return "".join(
        f'{{"prompt": "{tag}{n}", "completion": "{n}"}}\n' for n in range(count)
    ).encode()


def dataset(tag: str, **files: bytes) -> Files:
    return {"README.md": tag.encode(), "train.jsonl": rows(tag), **files}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    splits = {f"{name}.jsonl": rows(name[0]) for name in ("train_sft", "validation", "test")}
    with Hub() as hub:
        for name in ("good", "busy", "limited", "late", "cut", "large"):
            hub.dataset(f"some/{name}", dataset(name))
        hub.dataset("some/cardless", {"train.jsonl": rows("plain")})
        hub.dataset("some/splits", {"README.md": SPLITS, **splits})
        hub.dataset("some/exam", {"test.jsonl": rows("x")})
        hub.dataset("some/void", dataset("t", **{"validation.jsonl": b""}))
        hub.dataset("some/gated", dataset("g"), access="gated")
        hub.dataset("some/locked", dataset("g"), access="gated", open_files=("README.md",))
        hub.dataset("some/private", dataset("p"), access="private")
        hub.dataset("some/script", {"README.md": b"", "script.py": b"import datasets"})
        hub.dataset("some/empty", {"README.md": b""})
        hub.dataset("some/broken", {"train.jsonl": b'{"prompt": "a", \n{{{'})
        subsets = {f"{name}/train.jsonl": rows(name[0]) for name in ("main", "socratic")}
        hub.dataset("some/subsets", {"README.md": SUBSETS, **subsets})
        yield hub


@pytest.fixture(scope="module")
def reader(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with Reader(hub, tmp_path_factory.mktemp("home")) as reader:
        yield reader


@pytest.fixture(autouse=True)
def nothing_goes_wrong(hub: Hub) -> Iterator[None]:
    yield
    hub.accidents.clear()


def tags(said: dict[str, Any]) -> set[str]:
    """What the prompts of the training rows begin with."""
    return {prompt.rstrip("0123456789") for prompt in said["prompts"]}


def test_splits_are_found_and_test_is_left_alone(reader: Reader) -> None:
    said = reader.data("some/splits")
    assert tags(said) == {"t"}
    assert said["source"] == "some/splits, split train_sft, all 30 rows"


def test_a_dataset_is_read_at_its_revision(hub: Hub, reader: Reader) -> None:
    repository = hub.dataset("some/moving", dataset("old"))
    old = repository.references["main"]
    repository.references["v1"] = old
    repository.push(dataset("new"), "main", "refs/pr/3")
    found = {
        revision: tags(reader.data("some/moving", revision=revision))
        for revision in (None, "v1", old, "refs/pr/3")
    }
    assert found == {None: {"new"}, "v1": {"old"}, old: {"old"}, "refs/pr/3": {"new"}}
    assert reader.data("some/moving", revision="v1")["source"].startswith("some/moving@v1, split")


def test_a_subset_is_read_by_its_name(reader: Reader) -> None:
    said = reader.data("some/subsets", subset="socratic")
    assert tags(said) == {"s"}
    assert said["source"].startswith("some/subsets/socratic, split train")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("nothing", {}, ["no dataset on the hub, or a private one, which looks the", "HF_TOKEN"]),
        ("private", {}, ["no dataset on the hub, or a private one"]),
        ("gated", {}, ["is gated. Ask for access on {url}/datasets/some/gated, then log in"]),
        ("locked", {}, ["is gated. Ask for access on {url}/datasets/some/locked, then log in"]),
        ("gated", {"token": Hub.stranger}, ["your token has no access to it. Ask for access on"]),
        ("locked", {"token": Hub.stranger}, ["your token has no access to it. Ask for access on"]),
        ("good", {"token": "hf_expired"}, ["the hub does not accept it"]),
        ("good", {"revision": "v9"}, ["no revision 'v9'", "without a revision, main is read"]),
        ("subsets", {}, ["Choose data.subset. There are main, socratic."]),
        ("subsets", {"subset": "man"}, ["Did you mean 'main'? There are main, socratic."]),
        ("script", {}, ["is loaded by a script", "refs/convert/parquet"]),
        (
            "empty",
            {},
            ["has no data file that datasets can read", "{url}/datasets/some/empty/tree"],
        ),
        ("broken", {}, ["could not be read: ValueError: Expected object or value"]),
        ("exam", {}, ["is a test split by its name"]),
        ("void", {}, ["its split 'validation' has no rows"]),
    ],
)
def test_what_cannot_be_read_is_told(
    name: str, options: dict[str, Any], words: list[str], hub: Hub, reader: Reader
) -> None:
    said = reader.data(f"some/{name}", **options)
    assert said.get("type") == "InputError", said
    field = next((key for key in ("subset", "revision") if key in options), "name")
    assert said["error"].startswith(f"data.{field}: ")
    for part in words:
        assert part.format(url=hub.url) in said["error"]


@pytest.mark.parametrize("name", ["gated", "locked", "private"])
def test_a_token_with_access_opens_what_is_closed(name: str, reader: Reader) -> None:
    assert "prompts" in reader.data(f"some/{name}", token=Hub.granted)


@pytest.mark.parametrize(
    ("name", "file", "accident", "words"),
    [
        ("busy", "README.md", {"status": 503}, "has a problem of its own (503). Try again later"),
        ("limited", "README.md", {"status": 429}, "too many requests from here (429). Try again"),
        ("late", "train.jsonl", {"status": 503}, "has a problem of its own (503). Try again later"),
        ("cut", "train.jsonl", {"cut_after": 100}, "the connection broke off. The same command"),
    ],
)
def test_after_an_accident_the_same_command_reads_it(
    name: str, file: str, accident: dict[str, Any], words: str, hub: Hub, reader: Reader
) -> None:
    hub.accidents.append(Accident(f"(GET|HEAD) .*some/{name}/resolve/.*/{file}", **accident))
    said = reader.data(f"some/{name}")
    assert (said.get("type"), words in said.get("error", "")) == ("InputError", True), said
    hub.accidents.clear()
    assert tags(reader.data(f"some/{name}")) == {name}


def test_a_full_disk_names_the_folder(reader: Reader) -> None:
    said = reader.data("some/large", file_limit=300)
    assert (said.get("type"), "HF_HOME" in said.get("error", "")) == ("InputError", True), said
    assert f"no room for it in {reader.home}" in said["error"]
    assert tags(reader.data("some/large")) == {"large"}


def test_without_a_network_the_cache_answers_with_the_same_commit(hub: Hub, reader: Reader) -> None:
    repository = hub.dataset("some/kept", dataset("old"))
    old = repository.references["main"]
    repository.references["v1"] = old
    assert tags(reader.data("some/kept", revision="v1")) == {"old"}
    repository.push(dataset("new"))
    assert tags(reader.data("some/kept")) == {"new"}
    assert tags(reader.data("some/cardless")) == {"plain"}
    assert tags(reader.data("some/subsets", subset="socratic")) == {"s"}

    def read_all(reader: Reader, why: str) -> None:
        assert tags(reader.data("some/kept")) == {"new"}
        assert tags(reader.data("some/kept", revision="v1")) == {"old"}
        assert tags(reader.data("some/kept", revision=old)) == {"old"}
        assert tags(reader.data("some/cardless")) == {"plain"}
        assert tags(reader.data("some/subsets", subset="socratic")) == {"s"}
        for name, options, words in [
            ("kept", {"revision": "v2"}, "data.revision: the hub cannot be reached, and the cache"),
            ("subsets", {"subset": "main"}, "the hub cannot be reached. The cache has socratic."),
            ("other", {}, why),
        ]:
            said = reader.data(f"some/{name}", **options)
            assert (said.get("type"), words in said.get("error", "")) == ("InputError", True), said

    with hub.unreachable():
        read_all(reader, f"the hub at {hub.url} cannot be reached. Check the network")
    num_requests = len(hub.requests)
    with Reader(hub, reader.home, offline=True) as offline:
        read_all(offline, "HF_HUB_OFFLINE forbids to ask the hub. Unset it")
    assert len(hub.requests) == num_requests
