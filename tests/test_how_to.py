"""Every command of the README and the pages of docs, run on a tiny model in the place of theirs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import postgres
import pytest
import yaml
from processes import Child, command_line
from test_workers_postgres import trials_of, wait_for
from tiny_study import environment, records, rows, study_values, write_model
from typer.testing import CliRunner

from rsauto.cli import app

ROOT = Path(__file__).parents[1]
PAGES = {path.stem: path for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
MODEL, DATABASE = "Qwen/Qwen2.5-0.5B", "postgresql://me@db/studies"
SHORT = ["training.steps=4", "training.num_evals=2", "search.seeds=1", "memory_budget=16MiB"]
SHORTER = {
    "study": [
        "--trials",
        "3",
        "--no-report",
        *(word for value in SHORT for word in ("--set", value)),
    ],
    "train": ["--epochs", "0.2"],
}
"""What is added to a command; the last of two equal options counts."""
ELSEWHERE = {
    "python3 -m venv": "what .ci/run does, and the tests of the wheel",
    "pip install": "test_light.py",
    "vllm serve": "no GPU: test_export.py checks what it reads",
    f"rsauto study gsm8k.yaml --storage {DATABASE} --launcher ray": "test_workers_ray.py",
    ". .venv/bin/activate": "test_tutorial.py, with all of that page",
}  # fmt: skip


def command_lines(page: str) -> list[str]:
    """Those of a page's shell blocks, in their order."""
    found = re.findall(r"```sh\n(.*?)```", PAGES[page].read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "".join(found).replace("\\\n", " ").splitlines()
    return [line for line in lines if not line.startswith(tuple(ELSEWHERE))]


def numbers(out: Path) -> dict[str, str]:
    """The trials that the pages name, and what takes their place."""
    done = [line for line in records(out) if line["outcome"] == "complete"]
    lora = next(line["number"] for line in done if line["method"] == "rslora")
    adalora = next(line["number"] for line in done if line["method"] == "rsadalora")
    return {"17": str(lora), "12": str(lora), "9": str(adalora)}


def gsm8k(folder: Path, **search: object) -> Path:
    """The reader's study file, beside the model and the rows that it names."""
    write_model(folder / MODEL)
    lines = "".join(json.dumps(row) + "\n" for row in rows(80))
    (folder / "train.jsonl").write_text(lines, encoding="utf-8")
    values = study_values(folder, **search)
    values |= {"name": "gsm8k", "model": {"name": MODEL}, "packing": {"mode": "off"}}
    values["data"] = {"name": "train.jsonl", "max_length": 32}
    (folder / "gsm8k.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return gsm8k(tmp_path, rank=[4, 64])


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with postgres.server() as found:
        yield found


def run(line: str, **places: str) -> str:
    """In this process, as it stands there but for what is longer than a test; what it said."""
    program, *words = shlex.split(line, comments=True)
    assert program == "rsauto", line
    words = [places.get(word, word) for word in words]
    done = CliRunner().invoke(app, [*words, *SHORTER.get(words[0], [])])
    assert done.exit_code == 0, (line, done.output, done.exception)
    return done.output


def start(line: str, **places: str) -> Child:
    """In a process of its own."""
    program, *words = shlex.split(line, comments=True)
    assert program == "rsauto", line
    words = [places.get(word, word) for word in words]
    return command_line(*words, *SHORTER.get(words[0], []))


def require_ended(*processes: Child) -> None:
    try:
        for process in processes:
            said, _ = process.communicate(timeout=300)
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()


def test_the_commands_of_the_readme(place: Path) -> None:
    lines = command_lines("README")
    assert [line.split()[1] for line in lines] == [
        "init", "plan", "study", "status", "report", "train", "export", "compare",
    ]  # fmt: skip
    for line in lines:
        if "compare" in line:
            shutil.copytree("runs/study", "runs/other")
        run(line)


def test_the_commands_about_own_data(place: Path) -> None:
    for line in command_lines("own-data"):
        run(line)
    assert Path("runs/gsm8k/report.html").exists()


def test_the_commands_about_the_report(place: Path) -> None:
    for name in ("embedded", "other"):
        shutil.copytree(ROOT / "reports" / "embedded" / "study", f"runs/{name}")
    for line in command_lines("report"):
        run(line)


@pytest.mark.thorough
def test_the_commands_about_a_budget() -> None:
    (line,) = command_lines("gpu-budget")
    assert "GiB" in run(line)


def test_the_commands_about_training_and_export(place: Path) -> None:
    once = {
        "rank": [64],
        "alpha": [8],
        "learning_rate": [0.02],
        "strategy": "grid",
        "baseline": False,
    }
    gsm8k(place, method=["rslora", "rsadalora"], **once)
    run("rsauto study gsm8k.yaml")
    for line in command_lines("train-and-export"):
        run(line, **numbers(Path("runs/gsm8k")))


def test_several_processes_on_one_machine(place: Path) -> None:
    study, worker = command_lines("several-machines")[:2]
    host = start(study, **{"4": "2"})
    require_ended(host)
    assert "runs/gsm8k" in worker and run(worker)


def test_several_machines(place: Path, url: str) -> None:
    lines = [line for line in command_lines("several-machines") if DATABASE in line]
    study, worker = lines
    trials_of(url)  # makes Optuna's tables, for which two at once hinder each other
    host = start(study, **{DATABASE: url})
    try:
        wait_for(lambda: bool(trials_of(url, "gsm8k")), host)
        require_ended(start(worker, **{DATABASE: url}), host)
    finally:
        host.kill()


@pytest.mark.parametrize(
    "line", [line for line in command_lines("several-machines") if "rsauto" != line.split()[0]]
)
@pytest.mark.sample(1)
def test_one_trial_on_several_devices(place: Path, line: str) -> None:
    words = shlex.split(line)
    launcher = {"accelerate": "accelerate.commands.launch", "torchrun": "torch.distributed.run"}
    command = [sys.executable, "-m", launcher[words[0]]]
    if words[0] == "accelerate":
        command += ["--main_process_port", "0"]  # a free one: other tests launch processes, too
    command += ["2" if word == "4" else word for word in words if word not in (words[0], "launch")]
    done = subprocess.run(
        [*command, *SHORTER["study"]],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(records(Path("runs/gsm8k"))) == 3


def test_no_command_is_left_out() -> None:
    tested = {"README", "own-data", "report", "gpu-budget", "train-and-export", "several-machines"}
    assert {page for page in PAGES if command_lines(page)} == {*tested, "tutorial"}
