"""A study whose trials are spread over processes: what the first tells, and what the others do.

The first process runs the study as if it were alone. It alone asks and tells Optuna, writes the
folder and speaks; the others know neither. They load the model and the data, and train what they
are told to, until there is no more.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from rsauto.base import BaseSource, LoadedBase, load_weights, pick_device, to_device
from rsauto.config import StudyConfig
from rsauto.data import TokenisedData
from rsauto.errors import InputError
from rsauto.records import TrialSpec
from rsauto.search.reading import Objects, read
from rsauto.search.setup import Setup
from rsauto.sharding import shard
from rsauto.training.spread import ProcessLost, Spread, join
from rsauto.training.trial import Bench, Trial, Untouched, untouched


@contextmanager
def leading(spread: Spread) -> Iterator[None]:
    """Around all that the first process does: when it ends, the others are told."""
    try:
        yield
    except (ProcessLost, KeyboardInterrupt):
        raise  # nobody is where a message would find them; they notice when this process is gone
    except BaseException:
        _dismiss(spread)
        raise
    else:
        _dismiss(spread)


def _dismiss(spread: Spread) -> None:
    with suppress(ProcessLost):  # they end all the same, and what was done is done
        spread.tell(None)


def load_everywhere(setup: Setup) -> LoadedBase:
    """The base model, in this process and in all that follow it.

    Raises InputError where one of them cannot load it, or has read something else.
    """
    setup.spread.tell(setup.config)
    return _load(setup.spread, setup.device, lambda: (setup.source, setup.data, setup.load_model()))


def _load(
    spread: Spread,
    device: torch.device,
    load: Callable[[], tuple[BaseSource, TokenisedData, LoadedBase]],
) -> LoadedBase:
    """One process's part of `load_everywhere`."""
    found: list[LoadedBase] = []

    def read_and_load() -> tuple[str, str]:
        source, data, loaded = load()
        found.append(loaded)
        return source.fingerprint, data.fingerprint

    own, *others = spread.together(read_and_load)
    for rank, other in enumerate(others, start=1):
        if other != own:
            name = "data.name" if other[0] == own[0] else "model.name"
            raise InputError(
                f"{name}: process {rank} has read other contents than the first. Give all machines "
                "the same files."
            )
    if spread.shards_base:
        # Before it is moved: the device then never holds more than a layer of it.
        spread.together(lambda: shard(found[0].model, device), in_step=True)
        spread.together(lambda: to_device(found[0].model, device).device.type, in_step=True)
    return found[0]


def follow() -> None:
    """What every process but the first does in a study. Raises ProcessLost when that is gone."""
    spread = join()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # The launcher sends them to all processes; the first one stops the study in order.
            signal.signal(number, signal.SIG_IGN)
    follower = _Follower(spread)
    while (order := spread.hear()) is not None:
        try:
            follower.obey(order)
        except ProcessLost:
            raise
        except Exception:
            continue  # the first process has it as well, and knows what becomes of it


class _Follower:
    def __init__(self, spread: Spread) -> None:
        self._spread = spread
        self._bench: Bench | None = None

    def obey(self, order: object) -> None:
        if isinstance(order, StudyConfig):
            self._bench = self._prepare(order)
            return
        assert self._bench is not None, "the first order is what to load"
        if isinstance(order, Untouched):
            untouched(self._bench, order.batch_size, order.seed)
        elif isinstance(order, TrialSpec):
            with Trial(self._bench, order) as trial:
                for _ in trial.steps():
                    pass

    def _prepare(self, config: StudyConfig) -> Bench:
        device = pick_device()
        read_parts: list[tuple[BaseSource, TokenisedData]] = []

        def load() -> tuple[BaseSource, TokenisedData, LoadedBase]:
            source, data, _ = read(config, Objects())
            read_parts.append((source, data))
            place = torch.device("cpu") if self._spread.shards_base else device
            return source, data, load_weights(source, config.model, place)

        loaded = _load(self._spread, device, load)
        source, data = read_parts[0]
        return Bench(
            model=loaded.model,
            base_name=source.name,
            data=data,
            device=device,
            fresh_parameters=loaded.fresh_parameters,
            spread=self._spread,
        )
