"""Are the settings that rsauto exports what axolotl, LLaMA-Factory and TRL accept?

    python studies/export_schemas.py DIR ...

DIR are folders written by `rsauto export --to axolotl`, `llamafactory` or `trl`. Each settings file
is read by the trainer's own published schema: axolotl's pydantic models, LLaMA-Factory's and TRL's
dataclasses with their parsers. A field that a schema does not know is an error, too. A trainer that
is not installed is skipped. They ask for other versions of the libraries than rsauto, but their
schemas do not need them; in a throw-away environment, so that nothing is mixed up:

    python -m venv --system-site-packages schemas
    schemas/bin/pip install --no-deps axolotl trl llamafactory omegaconf \
        antlr4-python3-runtime==4.9.3
    schemas/bin/python studies/export_schemas.py DIR ...

Passed with axolotl 0.19.0, LLaMA-Factory 0.9.5 and TRL 1.16.0. Takes seconds on a CPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml


def read_axolotl(path: Path) -> Any:
    """The settings as axolotl's AxolotlInputConfig. Raises ValueError for an unknown field."""
    from axolotl.utils.schemas.config import AxolotlInputConfig

    values = _values(path)
    _require_known(values, set(AxolotlInputConfig.model_fields))
    return AxolotlInputConfig(**values)


def read_llamafactory(path: Path) -> Any:
    """The settings as LLaMA-Factory's (model, data, training, finetuning, generating) arguments."""
    # It asks for older versions of the libraries; its fields are the same with any.
    os.environ["DISABLE_VERSION_CHECK"] = "1"
    import torch
    from llamafactory.hparams import get_train_args

    # Without a GPU it would refuse half precision, whatever the settings.
    return get_train_args({**_values(path), "use_cpu": not torch.cuda.is_available()})


def read_trl(path: Path) -> Any:
    """The settings as TRL's (script, training, model, data) arguments, as `trl sft` reads them."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig))
    return parser.parse_args_and_config(["--config", str(path)], fail_with_unknown_args=True)


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "axolotl.yaml": ("axolotl", read_axolotl),
    "llamafactory.yaml": ("llamafactory", read_llamafactory),
    "trl.yaml": ("trl", read_trl),
}
"""File -> (package, reader)."""


def _values(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values


def _require_known(values: dict[str, Any], known: set[str]) -> None:
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ValueError(f"unknown fields: {', '.join(unknown)}")


def check(folder: Path) -> bool:
    """Reads the settings of an export and says how that went; whether all were read."""
    found = [name for name in READERS if (folder / name).is_file()]
    if not found:
        print(f"{folder}: has none of {', '.join(READERS)}")
        return False
    is_good = True
    for name in found:
        package, reader = READERS[name]
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            print(f"skipped  {folder / name}: {package} is not installed")
            continue
        try:
            reader(folder / name)
        except Exception as error:  # whatever a schema raises, its words are what is asked for
            print(f"refused  {folder / name}: {package} {version}: {error}")
            is_good = False
        else:
            print(f"read     {folder / name}: {package} {version}")
    return is_good


if __name__ == "__main__":
    sys.exit(0 if all([check(Path(folder)) for folder in sys.argv[1:]]) else 1)
