"""The papers' experiments: run their studies, and read what they say.

    python studies/papers.py run [NAME ...] [--quick] [--gsm8k FOLDER] [--runs runs/papers]
    python studies/papers.py read [NAME ...] [--quick] [--reports reports]

`run` runs studies/NAME.yaml and its further presets one after another, goes on where it was
interrupted, and copies what a reading needs (trials.jsonl, study.yaml, environment.json) to
reports/NAME. `read` writes reports/NAME/README.md with its figures, and reports/README.md, of those
records alone (inference-cost measures anew). Both take every study unless some are named. Two can
run side by side on other studies. --quick has folders of its own, under runs/papers-quick. From the
repository's top folder, where the base is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from readings import adapters, factors, inference, ranks
from readings.drawing import svg
from readings.reading import Arms, Reading, page
from rich.console import Console

from rsauto import study_file
from rsauto.atomic import write_text
from rsauto.console import watch
from rsauto.report.table import Study, load_study
from rsauto.search.driver import study_events
from rsauto.stop import StopFlag
from rsauto.study_command import quieten_libraries, signals_set

STUDIES = Path(__file__).parent
KEPT = ("study.yaml", "trials.jsonl", "environment.json")


@dataclass(frozen=True)
class Entry:
    """A study, and who reads it."""

    read: Callable[[Arms], Reading]
    paper: str
    arms: tuple[str, ...] = ()
    """Presets that are part of it."""
    on_gsm8k: bool = True


ENTRIES: dict[str, Entry] = {
    "rank-sweep": Entry(ranks.rank_sweep, "rsLoRA, figure 2"),
    "rank-sweep-tuned": Entry(ranks.rank_sweep_tuned, "none, the fair version", ("high",)),
    "gradient-norms": Entry(ranks.gradient_norms, "rsLoRA, figure 3"),
    "sgd-stability": Entry(ranks.sgd_stability, "rsLoRA, B.1"),
    "other-optimizer": Entry(ranks.other_optimizer, "rsLoRA, B.2", on_gsm8k=False),
    "init-only": Entry(factors.init_only, "rsLoRA, B.3"),
    "low-rank-lr": Entry(ranks.low_rank_lr, "rsLoRA, B.4", ("top",)),
    "attention-only": Entry(ranks.attention_only, "rsLoRA, B.5"),
    "other-factors": Entry(factors.other_factors, "rsLoRA, B.6"),
    "activations": Entry(factors.activations, "rsLoRA, B.7"),
    "stability-law": Entry(factors.stability_law, "rsLoRA, theorem 3.2", ("adamw",)),
    "inference-cost": Entry(inference.inference_cost, "rsLoRA, sections 1 and 3"),
    "loraplus": Entry(adapters.loraplus, "LoRA+", ("edges",)),
    "adalora-on-rslora": Entry(
        adapters.adalora_on_rslora, "rsLoRA, section 5", ("peft", "memory"), on_gsm8k=False
    ),
    "quantised-base": Entry(adapters.quantised_base, "none, a guide", ("int8", "int4")),
}


def run_arm(
    name: str, arm: str, runs: Path, *, quick: bool, sets: Sequence[str], console: Console
) -> Path:
    """Runs, or goes on with, one preset of a study; its folder."""
    words = ["quick" if quick else "", arm]
    preset = "-".join(word for word in words if word) or None
    config = study_file.load(STUDIES / f"{name}.yaml", preset=preset, sets=sets)
    out = runs / (f"{name}-{arm}" if arm else name)
    stop = StopFlag()
    with signals_set(stop):
        watch(study_events(config, out, stop=stop, report=False), config, console)
    return out


def run(name: str, runs: Path, reports: Path, *, quick: bool, gsm8k: Path | None) -> None:
    """A whole study, and its records copied to where they are read."""
    entry = ENTRIES[name]
    local = entry.on_gsm8k and gsm8k is not None and not quick
    sets = [f"data.name={gsm8k}", "data.subset=null"] if local else []
    if quick:
        sets = ["packing.mode=off"]  # the probe of packs takes longer than these trials
    for arm in ("", *entry.arms):
        console = Console()
        console.rule(f"{name} {arm}".strip())
        out = run_arm(name, arm, runs, quick=quick, sets=sets, console=console)
        place = reports / name / arm
        place.mkdir(parents=True, exist_ok=True)
        for file in KEPT:
            text = (out / file).read_text(encoding="utf-8")
            # Where the data lay on this machine is nobody's business.
            write_text(place / file, text.replace(str(gsm8k), gsm8k.name) if gsm8k else text)


def arms_of(name: str, reports: Path) -> dict[str, Study] | None:
    """The records of a study, None where it was not run."""
    arms = ("", *ENTRIES[name].arms)
    if not all((reports / name / arm / "trials.jsonl").exists() for arm in arms):
        return None
    return {arm: load_study(reports / name / arm) for arm in arms}


def read(name: str, reports: Path) -> Reading | None:
    """Writes the study's page; None where it was not run."""
    arms = arms_of(name, reports)
    if arms is None:
        return None
    found = ENTRIES[name].read(arms)
    reading = replace(found, measured=found.measured + _cut_short(arms))
    folder = reports / name
    for drawing in reading.drawings:
        write_text(folder / drawing.file, svg(drawing.figure, f"{name}/{drawing.file}"))
    text = page(name, question_of(name), reading, _footer(name, arms))
    write_text(folder / "README.md", text)
    summary = {"verdict": reading.verdict, "measured": reading.measured}
    write_text(folder / "reading.json", json.dumps(summary, indent=1) + "\n")
    return reading


def _cut_short(arms: Arms) -> str:
    """Which arms were stopped before their end."""
    done = {arm or "its own": (len(s.records), s.config.search.trials) for arm, s in arms.items()}
    short = [f"{num} of {of} trials of {arm}" for arm, (num, of) in done.items() if num < of]
    return f" It was stopped early: {', '.join(short)}." if short else ""


def question_of(name: str) -> str:
    """The first line of the study file."""
    first = (STUDIES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("# ")


def _footer(name: str, arms: Arms) -> str:
    records = [record for study in arms.values() for record in study.records]
    seconds = sum(record.train_seconds or 0.0 for record in records)
    packages: dict[str, Any] = arms[""].environment.get("packages", {})
    versions = ", ".join(f"{p} {packages[p]}" for p in ("torch", "peft") if p in packages)
    model, training = arms[""].config.model.name, arms[""].config.training
    clock = f", {seconds / 60:.0f} minutes of training" if seconds else ""
    options = _options(name, arms[""])
    return (
        f"Model {model}, {training.steps} steps of {training.batch_size} rows, "
        f"{training.optimizer} unless the table says otherwise; {len(records)} trials{clock}; "
        f"{versions}. Validation rows only; no test row was read. Records: trials.jsonl in this "
        f"folder. Made by `python studies/papers.py run {name}{options}` and "
        f"`python studies/papers.py read {name}`; settings and presets in studies/{name}.yaml.\n"
    )


def _options(name: str, study: Study) -> str:
    """With which the records were made: data in a local folder have no subset."""
    if study.config.data.name == "embedded":
        return " --quick" * ENTRIES[name].on_gsm8k
    return " --gsm8k FOLDER" * (ENTRIES[name].on_gsm8k and study.config.data.subset is None)


def summary(reports: Path) -> str:
    """reports/README.md of every reading there is."""
    lines = [
        "# What the papers' experiments gave when run again\n",
        "Every row is a study of `studies/`, its page beside it has the claim, the criterion, "
        "tables and figures. Small models and short runs: what was not reproduced here may hold "
        "at the papers' size (`--preset paper`), and the other way round. Made by "
        "`python studies/papers.py run` and `read`.\n",
        "| study | paper | question | verdict | measured |",
        "|---|---|---|---|---|",
    ]
    for name, entry in ENTRIES.items():
        path = reports / name / "reading.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        verdict, measured = found.get("verdict", "not run"), found.get("measured", "")
        lines.append(
            f"| [{name}]({name}/README.md) | {entry.paper} | {question_of(name)} | {verdict} | "
            f"{measured} |"
        )
    return "\n".join(lines) + "\n\n" + "\n".join(_others(reports)) + "\n"


def _others(reports: Path) -> Iterator[str]:
    yield "Further reports: "
    others = [p for p in sorted(reports.iterdir()) if p.is_dir() and p.name not in ENTRIES]
    yield ", ".join(f"[{path.name}]({path.name})" for path in others) + "."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "read"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ENTRIES))
    parser.add_argument("--quick", action="store_true", help="the studies' quick presets")
    parser.add_argument("--gsm8k", type=Path, help="folder of train.jsonl, instead of the hub's")
    parser.add_argument("--runs", type=Path, default=Path("runs/papers"))
    parser.add_argument("--reports", type=Path, default=Path("reports"))
    chosen = parser.parse_args()
    unknown = [name for name in chosen.names if name not in ENTRIES]
    if unknown:
        parser.error(f"no such study: {', '.join(unknown)}; there are {', '.join(ENTRIES)}")
    names = chosen.names or list(ENTRIES)
    if chosen.quick:  # never in the place of records that a verdict stands on
        chosen.runs, chosen.reports = Path("runs/papers-quick"), Path("runs/papers-quick/reports")
    if chosen.what == "run":
        quieten_libraries()
        for name in names:
            run(name, chosen.runs, chosen.reports, quick=chosen.quick, gsm8k=chosen.gsm8k)
        return
    unread = []
    for name in names:
        try:
            reading = read(name, chosen.reports)
        except Exception as error:  # one study's records must not keep the others from being read
            unread.append(f"{name}: {type(error).__name__}: {error}")
            continue
        print(f"{name}: {'not run' if reading is None else reading.verdict}")
    write_text(chosen.reports / "README.md", summary(chosen.reports))
    if unread:
        sys.exit("could not be read:\n" + "\n".join(unread))


if __name__ == "__main__":
    main()
