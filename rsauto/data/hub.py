"""Datasets from the Hugging Face hub, and what each way of not getting them means for the user."""

from __future__ import annotations

import ast
import re

from rsauto.data.files import Table
from rsauto.errors import InputError, nearest


def load_hub(name: str, subset: str | None, revision: str | None) -> dict[str, Table]:
    """Every split of a hub dataset; rows stay on disk until they are taken.

    Raises InputError when the dataset, subset or revision is missing, closed or unreachable.
    """
    from datasets import load_dataset  # type: ignore[import-untyped, unused-ignore]

    try:
        loaded = load_dataset(name, subset, revision=revision)
    except Exception as error:
        # The hub client, the network library, arrow and datasets each raise kinds of their own.
        raise InputError(_explain(error, name, subset, revision)) from error
    at = f"{name}{f'/{subset}' if subset else ''}{f'@{revision}' if revision else ''}"
    return {
        str(split): Table(
            source=f"{at}, split {split}", columns=tuple(rows.column_names), rows=rows
        )
        for split, rows in loaded.items()
    }


def _explain(error: Exception, name: str, subset: str | None, revision: str | None) -> str:
    message = str(error)
    subsets = re.search(r"vailable(?: configs)?: (\[.*?\])", message, re.DOTALL)
    if subsets:
        known = [str(one) for one in ast.literal_eval(subsets[1])]
        there_are = f"There are {', '.join(known)}."
        if subset is None:
            return f"data.subset: {name} has several subsets: choose one. {there_are}"
        return (
            f"data.subset: {subset!r} is no subset of {name}.{nearest(subset, known)} {there_are}"
        )
    if "gated" in message:
        return (
            f"data.name: {name} is gated. Ask for access on "
            f"https://huggingface.co/datasets/{name}, then log in with `hf auth login` or "
            f"set HF_TOKEN."
        )
    if "Revision" in message:
        return f"data.revision: {name} has no revision {revision!r} on the hub."
    if "scripts are no longer supported" in message:
        return (
            f"data.name: {name} is loaded by a script, which rsauto does not run. Try "
            f"revision: refs/convert/parquet, or download it and name the files."
        )
    if isinstance(error, ConnectionError) or "offline" in message.lower():
        return (
            f"data.name: {name!r} is no file or folder here, and the Hugging Face hub cannot be "
            f"reached. If it is a file, check its path. If it is a hub dataset, check the network, "
            f"unset HF_HUB_OFFLINE if it is set, or load it once where there is a network and "
            f"copy HF_HOME."
        )
    if isinstance(error, FileNotFoundError):
        return (
            f"data.name: {name!r} is no file or folder here, and no dataset of that name with "
            f"readable data is on the Hugging Face hub ({message}). A private one needs HF_TOKEN."
        )
    return f"data.name: {name} could not be loaded: {type(error).__name__}: {message}"
