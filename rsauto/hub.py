"""The Hugging Face hub: the commit a name stands for, what it holds, and its errors in words."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import REGEX_COMMIT_HASH, repo_folder_name

from rsauto.checkpoint import adapter_base, missing_weights
from rsauto.errors import InputError, nearest

_BESIDE_WEIGHTS = (
    "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm", "*.codes", "tokenizer*",
)  # fmt: skip
"""Small files of a model, among them all that its tokenizer and its generation may need."""

_AGAIN = "The same command tries again, and keeps the files that are complete."
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository of the hub, as a study names it."""

    section: Literal["model", "data"]
    """The section of the study file that names it, 'data' for a dataset."""
    name: str
    revision: str | None
    """Branch, tag or commit; None is the branch main."""

    @property
    def kind(self) -> Literal["model", "dataset"]:
        """As the hub calls it."""
        return "model" if self.section == "model" else "dataset"

    @property
    def page(self) -> str:
        """Its address for people."""
        folder = "" if self.section == "model" else "datasets/"
        return f"{constants.ENDPOINT}/{folder}{self.name}"

    def said(self, words: str, field: Literal["name", "revision"] = "name") -> str:
        """A sentence about it, after the field that is wrong."""
        return f"{self.section}.{field}: {self.name} {words}"


def fetch_model(repository: Repository) -> str:
    """Puts configuration and tokenizer into the cache. Returns the commit, of 40 hex digits.

    The cache answers where the hub does not. Everything of a model is then read at this commit,
    so that a branch that moves cannot mix two models.

    Raises InputError when it is missing, closed or unreachable, is no model, or has no safetensors.
    """
    config = fetch_config(repository)
    commit = config.parent.name
    try:
        files = _files(repository, commit)
    except Exception as error:
        if missing_weights(_names(config.parent), config.parent.joinpath):
            raise _told(error, repository) from error
        return commit
    try:
        problem = missing_weights(files, lambda file: Path(_download(repository, file, commit)))
        if not problem:
            for file in filter(_is_beside_weights, files):
                _download(repository, file, commit)
    except Exception as error:
        raise _told(error, repository) from error
    if problem:
        raise InputError(repository.said(problem + _converted(repository, files)))
    return commit


def fetch_config(repository: Repository) -> Path:
    """Puts the configuration of a model into the cache, in a folder named by its commit.

    Raises InputError when it is missing, closed, unreachable or no model.
    """
    try:
        return Path(_download(repository, "config.json", repository.revision))
    except RemoteEntryNotFoundError:
        raise InputError(_no_config(repository)) from None
    except Exception as error:
        # The hub client and the network library under it each raise kinds of their own.
        raise _told(error, repository) from error


def find_dataset(repository: Repository) -> tuple[str | None, Exception | None]:
    """The commit of a dataset; where the hub cannot tell, the cached one and what went wrong.

    Raises InputError when the hub says that the dataset or revision is missing or closed.
    """
    try:
        information = HfApi().dataset_info(
            repository.name, revision=repository.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        with suppress(RemoteEntryNotFoundError):
            # Not for its text: the cache then knows the commit of the branch or tag.
            _download(repository, "README.md", repository.revision)
        return information.sha, None
    except HFValidationError as error:
        raise _told(error, repository) from error
    except Exception as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in range(400, 429):
            raise _told(error, repository) from error
        return _cached_commit(repository), error


def explain(error: BaseException, repository: Repository) -> str | None:
    """What a failed look-up or download means and what to do next, None for another kind of error.

    Libraries wrap each other's errors: the outermost that says something is told.
    """
    chain = list(causes(error))
    if any(isinstance(link, RevisionNotFoundError) for link in chain):
        return repository.said(
            f"has no revision {repository.revision!r} on the hub. {repository.page}/tree/main "
            f"lists its branches and tags; without a revision, main is read.",
            field="revision",
        )
    for link in chain:
        words = _refused(link, repository) or _not_stored(link) or _broken_off(link, repository)
        if words:
            return repository.said(words)
    if any(isinstance(link, (ConnectionError, LocalEntryNotFoundError)) for link in chain):
        return repository.said(_not_cached(repository))
    return None


def _told(error: Exception, repository: Repository) -> InputError:
    words = explain(error, repository)
    return InputError(words or repository.said(f"could not be read: {error}"))


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it came from, as a traceback shows them."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _refused(error: BaseException, repository: Repository) -> str | None:
    """What the hub answered instead of a file."""
    if isinstance(error, HFValidationError):
        return "is no hub id. One looks like Qwen/Qwen2.5-0.5B."
    if not isinstance(error, HfHubHTTPError):
        return None
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return gated(status, repository)
    if isinstance(error, DisabledRepoError):
        return f"was disabled by the hub; {repository.page} may say why. Choose another."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"is no {repository.kind} on the hub, or a private one, which looks the same: log in "
            f"with `hf auth login` or set HF_TOKEN.{_nearest_folder(repository.name)}"
        )
    if status == 401:
        return "cannot be read with your token: the hub does not accept it. Use `hf auth login`."
    if status == 403:
        return f"cannot be read with your token. Give it permission to read {repository.page}."
    if status == 429:
        return (
            "could not be read: the hub has had too many requests from here (429). Try again in "
            "some minutes; logging in with `hf auth login` raises the limit."
        )
    if status >= 500:
        return f"could not be read: the hub has a problem of its own ({status}). Try again later."
    return None


def gated(status: int, repository: Repository) -> str:
    """How to get into a gated repository, to whom the hub answered 401 (nobody) or 403."""
    if status == 401:
        return (
            f"is gated. Ask for access on {repository.page}, then log in with `hf auth login` or "
            f"set HF_TOKEN."
        )
    return (
        f"is gated, and your token has no access to it. Ask for access on {repository.page} with "
        f"the account of the token, and let a fine-grained token read gated repositories."
    )


def _not_stored(error: BaseException) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    if number in _FULL or "No space left" in str(error) or "enough disk space" in str(error):
        return (
            f"could not be downloaded: there is no room for it in {constants.HF_HOME}. Free some, "
            f"or set HF_HOME to a folder on a larger disk."
        )
    if number in _CLOSED:
        return (
            f"could not be downloaded: {constants.HF_HOME} cannot be written ({error}). Set "
            f"HF_HOME to a folder that can."
        )
    return None


def _broken_off(error: BaseException, repository: Repository) -> str | None:
    # The hub client moved from httpx to httpx2, so that its network errors are known by name.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "TimeoutException" in kinds or isinstance(error, TimeoutError):
        return (
            f"could not be downloaded: the hub did not answer in time. {_AGAIN} "
            f"HF_HUB_DOWNLOAD_TIMEOUT gives it more seconds."
        )
    if kinds & {"ConnectError", "ProxyError"}:
        return _not_cached(repository)
    if "TransportError" in kinds or "Consistency check failed" in str(error):
        return f"could not be downloaded: the connection broke off. {_AGAIN}"
    return None


def _not_cached(repository: Repository) -> str:
    """Why the hub was not asked, or did not answer, about what is not wholly in the cache."""
    revision = f"at revision {repository.revision!r} " if repository.revision else ""
    at = f"{revision}is not, or not wholly, in the cache {constants.HF_HOME}"
    if constants.HF_HUB_OFFLINE:
        return (
            f"{at}, and HF_HUB_OFFLINE forbids to ask the hub. Unset it, or read it once where "
            f"there is a network and copy HF_HOME."
        )
    return (
        f"{at}, and the hub at {constants.ENDPOINT} cannot be reached. Check the network, or read "
        f"it once where there is one and copy HF_HOME."
    )


def _download(repository: Repository, file: str, revision: str | None) -> str:
    return hf_hub_download(repository.name, file, repo_type=repository.kind, revision=revision)


def _files(repository: Repository, revision: str | None) -> list[str]:
    """Paths of all files of a model."""
    info = HfApi().model_info(
        repository.name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
    )
    return [file.rfilename for file in info.siblings or ()]


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.exists()]


def _is_beside_weights(file: str) -> bool:
    return file.startswith("additional_chat_templates/") or (
        "/" not in file and any(fnmatch(file, pattern) for pattern in _BESIDE_WEIGHTS)
    )


def _no_config(repository: Repository) -> str:
    """What a repository without a configuration is instead."""
    try:
        files = _files(repository, repository.revision)
        if "adapter_config.json" in files:
            path = _download(repository, "adapter_config.json", repository.revision)
            return repository.said(adapter_base(Path(path)))
    except Exception as error:
        raise _told(error, repository) from error
    there = ", ".join(sorted(files)[:6]) or "nothing"
    gguf = " GGUF files are for inference." if any(f.endswith(".gguf") for f in files) else ""
    return repository.said(
        f"has no config.json, so it is no model that transformers reads. It holds {there}.{gguf} "
        f"Give the model it was made from, or another revision."
    )


def _converted(repository: Repository, files: Iterable[str]) -> str:
    if not any(file.endswith(".bin") for file in files):
        return ""
    return (
        f" Or look on {repository.page}/discussions for a pull request that adds safetensors, and "
        f"set model.revision to refs/pr/ and its number."
    )


def _nearest_folder(name: str) -> str:
    parent = Path(name).parent
    if not parent.is_dir():
        return ""
    close = nearest(name, [str(path) for path in parent.iterdir() if path.is_dir()])
    return f" Or is a local folder meant?{close}" if close else ""


def _cached_commit(repository: Repository) -> str | None:
    """The commit that a branch or tag had when it was last downloaded."""
    revision = repository.revision or constants.DEFAULT_REVISION
    if REGEX_COMMIT_HASH.fullmatch(revision):
        return revision
    folder = repo_folder_name(repo_id=repository.name, repo_type=repository.kind)
    reference = Path(constants.HF_HUB_CACHE) / folder / "refs" / revision
    return reference.read_text(encoding="utf-8") if reference.is_file() else None
