"""Models from the hub: which commit is read, and every way of not getting it, on loopback."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Accident, Files, Hub, Reader
from tiny_study import rows, study_values, write_model

from rsauto.hub import Repository, explain

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Of a random model with a tokenizer."""
    return read(write_model(tmp_path_factory.mktemp("model")))


def read(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without(files: Files, *parts: str) -> Files:
    return {name: content for name, content in files.items() if not any(p in name for p in parts)}


def with_template(files: Files, template: str) -> Files:
    """The same model with a chat template, which is in the tokenizer's configuration."""
    settings = json.loads(files["tokenizer_config.json"]) | {"chat_template": template}
    return files | {"tokenizer_config.json": json.dumps(settings).encode()}


def sharded(folder: Path, files: Files) -> Files:
    """The same model in several files of weights."""
    from transformers import LlamaForCausalLM

    for name, content in files.items():
        (folder / name).write_bytes(content)
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder / "out", max_shard_size="80KB")
    return without(files, "model.safetensors") | read(folder / "out")


@pytest.fixture(scope="module")
def hub(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    shards = sharded(tmp_path_factory.mktemp("shards"), files)
    last = max(name for name in shards if name.endswith(".safetensors"))
    base = json.dumps({"base_model_name_or_path": "someone/base"}).encode()
    with Hub() as hub:
        for name in ("good", "busy", "limited", "silent", "cut", "large", "kept", "half"):
            hub.model(f"some/{name}", files)
        hub.model("some/gated", files, access="gated")
        hub.model("some/private", files, access="private")
        hub.model("some/gguf", {"README.md": b"", "model.Q4_K_M.gguf": b"GGUF"})
        hub.model("some/adapter", {"adapter_config.json": base, "adapter_model.safetensors": b""})
        hub.model("some/pickles", without(files, ".safetensors") | {"pytorch_model.bin": b""})
        hub.model("some/code", files | {"config.json": b'{"model_type": "brand_new"}'})
        hub.model("some/mute", without(files, "tokenizer"))
        hub.model("some/empty", without(files, ".safetensors"))
        hub.model("some/torn", without(shards, last))
        hub.model("some/shards", shards)
        hub.model("some/chatty", with_template(files, "{{ messages }}"))
        yield hub


@pytest.fixture(scope="module")
def reader(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with Reader(hub, tmp_path_factory.mktemp("home")) as reader:
        yield reader


@pytest.fixture(autouse=True)
def nothing_goes_wrong(hub: Hub) -> Iterator[None]:
    yield
    hub.accidents.clear()


def test_all_files_are_read_at_the_commit_of_the_revision(
    hub: Hub, reader: Reader, files: Files, tmp_path: Path
) -> None:
    # Other weights and another chat template, under the same configuration.
    weights = {"model.safetensors": read(write_other_model(tmp_path))["model.safetensors"]}
    repository = hub.model("some/two", with_template(files, "old"))
    old = repository.references["main"]
    repository.references["v1"] = old
    new = repository.push(with_template(files | weights, "new"), "main", "refs/pr/3")
    found = {
        revision: reader.model("some/two", revision=revision, weights=True)
        for revision in (None, "v1", old, "refs/pr/3")
    }
    assert found[None] == found["refs/pr/3"] == {**found[None], "fingerprint": new, "chat": "new"}
    assert found["v1"] == found[old] == {**found[old], "fingerprint": old, "chat": "old"}
    assert found[None]["weight"] != found["v1"]["weight"]
    # Only the first file is asked for by the name of a branch, which may move meanwhile.
    by_name = hub.asked("/some/two/resolve/(main|v1|refs)")
    assert {one.path.rsplit("/", 1)[1] for one in by_name} == {"config.json"}


def write_other_model(folder: Path) -> Path:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(write_model(folder))
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] += 1
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("some/nothing", {}, ["some/nothing is no model on the hub, or a private", "HF_TOKEN"]),
        ("some/private", {}, ["no model on the hub, or a private one", "`hf auth login`"]),
        ("some/gated", {}, ["is gated. Ask for access on {url}/some/gated, then log in"]),
        ("some/gated", {"token": Hub.stranger}, ["your token has no access to it. Ask for access"]),
        ("some/good", {"token": "hf_expired"}, ["the hub does not accept it. Use `hf auth login`"]),
        ("some/good", {"revision": "v9"}, ["no revision 'v9'", "without a revision, main is read"]),
        ("some name", {}, ["some name is no hub id. One looks like Qwen/"]),
        ("some/gguf", {}, ["has no config.json", "It holds README.md, model.Q4_K_M.gguf", "GGUF"]),
        ("some/adapter", {}, ["is an adapter", "Give its base model, someone/base."]),
        ("some/pickles", {}, ["reads safetensors only", "save_pretrained", "to refs/pr/ and its"]),
        ("some/empty", {}, ["has no weights"]),
        ("some/mute", {}, ["no tokenizer of 'some/mute' could be read", "Its files must be there"]),
        ("some/code", {}, ["no configuration of 'some/code'", "brand_new"]),
        ("some/torn", {}, ["is not complete", "model-00003-of-00003.safetensors is missing"]),
    ],
)
def test_what_cannot_be_read_is_told_before_weights_are(
    name: str, options: dict[str, Any], words: list[str], hub: Hub, reader: Reader
) -> None:
    said = reader.model(name, **options)
    assert said.get("type") == "InputError", said
    field = "model.revision" if options.get("revision") else "model.name"
    assert said["error"].startswith(f"{field}: ")
    for part in words:
        assert part.format(url=hub.url) in said["error"]


@pytest.mark.parametrize("name", ["some/gated", "some/private"])
def test_a_token_with_access_opens_what_is_closed(name: str, reader: Reader) -> None:
    assert "fingerprint" in reader.model(name, token=Hub.granted)


@pytest.mark.parametrize(
    ("name", "accident", "words"),
    [
        ("busy", {"status": 503}, "the hub has a problem of its own (503). Try again later"),
        ("limited", {"status": 429}, "too many requests from here (429). Try again in some"),
        ("silent", {"silent_seconds": 2.5}, "the hub did not answer in time. The same command"),
    ],
)
def test_a_hub_in_trouble_asks_to_try_again(
    name: str, accident: dict[str, Any], words: str, hub: Hub, reader: Reader
) -> None:
    # The list of files is asked for without repetition: one silence is enough.
    path = "GET /api/models/some/silent" if name == "silent" else f"some/{name}/resolve"
    hub.accidents.append(Accident(path, **accident))
    said = reader.model(f"some/{name}")
    assert (said.get("type"), words in said.get("error", "")) == ("InputError", True), said
    hub.accidents.clear()
    assert "fingerprint" in reader.model(f"some/{name}")


def test_a_tokenizer_that_comes_in_parts_is_not_taken_for_whole(hub: Hub, reader: Reader) -> None:
    hub.accidents.append(Accident("some/chatty/resolve/.*/tokenizer_config.json", status=500))
    assert "problem of its own (500)" in reader.model("some/chatty")["error"]
    hub.accidents.clear()
    assert reader.model("some/chatty")["chat"] == "{{ messages }}"


def test_a_cut_download_goes_on_where_it_broke_off(hub: Hub, reader: Reader) -> None:
    weights = "GET /some/cut/resolve/.*/model.safetensors"
    hub.accidents.append(Accident(weights, times=2, cut_after=50_000))
    said = reader.model("some/cut", weights=True)
    assert said["weight"] == reader.model("some/good", weights=True)["weight"]
    ranges = [one.range for one in hub.asked(weights)]
    assert ranges == [None, "bytes=50000-", "bytes=100000-"]


def test_complete_files_survive_a_download_that_is_given_up(hub: Hub, reader: Reader) -> None:
    hub.accidents.append(Accident("GET /some/shards/.*/model-00002-of-", cut_after=0))
    said = reader.model("some/shards", weights=True)
    assert said.get("type") == "InputError", said
    assert "the connection broke off. The same command tries again, and keeps" in said["error"]
    hub.accidents.clear()
    again = reader.model("some/shards", weights=True)
    assert again["weight"] == reader.model("some/good", weights=True)["weight"]
    assert len(hub.asked("GET /some/shards/.*/model-00001-of-")) == 1


def test_a_full_disk_names_the_folder(reader: Reader) -> None:
    said = reader.model("some/large", weights=True, file_limit=20_000)
    assert said.get("type") == "InputError", said
    assert f"no room for it in {reader.home}" in said["error"]
    assert "HF_HOME" in said["error"]
    assert "weight" in reader.model("some/large", weights=True)


def test_without_a_network_the_cache_answers(
    hub: Hub, reader: Reader, files: Files, tmp_path: Path
) -> None:
    repository = hub.model("some/kept", with_template(files, "old"))
    old = repository.references["main"]
    repository.references["v1"] = old
    tagged = reader.model("some/kept", revision="v1", weights=True)
    repository.push(with_template(files, "new"))
    online = reader.model("some/kept", weights=True)
    assert (tagged["chat"], online["chat"]) == ("old", "new")
    reader.model("some/half")
    with hub.unreachable():
        assert reader.model("some/kept", weights=True) == online
        assert reader.model("some/kept", revision="v1", weights=True) == tagged
        for name in ("some/half", "some/other"):
            error = reader.model(name, weights=True)["error"]
            assert f"{name} is not, or not wholly, in the cache {reader.home}" in error
            assert f"the hub at {hub.url} cannot be reached" in error
    num_requests = len(hub.requests)
    with Reader(hub, reader.home, offline=True) as offline:
        assert offline.model("some/kept", weights=True) == online
        assert offline.model("some/kept", revision="v1", weights=True) == tagged
        assert offline.model("some/kept", revision=old, weights=True) == tagged
        for name, options in (("half", {}), ("other", {}), ("kept", {"revision": "v2"})):
            error = offline.model(f"some/{name}", weights=True, **options)["error"]
            assert "is not, or not wholly, in the cache" in error
            assert "HF_HUB_OFFLINE forbids to ask the hub. Unset it" in error
    assert len(hub.requests) == num_requests


def test_folders_are_held_to_the_same(reader: Reader, files: Files, tmp_path: Path) -> None:
    folders = {
        "pickles": without(files, ".safetensors") | {"pytorch_model.bin": b""},
        "adapter": {"adapter_config.json": b'{"base_model_name_or_path": "someone/base"}'},
        "other": {"notes.txt": b""},
        "broken": files | {"model.safetensors": files["model.safetensors"][:1000]},
    }
    for name, content in folders.items():
        (tmp_path / name).mkdir()
        for file, written in content.items():
            (tmp_path / name / file).write_bytes(written)
    for path, options, words in [
        ("pickles", {}, "PyTorch pickles only"),
        ("adapter", {}, "is an adapter, not a model"),
        ("other", {}, "has no config.json, so it is not a Hugging Face model. It holds: notes.txt"),
        ("broken", {"weights": True}, "cannot be loaded"),
        ("brokem", {}, f"Did you mean '{tmp_path}/broken'?"),
        ("broken/model.safetensors", {}, "is a file. Give the folder"),
        ("broken", {"revision": "v1"}, "model.revision: 'v1' has no effect"),
    ]:
        said = reader.model(str(tmp_path / path), **options)
        assert (said.get("type"), words in said.get("error", "")) == ("InputError", True), said


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(errno.EACCES, "denied"), "cannot be written"),
        (OSError(errno.EROFS, "read-only"), "Set HF_HOME to a folder that can"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "there is no room"),
        (OSError("Consistency check failed: file should be"), "the connection broke off"),
        (KeyError("odd"), None),
    ],
)
def test_errors_that_need_another_machine_to_happen(error: Exception, words: str | None) -> None:
    wrapped = OSError("Can't load the model")
    wrapped.__cause__ = error
    said = explain(wrapped, Repository("model", "some/model", None))
    assert said is None if words is None else said is not None and words in said


def test_a_study_stops_at_a_cut_download_and_the_same_one_goes_on(
    hub: Hub, reader: Reader, files: Files, tmp_path: Path
) -> None:
    base = hub.model("some/base", files)
    lines = "".join(json.dumps(row) + "\n" for row in rows(64)).encode()
    hub.dataset("some/rows", {"README.md": b"", "train.jsonl": lines})
    values = study_values(tmp_path, trials=1)
    values["model"] = {"name": "some/base"}
    values["data"] = {"name": "some/rows", "max_length": 32}
    hub.accidents.append(Accident("GET .*/model.safetensors", cut_after=0))
    said = reader.study(values, tmp_path / "out")
    assert said.get("type") == "InputError", said
    assert "model.name: some/base could not be downloaded: the connection" in said["error"]
    hub.accidents.clear()
    ran_on = reader.study(values, tmp_path / "out")["environment"]
    assert ran_on["fingerprints"]["model"] == base.references["main"]
