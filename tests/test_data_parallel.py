"""One trial on several devices: two processes give what one gives, and end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from safetensors.torch import load_file
from spread_trials import FULL, start, train_all
from tiny_study import environment, records, study_values, write_study
from torch import nn

from rsauto.api import run_study
from rsauto.errors import InputError
from rsauto.launched import is_follower, num_processes
from rsauto.search.setup import Objects, Setup, set_up
from rsauto.search.storage import open_storage
from rsauto.study_file import validate
from rsauto.training.spread import Spread, _buckets, join

SCRIPT = str(Path(__file__).with_name("spread_trials.py"))
LAUNCH = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
SECONDS = 400


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for key in sorted(value):
            if key != "perplexity":  # an exponential: its errors are a thousand times larger
                yield from numbers(value[key])
    elif isinstance(value, list):
        for one in value:
            yield from numbers(one)
    elif isinstance(value, (int, float)):
        yield value


def assert_same_results(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    one, other = (
        {k: v for k, v in each.items() if k not in ("peak", "predicted")} for each in (one, other)
    )
    assert (one.get("outcome"), one.get("ranks")) == (other.get("outcome"), other.get("ranks"))
    assert list(numbers(other)) == pytest.approx(list(numbers(one)), abs=tolerance, rel=0)


def assert_same_adapters(one: Path, other: Path, tolerance: float) -> None:
    first, second = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spread")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """Every case of `spread_trials` in this process."""
    found: dict[str, Any] = json.loads(json.dumps(train_all(folder, folder / "alone")))
    return found


def together(
    folder: Path, out: Path, codes: tuple[int, int] = (0, 0), **env: str
) -> dict[str, Any]:
    """Every case of `spread_trials` in two processes, which end with ``codes``."""
    out.mkdir()
    processes = start([SCRIPT, str(folder), str(out)], **env)
    said = [process.communicate(timeout=SECONDS)[1] for process in processes]
    assert tuple(process.returncode for process in processes) == codes, "\n".join(said)
    found: dict[str, Any] = json.loads((out / "found.json").read_text())
    return found


def assert_all_same(folder: Path, alone: dict[str, Any], found: dict[str, Any], out: Path) -> None:
    assert found.keys() == alone.keys()
    for name in alone.keys() - {FULL}:
        assert_same_results(alone[name], found[name], 1e-5)
        if (folder / "alone" / name).exists():
            # Adam takes a gradient that is nothing but rounding for a direction.
            assert_same_adapters(folder / "alone" / name, out / name, 2e-5)


def test_two_processes_train_what_one_trains(folder: Path, alone: dict[str, Any]) -> None:
    out = folder / "together"
    found = together(folder, out, FAILS="1")
    assert_all_same(folder, alone, found, out)
    assert {0, 6} < set(alone["adalora none"]["ranks"].values()), "ranks must have moved"
    assert alone["diverged"]["outcome"].startswith("Diverged: step 2")
    # The last process alone had no room, and the trial after it is as good as any.
    assert found[FULL]["outcome"] == "OutOfMemory: OutOfMemoryError: no room here (in process 1)"
    assert [len(found[name]["curve"]) for name in ("stopped", FULL, "after")] == [1, 1, 3]
    for name in ("text", "classes", "deep"):
        assert found[name]["peak"] <= 1.02 * found[name]["predicted"]


def test_two_processes_share_a_base(folder: Path, alone: dict[str, Any]) -> None:
    out = folder / "sharded"
    launch = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    # What ends the run for the other process is written down by this one all the same.
    found = together(folder, out, (0, 4), FAILS="0", **launch)
    assert_all_same(folder, alone, found, out)
    assert found[FULL]["outcome"] == "OutOfMemory: no room here"
    # Less than with a whole base, and never more than planned, which counts gathered layers even
    # where the peak is outside of them.
    deep, whole = found["deep"], alone["deep"]
    assert deep["peak"] < whole["peak"] <= 1.02 * whole["predicted"]
    assert deep["peak"] <= deep["predicted"] < whole["predicted"]


def launched(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *LAUNCH, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=SECONDS
    )


def test_a_launched_study_has_the_records_of_one_process(tmp_path: Path) -> None:
    # Rates at which training is stable: elsewhere rounding grows, however many processes there are.
    search = {"trials": 6, "learning_rate": {"low": 1e-3, "high": 1e-2}, "rank": [4, 8, 256]}
    path = write_study(tmp_path, **search)
    out = tmp_path / "two"
    done = launched("--multi_gpu", "-m", "rsauto", "study", path, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["trials"] == 6
    assert (out / "report.html").exists()
    assert done.stderr.count("loading the model ...") == 1, "only the first process speaks"
    assert "of each of 2 devices" in done.stderr
    assert "each is spread over 2 processes" in done.stderr

    run_study({**study_values(tmp_path / "one", **search), "packing": {"mode": "off"}},
              out=tmp_path / "alone", report=False)  # fmt: skip
    ours, theirs = records(tmp_path / "alone"), records(out)
    assert len(ours) == len(theirs)
    names = ("outcome", "rank", "learning_rate", "tokens", "steps", "seed", "role")
    for one, two in zip(ours, theirs, strict=True):
        assert [one[name] for name in names] == [two[name] for name in names]
        assert list(numbers(two["curve"])) == pytest.approx(
            list(numbers(one["curve"])), abs=1e-5, rel=0
        )
        if one["outcome"] == "complete":
            assert two["micro_batch_size"] == 2, "rows of one device"
            assert two["measured_peak_bytes"] <= two["predicted_peak_bytes"] * 1.02
    assert json.loads((out / "environment.json").read_text())["num_processes"] == 2
    assert_same_adapters(tmp_path / "alone" / "best", out / "best", 2e-5)


def begin_long_study(tmp_path: Path) -> tuple[list[subprocess.Popen[str]], Path]:
    """Two processes in the middle of a study that is much too long."""
    path, out = write_study(tmp_path, rank=[4], seeds=1), tmp_path / "long"
    long = ["--set", "training.steps=100000", "--set", "training.num_evals=100000"]
    processes = start(["-m", "rsauto", "study", str(path), "--out", str(out), "--no-report", *long])
    until = time.monotonic() + SECONDS
    journal = out / "journal.log"
    while not journal.exists() or '"spec"' not in journal.read_text():
        assert time.monotonic() < until and processes[0].poll() is None, "it did not begin"
        time.sleep(0.2)
    return processes, out


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    said = [process.communicate(timeout=SECONDS)[1] for process in processes]
    return [(process.returncode, words) for process, words in zip(processes, said, strict=True)]


def test_a_process_that_dies_ends_the_study_which_can_be_continued(tmp_path: Path) -> None:
    processes, out = begin_long_study(tmp_path)
    processes[1].kill()
    (code, words), (killed, _) = ends(processes)
    assert (code, killed) == (4, -signal.SIGKILL), words
    assert "the same command continues" in words and "Traceback" not in words
    assert not records(out), "what happened is not the trial's fault"
    ledger = optuna.load_study(study_name="tiny", storage=open_storage(None, out / "journal.log"))
    assert [trial.state.name for trial in ledger.trials] == ["FAIL", "WAITING"]


def test_ctrl_c_stops_all_processes_in_order(tmp_path: Path) -> None:
    processes, out = begin_long_study(tmp_path)
    for process in [*processes, processes[0]]:  # the terminal, and then the launcher once more
        os.kill(process.pid, signal.SIGINT)
    (code, words), (other, _) = ends(processes)
    assert (code, other) == (4, 0), words
    assert "Stopped. 0 trials are kept" in words
    assert not records(out)


WAITING = """
import sys, time
from datetime import timedelta
from rsauto.training import spread
spread.TIMEOUT = timedelta(seconds=3)
joined = spread.join()
joined.together(lambda: 1)
if joined.rank == 0:
    sys.stdin.readline()
for _ in range(2):
    try:
        joined.hear()
    except spread.ProcessLost as lost:
        print(lost)
"""


def test_nobody_waits_for_ever_for_a_process_that_hangs() -> None:
    first, second = start(["-c", WAITING], stdin=True)
    words, errors = second.communicate(timeout=SECONDS)
    assert words.count("lost each other") == 2, errors
    first.kill()
    first.communicate()


# ------------------------------------------------------------------------------- before it starts


def setup_of(folder: Path, size: int, **training: Any) -> Setup:
    values = study_values(folder)
    values["training"] |= training
    return set_up(validate(values), None, Spread(size=size))


@pytest.mark.parametrize(
    ("batch_size", "micro", "size", "expected"),
    [(4, "auto", 2, (2, "auto")), (5, "auto", 2, (3, "auto")), (8, 2, 3, (4, 2)), (4, 4, 3, (2, 2)),
     (4, 4, 1, (4, 4))],
)  # fmt: skip
def test_the_fullest_device_is_planned(
    tmp_path: Path, batch_size: int, micro: Any, size: int, expected: tuple[int, Any]
) -> None:
    setup = setup_of(tmp_path, size, batch_size=batch_size, micro_batch_size=micro)
    assert setup.rows_of_a_device(batch_size) == expected
    found = setup.predict(setup.space.middle(2))
    assert found is not None and found.micro_batch_size <= expected[0]


def test_fewer_rows_than_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training.batch_size: 4 rows .* 5 processes"):
        setup_of(tmp_path, 5)


def test_objects_of_one_process_are_refused(tmp_path: Path) -> None:
    objects = Objects(train=[{"prompt": "a", "completion": "b"}])
    with pytest.raises(InputError, match=r"model.name and data.name"):
        set_up(validate(study_values(tmp_path)), objects, Spread(size=2))


@pytest.mark.parametrize(
    ("variable", "name"),
    [("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("FSDP_OFFLOAD_PARAMS", "offloading")],
)
def test_what_accelerate_can_and_this_cannot_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, name: str
) -> None:
    for key, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "0", variable: "true"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(InputError, match=name):
        join()


def test_a_process_knows_whether_it_was_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert (num_processes(), is_follower()) == (1, False), "a cluster sets these for anything"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert (num_processes(), is_follower()) == (4, True)
    monkeypatch.setenv("RANK", "0")
    assert not is_follower()


# ------------------------------------------------------------------------------- what it is made of


@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_are_a_partition_in_turn(size: int) -> None:
    shares = [Spread(rank=rank, size=size).share(range(7)) for rank in range(size)]
    assert sorted(row for share in shares for row in share) == list(range(7))
    assert [share[0] for share in shares] == list(range(size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_buckets_hold_every_gradient_once_and_one_dtype_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rsauto.training.spread.BUCKET_BYTES", 40)
    sizes = [3, 4, 30, 1, 2]
    tensors = [nn.Parameter(torch.zeros(size)) for size in sizes]
    tensors.insert(4, nn.Parameter(torch.zeros(1, dtype=torch.bfloat16)))
    found = list(_buckets(tensors))
    assert [[len(t) for t in bucket] for bucket in found] == [[3, 4], [30], [1], [1], [2]]
