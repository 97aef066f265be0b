"""A stand-in for the Hugging Face hub on loopback: its protocol, its refusals and its accidents.

What it answers follows the hub: status codes, X-Error-Code, X-Repo-Commit and ETag headers, ranges,
repository information, trees and paths. Files are held in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.parse import parse_qs, unquote, urlsplit

_RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_API = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+))?(.*)"
)

Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits and the branches and tags that point at them."""

    access: str = "open"
    """'open'; 'gated' needs a token with access; 'private' is hidden from everybody else."""
    open_files: tuple[str, ...] = ()
    """Files of a gated repository that everybody may read."""
    commits: dict[str, Files] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)

    def push(self, files: Files, *references: str) -> str:
        """Adds a commit and moves branches or tags to it. Returns its hash."""
        digest = hashlib.sha1()
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        commit = digest.hexdigest()
        self.commits[commit] = files
        self.references.update(dict.fromkeys(references or ("main",), commit))
        return commit


@dataclass
class Accident:
    """What goes wrong with some requests, and how often."""

    pattern: str
    """Searched for in method and path, as in 'GET /some/model/resolve/main/config.json'."""
    times: int = 10**9
    status: int | None = None
    """Answer with this status."""
    cut_after: int | None = None
    """Send this many bytes of a file, then close the connection."""
    silent_seconds: float = 0.0
    """Wait this long before answering."""


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    method: str
    path: str
    range: str | None


class Hub:
    """The server and its repositories; a context manager that serves while it is entered."""

    granted = "hf_granted"
    """A token that may read gated and private repositories."""
    stranger = "hf_stranger"
    """A token of somebody who may not."""

    def __init__(self) -> None:
        self.models: dict[str, Repository] = {}
        self.datasets: dict[str, Repository] = {}
        self.accidents: list[Accident] = []
        self.requests: list[Request] = []
        self._port = 0
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT must be."""
        return f"http://127.0.0.1:{self._port}"

    @contextmanager
    def unreachable(self) -> Iterator[None]:
        """Connections are refused for a while."""
        self._stop()
        yield
        self._start()

    def _start(self) -> None:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def _stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def model(self, name: str, files: Files, **options: Any) -> Repository:
        """A new model with one commit on main."""
        return _new(self.models, name, files, options)

    def dataset(self, name: str, files: Files, **options: Any) -> Repository:
        """A new dataset with one commit on main."""
        return _new(self.datasets, name, files, options)

    def asked(self, pattern: str) -> list[Request]:
        """Requests in order; the pattern is that of an accident."""
        return [one for one in self.requests if re.search(pattern, f"{one.method} {one.path}")]

    def accident(self, request: str) -> Accident | None:
        """What goes wrong with a request now."""
        for one in self.accidents:
            if one.times > 0 and re.search(one.pattern, request):
                one.times -= 1
                return one
        return None


def _new(repositories: dict[str, Repository], name: str, files: Files, options: Any) -> Repository:
    repository = repositories[name] = Repository(**options)
    repository.push(files)
    return repository


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        self.status = status
        self.headers = {name: value for name, value in headers.items() if value}


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """The requests are kept in the hub instead."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        path = urlsplit(self.path).path
        self.hub.requests.append(Request(self.command, unquote(path), self.headers.get("Range")))
        accident = self.hub.accident(f"{self.command} {unquote(path)}")
        try:
            if accident:
                time.sleep(accident.silent_seconds)
                if accident.status:
                    raise _Refused(accident.status)
            if found := _RESOLVE.fullmatch(path):
                self._file(found, accident.cut_after if accident else None)
            elif found := _API.fullmatch(path):
                self._send(200, json.dumps(self._information(found, body)).encode())
            else:
                raise _Refused(404)
        except _Refused as refused:
            self._send(refused.status, b"", refused.headers)
        except OSError:
            pass  # whoever asked has gone

    def _repository(self, kind: str, name: str, file: str | None = None) -> Repository:
        repositories = self.hub.models if kind == "models" else self.hub.datasets
        repository = repositories.get(name)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", self.hub.granted, self.hub.stranger):
            raise _Refused(401, message="Invalid credentials in Authorization header")
        if repository is None or (repository.access == "private" and token != self.hub.granted):
            raise _Refused(404 if token else 401, "RepoNotFound", "Repository not found")
        closed = file is not None and file not in repository.open_files
        if repository.access == "gated" and closed and token != self.hub.granted:
            raise _Refused(403 if token else 401, "GatedRepo", f"Access to {name} is restricted")
        return repository

    def _commit(self, repository: Repository, revision: str) -> str:
        revision = unquote(revision)
        commit = repository.references.get(revision, revision)
        if commit not in repository.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _file(self, found: re.Match[str], cut_after: int | None) -> None:
        prefix, name, revision, path = found.groups()
        path = unquote(path)
        repository = self._repository("datasets" if prefix else "models", name, path)
        commit = self._commit(repository, revision)
        content = repository.commits[commit].get(path)
        if content is None:
            raise _Refused(404, "EntryNotFound", "Entry not found", commit)
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
        status, first = 200, 0
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            status, first = 206, int(wanted[1])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        self._send(status, content[first:], headers, cut_after)

    def _information(self, found: re.Match[str], body: str) -> Any:
        kind, name, what, revision, rest = found.groups()
        repository = self._repository(kind, name)
        commit = self._commit(repository, revision or "main")
        files = repository.commits[commit]
        if what == "tree":
            return _tree(files, unquote(rest.strip("/")), "recursive=True" in self.path)
        if what == "paths-info":
            entries = {entry["path"]: entry for entry in _tree(files, "", True)}
            return [entries[path] for path in parse_qs(body)["paths"] if path in entries]
        siblings = [{"rfilename": path} for path in files]
        return {"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []}

    def _send(
        self,
        status: int,
        content: bytes,
        headers: dict[str, str] | None = None,
        cut_after: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        # Without it, a client would keep its connection to a hub that cannot be reached any more.
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut_after is None:
            self.wfile.write(content)
            return
        self.wfile.write(content[:cut_after])
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)


def _tree(files: Files, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Entries below a folder, as the hub lists them. Raises for a folder that is not there."""
    inside = {path: content for path, content in files.items() if path.startswith(folder)}
    if folder and not any(path.startswith(f"{folder}/") for path in files):
        raise _Refused(404, "EntryNotFound", f"{folder} does not exist")
    folders = {
        "/".join(path.split("/")[:depth])
        for path in inside
        for depth in range(1, path.count("/") + 1)
    }
    entries = [
        {
            "type": "file",
            "path": path,
            "size": len(content),
            "oid": hashlib.sha1(content).hexdigest(),
        }
        for path, content in inside.items()
    ]
    entries += [
        {
            "type": "directory",
            "path": path,
            "size": 0,
            "oid": hashlib.sha1(path.encode()).hexdigest(),
        }
        for path in sorted(folders)
        if path != folder
    ]
    depth = folder.count("/") + 1 if folder else 0
    return [entry for entry in entries if recursive or entry["path"].count("/") == depth]


_READER = """
import contextlib, json, os, resource, socket, sys, time

answers, sys.stdout = sys.stdout, sys.stderr
sleep, connect = time.sleep, socket.socket.connect

def connect_to_loopback(self, address):
    assert address[0] == "127.0.0.1", f"a test must not reach {address}"
    return connect(self, address)

time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # between the retries of the hub client
socket.socket.connect = connect_to_loopback

from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 10_000  # bytes that a cut download keeps: 10 MB, as it is

@contextlib.contextmanager
def files_of_at_most(limit):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit or before[0], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

def model(name, revision=None, weights=False, file_limit=None):
    import torch
    from rsauto.base import load_weights, open_base
    from rsauto.config import ModelConfig
    config = ModelConfig(name=name, revision=revision)
    source = open_base(config)
    said = {"fingerprint": source.fingerprint, "chat": source.tokenizer.chat_template}
    if weights:
        with files_of_at_most(file_limit):
            model = load_weights(source, config, torch.device("cpu")).model
        said["weight"] = float(model.get_output_embeddings().weight[0, 0])
    return said

def data(name, subset=None, revision=None, file_limit=None):
    from rsauto.config import DataConfig
    from rsauto.data import load_rows
    with files_of_at_most(file_limit):
        rows = load_rows(DataConfig(name=name, subset=subset, revision=revision))
    return {"source": rows.train_source, "prompts": [row.prompt for row in rows.train]}

def study(values, out):
    from pathlib import Path
    from rsauto.config import StudyConfig
    from rsauto.search.driver import study_events
    from rsauto.search.events import TrialStarted
    for event in study_events(StudyConfig(**values), Path(out)):
        if isinstance(event, TrialStarted):
            return {"environment": json.loads(Path(out, "environment.json").read_text())}

for line in sys.stdin:
    request = json.loads(line)
    os.environ["HF_TOKEN"] = request.pop("token", None) or ""
    try:
        said = globals()[request.pop("kind")](**request)
    except Exception as error:
        said = {"error": str(error), "type": type(error).__name__}
    print(json.dumps(said), file=answers, flush=True)
"""


class Reader:
    """A process whose libraries use the stand-in, and that reads models and data when asked.

    The libraries take their addresses and folders when they are imported, hence a process.
    """

    def __init__(self, hub: Hub, home: Path, *, offline: bool = False) -> None:
        self.home = home
        self._process = subprocess.Popen(
            [sys.executable, "-c", _READER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment(hub, home, offline=offline),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def model(self, name: str, **options: Any) -> dict[str, Any]:
        """Fingerprint and, with ``weights``, the first weight; or the error and its type."""
        return self._ask({"kind": "model", "name": name, **options})

    def data(self, name: str, **options: Any) -> dict[str, Any]:
        """Source and prompts of the training rows; or the error and its type."""
        return self._ask({"kind": "data", "name": name, **options})

    def study(self, values: dict[str, Any], out: Path) -> dict[str, Any]:
        """Begins or continues a study up to its next trial: what it runs on, or the error."""
        return self._ask({"kind": "study", "values": values, "out": str(out)})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        said: dict[str, Any] = json.loads(self._process.stdout.readline())
        return said


def environment(hub: Hub, home: Path, *, offline: bool = False) -> dict[str, str]:
    """Of processes that know no other hub and no other cache."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {
        **ours,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_ETAG_TIMEOUT": "2",
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        "NO_PROXY": "*",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
