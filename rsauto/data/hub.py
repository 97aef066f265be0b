"""Datasets from the Hugging Face hub, and what each way of not getting them means for the user."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from rsauto.data.files import Table
from rsauto.errors import InputError, nearest
from rsauto.hub import Repository, causes, explain, find_dataset, gated


def load_hub(name: str, subset: str | None, revision: str | None) -> dict[str, Table]:
    """Every split of a hub dataset; rows stay on disk until they are taken.

    Where the hub cannot be reached, the cache answers, if it has the same commit.

    Raises InputError when the dataset, subset or revision is missing, closed or unreachable.
    """
    repository = Repository("data", name, revision)
    try:
        builder = _builder(repository, subset)
        builder.download_and_prepare()
        loaded = builder.as_dataset()
    except InputError:
        raise
    except Exception as error:
        # The hub client, the network library, arrow and datasets each raise kinds of their own.
        raise InputError(_explain(error, repository, subset)) from error
    at = f"{name}{f'/{subset}' if subset else ''}{f'@{revision}' if revision else ''}"
    return {
        str(split): Table(
            source=f"{at}, split {split}", columns=tuple(rows.column_names), rows=rows
        )
        for split, rows in loaded.items()
    }


def _builder(repository: Repository, subset: str | None) -> Any:
    """What makes the rows: from the hub or, where that is in trouble, those made before."""
    from datasets import load_dataset_builder  # type: ignore[import-untyped, unused-ignore]
    from datasets.packaged_modules.cache.cache import Cache  # type: ignore[import-untyped]

    commit, trouble = find_dataset(repository)
    if trouble is None:
        builder = load_dataset_builder(repository.name, subset, revision=commit)
        if not isinstance(builder, Cache):
            return builder
    of = {"repo_id": repository.name, "dataset_name": repository.name.split("/")[-1]}
    try:
        newest = Cache(config_name=subset, version="auto", hash="auto", **of)
    except ValueError as error:
        if trouble is None or _subsets(str(error)):
            raise
        raise InputError(_explain(trouble, repository, subset)) from error
    if newest.hash == commit or (commit is None and repository.revision is None):
        return newest
    # The newest is of whatever revision was read last.
    if commit and Path(newest.cache_dir).with_name(commit).is_dir():
        settings = newest.config
        return Cache(config_name=settings.name, version=str(settings.version), hash=commit, **of)
    wanted = repository.revision or "main"
    raise InputError(
        f"data.revision: the hub cannot be reached, and the cache has commit {newest.hash} of "
        f"{repository.name}, not {wanted!r}. Read it once where there is a network, or set "
        f"data.revision to that commit."
    )


def _explain(error: Exception, repository: Repository, subset: str | None) -> str:
    message = str(error)
    known = _subsets(message)
    if known:
        cached = "in the cache" in message
        there_are = f"{'The cache has' if cached else 'There are'} {', '.join(known)}."
        if subset is None:
            return repository.said(f"has several subsets. Choose data.subset. {there_are}")
        problem = "is not in the cache, and the hub cannot be reached" if cached else "is no subset"
        return (
            f"data.subset: {subset!r} of {repository.name} {problem}."
            f"{nearest(subset, known)} {there_are}"
        )
    if "gated" in message:
        return repository.said(gated(403 if "ask for access" in message else 401, repository))
    if "scripts are no longer supported" in message:
        return repository.said(
            "is loaded by a script, which rsauto does not run. Try data.revision: "
            "refs/convert/parquet, or download it and name the files."
        )
    if found := re.search(r'"(.*)" corresponds to no data', message):
        return repository.said(f"cannot be read, because its split {found[1]!r} has no rows.")
    words = explain(error, repository)
    if words:
        return words
    if isinstance(error, FileNotFoundError):
        return repository.said(
            f"has no data file that datasets can read, such as Parquet, JSON or CSV. Look at "
            f"{repository.page}/tree/main ({message})."
        )
    *_, cause = causes(error)
    return repository.said(f"could not be read: {type(cause).__name__}: {cause}")


def _subsets(message: str) -> list[str]:
    """The subsets that a message of datasets lists, from the hub or in the cache."""
    found = re.search(r"vailable(?: configs)?(?: in the cache)?: (\[.*?\])", message, re.DOTALL)
    if found:
        return [str(one) for one in ast.literal_eval(found[1])]
    found = re.search(r"configurations in the cache: (.*)", message)
    return found[1].split(", ") if found else []
