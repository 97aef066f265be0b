"""Passwords of storage URLs and tokens of services: for those alone to whom they are given."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_study import environment, write_study

from rsauto.errors import InputError
from rsauto.search import storage
from rsauto.search.storage import open_storage
from rsauto.storage_url import shown, without_secrets

WRITTEN = ["s3cr3t%26ve%20ry", "s3cr3t", "s3c@s3cr3t", "s3cr3t/x", "%73%33cr3t", "s3cr3t:x"]


def closed_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.mark.parametrize("password", WRITTEN)
@pytest.mark.parametrize(
    "form",
    [
        "postgresql://me:{}@127.0.0.1:{}/x",
        "postgresql://127.0.0.1:{1}/x?user=me&password={0}",
        "postgresql://me@127.0.0.1:{1}/x?passfile=none&sslpassword={0}",
        "postgresql//me:{}@127.0.0.1:{}/x",
        "me:{}@127.0.0.1:{}/x",
        "mysql://me:{}@127.0.0.1:{}/x",
        "nosuch://me:{}@127.0.0.1:{}/x",
        "postgresql://me:{}@[broken:{}/x",
        "postgresql://me:{}@127.0.0.1:{}x/x",
    ],
)
def test_no_message_tells_a_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, password: str
) -> None:
    monkeypatch.setattr(storage, "OPENING_PAUSES", (0.0,))
    url = form.format(password, closed_port())
    assert "s3c" not in shown(url) and "%73" not in shown(url)
    with pytest.raises(InputError) as caught:
        open_storage(url, tmp_path / "journal.log")
    assert "s3c" not in str(caught.value) and "%73" not in str(caught.value)
    assert "***" in str(caught.value)


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(codec="ascii", exclude_characters="?#*"), min_size=4, max_size=12))
def test_no_password_of_a_url_is_told(password: str) -> None:
    marked = f"<{password}>"
    url = f"postgresql://me:{marked}@host/db"
    assert marked not in shown(url) and shown(url).endswith("@host/db")
    assert marked not in without_secrets(f"invalid dsn {url}", url)


def test_addresses_without_a_password_are_told_as_they_are() -> None:
    for url in ("sqlite:///a@b.db", "postgresql://me@host/db", "sqlite:////tmp/x:y@z.db"):
        assert shown(url) == url


def test_nothing_that_a_study_writes_or_says_has_a_token(tmp_path: Path) -> None:
    tokens = {"HF_TOKEN": "hf_s3cr3tAbCdEf", "WANDB_API_KEY": "s3cr3t" * 6,
              "PGPASSWORD": "s3cr3tpg", "AWS_SECRET_ACCESS_KEY": "s3cr3taws"}  # fmt: skip
    path = write_study(tmp_path, trials=2, seeds=1)
    out = tmp_path / "out"
    commands = [
        ["study", path, "--out", out, "--storage", f"sqlite:///{tmp_path}/x.db?timeout=60"],
        ["report", out], ["status", out],
        ["export", out, "--to", "axolotl"],
        ["study", path, "--set", "model.name=nobody/nothing", "--out", tmp_path / "other"],
        ["worker", f"postgresql://me:s3cr3t@127.0.0.1:{closed_port()}/x", "--study", "tiny"],
    ]  # fmt: skip
    code = "import json, sys\nfrom rsauto.cli import app\n" + (
        "for command in json.loads(sys.argv[1]):\n"
        "    print(command[0], 'ended with', end=' ')\n"
        "    try:\n        app(command, standalone_mode=True)\n"
        "    except SystemExit as end:\n        print(end.code, flush=True)\n"
    )
    plain = [[str(part) for part in command] for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(plain)], capture_output=True, text=True,
        env={**environment(), **tokens}, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [line.rpartition("ended with ")[2] for line in done.stdout.splitlines()]
    assert [line for line in said if line.isdecimal()] == ["0"] * 4 + ["2", "2"], done.stderr
    assert "s3cr3t" not in done.stdout + done.stderr
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(written) > 20
    assert [p for p in written if b"s3cr3t" in p.read_bytes()] == []
    assert os.environ.get("HF_TOKEN") is None
