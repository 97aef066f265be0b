"""Choose the embedded fine-tuning task by experiment, and record what every candidate gave.

    python studies/embedded_task_choice.py            # every measurement: 155 trials
    python studies/embedded_task_choice.py --quick    # does it run? well under a minute

1. The chosen task at every rank of rsLoRA, in full fine-tuning, at three ranks of LoRA and with
   PEFT's defaults; three seeds.
2. Every candidate at the lowest and the highest rank of rsLoRA, one seed.

A learning rate is tuned on a grid of factors of 2, extended until the best mean validation loss
over the seeds has a worse one on both sides. Every trial is a line of
`reports/embedded/task-choice.csv`; a trial found there is not run again, so an interrupted run
continues. At the end the tables in `reports/embedded/task-choice.md` are rewritten. The test split
is never read.
"""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import math
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rsauto.embedded import MODEL_DIR
from rsauto.embedded.task import LanguageSpec, Row, Split, generate_splits

Rule = Literal["rslora", "lora", "full"]
Splits = dict[str, list[Row]]

REPORT_DIR = Path(__file__).parent.parent / "reports" / "embedded"
TABLES_BEGIN = "<!-- tables: written by studies/embedded_task_choice.py -->"
TABLES_END = "<!-- end of tables -->"

BATCH_SIZE = 16
NUM_STEPS = 72
NUM_EVALS = 3
IGNORED = -100

RANKS = (2, 4, 8, 16, 32, 64)
COARSE_RANKS = (2, 8, 64)
SCREENING_RANKS = (2, 64)
SEEDS = (0, 1, 2)
ALPHA = 16.0
START_LR: dict[Rule, float] = {"rslora": 8e-3, "lora": 8e-3, "full": 4e-3}

# Candidates ------------------------------------------------------------------------------------


def by_name(splits: Mapping[Split, list[Row]]) -> Splits:
    """Drop the test split, so that nothing here can read it."""
    return {"train": splits["train"], "validation": splits["validation"]}


def facts(num_facts: int, seed: int = 0) -> Splits:
    """Invented servers, each with a port of four digits; validation asks in a phrasing of its own.

    Training states every fact in three phrasings, so the answer to a validation prompt has been
    seen, its wording has not.
    """
    rng = random.Random(seed)
    syllables = ["ba", "do", "fe", "gi", "ku", "lo", "me", "na", "po", "ri", "su", "ta"]
    names = sorted({"".join(rng.choices(syllables, k=3)) for _ in range(4 * num_facts)})
    names = rng.sample(names, num_facts)
    ports = {name: f" {rng.randrange(1000, 10000)}" for name in names}
    phrasings = ["port of {} =", "{} listens on port", "open {} at port"]
    train = [{"prompt": p.format(n), "completion": ports[n]} for n in names for p in phrasings]
    rng.shuffle(train)
    asked = rng.sample(names, min(200, num_facts))
    held = [{"prompt": f"connect to {n}: port", "completion": ports[n]} for n in asked]
    return {"train": train, "validation": held}


def word_lists(num_rows: int = 3200, seed: int = 0) -> Splits:
    """An algorithm instead of knowledge: sort, reverse or rotate a list of four to six words."""
    rng = random.Random(seed)
    words = "file list name line key code number value text header tuple result node error".split()
    operations: dict[str, Callable[[list[str]], list[str]]] = {
        "sort": sorted,
        "reverse": lambda items: items[::-1],
        "rotate": lambda items: items[1:] + items[:1],
    }
    rows: dict[str, Row] = {}
    while len(rows) < num_rows:
        operation = rng.choice(sorted(operations))
        items = rng.sample(words, rng.randint(4, 6))
        prompt = f"{operation}: {' '.join(items)} ="
        completion = " " + " ".join(operations[operation](items))
        rows[prompt] = {"prompt": prompt, "completion": completion}
    ordered = list(rows.values())
    return {"train": ordered[:-200], "validation": ordered[-200:]}


CANDIDATES: dict[str, Callable[[], Splits]] = {
    "short-32": lambda: by_name(generate_splits(LanguageSpec())),
    "short-24": lambda: by_name(
        generate_splits(LanguageSpec(num_nouns=12, num_adjectives=6, num_verbs=6))
    ),
    "short-64": lambda: by_name(
        generate_splits(LanguageSpec(num_nouns=32, num_adjectives=16, num_verbs=16))
    ),
    "transitive-32": lambda: by_name(generate_splits(LanguageSpec(transitive=True))),
    "dialects-3": lambda: by_name(generate_splits(LanguageSpec(num_dialects=3))),
    "facts-200": lambda: facts(200),
    "word-lists": word_lists,
}
CHOSEN = "short-32"


# One trial -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A split as token ids; row i has `prompt_lengths[i]` prompt tokens, then completion + eos."""

    token_ids: list[list[int]]
    prompt_lengths: list[int]
    pad_id: int

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Input ids, attention mask and labels, each (B, T), padded right to the longest row."""
        longest = max(len(self.token_ids[i]) for i in rows)
        input_ids = torch.full((len(rows), longest), self.pad_id)
        attention = torch.zeros((len(rows), longest), dtype=torch.long)
        labels = torch.full((len(rows), longest), IGNORED)
        for b, i in enumerate(rows):
            ids = torch.tensor(self.token_ids[i])
            input_ids[b, : len(ids)] = ids
            attention[b, : len(ids)] = 1
            labels[b, self.prompt_lengths[i] : len(ids)] = ids[self.prompt_lengths[i] :]
        return input_ids, attention, labels


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One line of the CSV."""

    candidate: str
    rule: Rule
    rank: int
    """LoRA rank; 0 for full fine-tuning."""
    alpha: float
    lr: float
    steps: int
    schedule: str
    seed: int
    val_loss: float
    """Nats per completion token (eos included), NaN where training diverged."""
    best_val_loss: float
    """Lowest of the evaluations of the trial."""
    exact_match: float
    """Share of validation rows whose completion greedy decoding reproduces, 0 to 1."""
    train_loss: float
    """Mean over the last ten steps, nats per completion token."""
    seconds: float
    """Training and evaluations, without loading the model."""


def encode(rows: Sequence[Row]) -> Encoded:
    """Tokenise prompt and completion apart, so that the border between them is a token border."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    token_ids, prompt_lengths = [], []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = tokenizer(row["completion"])["input_ids"]
        token_ids.append([*prompt, *completion, tokenizer.eos_token_id])
        prompt_lengths.append(len(prompt))
    return Encoded(
        token_ids=token_ids, prompt_lengths=prompt_lengths, pad_id=tokenizer.pad_token_id
    )


def adapted_model(base: PreTrainedModel, rule: Rule, rank: int, alpha: float) -> torch.nn.Module:
    """A copy of the base with LoRA on every linear layer but the head, or to be trained in full."""
    model = copy.deepcopy(base)
    if rule == "full":
        return model
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT annotates int, any number works
        use_rslora=rule == "rslora",
        target_modules="all-linear",
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def lr_factor(step: int, num_steps: int, schedule: str) -> float:
    """Warm-up over the first tenth of the steps, then constant or linear decay to zero."""
    warmup = max(1, num_steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if schedule == "constant" else (num_steps - step) / (num_steps - warmup)


def row_order(num_rows: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of row numbers, each pass in a new order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(num_rows, generator=generator).tolist()
        for start in range(0, num_rows - BATCH_SIZE + 1, BATCH_SIZE):
            yield order[start : start + BATCH_SIZE]


@torch.no_grad()
def evaluate(model: torch.nn.Module, split: Encoded, batch_size: int = 100) -> tuple[float, float]:
    """Loss in nats per completion token, and exact match, both from teacher-forced logits.

    Greedy decoding writes a completion and its eos exactly if and only if the argmax is right at
    each of its tokens given the right ones before: up to the first error both see the same text.
    """
    model.eval()
    by_length = sorted(range(len(split.token_ids)), key=lambda i: len(split.token_ids[i]))
    loss_sum, num_tokens, num_exact = 0.0, 0, 0
    for start in range(0, len(by_length), batch_size):
        input_ids, attention, labels = split.batch(by_length[start : start + batch_size])
        logits = model(input_ids=input_ids, attention_mask=attention).logits[:, :-1]
        targets = labels[:, 1:]
        counted = targets != IGNORED
        loss_sum += torch.nn.functional.cross_entropy(
            logits[counted], targets[counted], reduction="sum"
        ).item()
        num_tokens += int(counted.sum())
        num_exact += int(((logits.argmax(-1) == targets) | ~counted).all(dim=1).sum())
    model.train()
    return loss_sum / num_tokens, num_exact / len(by_length)


def run_trial(
    base: PreTrainedModel,
    data: dict[str, Encoded],
    *,
    candidate: str,
    rule: Rule,
    rank: int,
    alpha: float,
    lr: float,
    steps: int,
    schedule: str,
    seed: int,
) -> Trial:
    """Fine-tune once and evaluate `NUM_EVALS` times; the seed sets LoRA's A and the row order."""
    torch.manual_seed(seed)
    model = adapted_model(base, rule, rank, alpha)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)
    train_losses: list[float] = []
    val_losses: list[float] = []
    exact_match = math.nan
    order = row_order(len(data["train"].token_ids), seed)
    eval_steps = {round(steps * (k + 1) / NUM_EVALS) for k in range(NUM_EVALS)}
    model.train()
    started = time.perf_counter()
    for step, rows in zip(range(steps), order, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_factor(step, steps, schedule)
        input_ids, attention, labels = data["train"].batch(rows)
        loss = model(input_ids=input_ids, attention_mask=attention, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        train_losses.append(loss.item())
        if step + 1 in eval_steps:
            val_loss, exact_match = evaluate(model, data["validation"])
            val_losses.append(val_loss)
    return Trial(
        candidate=candidate,
        rule=rule,
        rank=rank,
        alpha=alpha,
        lr=lr,
        steps=steps,
        schedule=schedule,
        seed=seed,
        val_loss=val_losses[-1],
        best_val_loss=min(val_losses),
        exact_match=exact_match,
        train_loss=statistics.fmean(train_losses[-10:]),
        seconds=time.perf_counter() - started,
    )


# Records ---------------------------------------------------------------------------------------


def read_trials(path: Path) -> list[Trial]:
    """The trials recorded so far, none where the file does not exist."""
    if not path.exists():
        return []
    converters: dict[str, Callable[[str], object]] = {
        "str": str, "Rule": str, "int": int, "float": float,
    }  # fmt: skip
    with path.open(newline="", encoding="utf-8") as stream:
        return [
            Trial(**{f.name: converters[str(f.type)](line[f.name]) for f in fields(Trial)})  # type: ignore[arg-type]
            for line in csv.DictReader(stream)
        ]


def append_trial(path: Path, trial: Trial) -> None:
    """Add one line, with the header first in a new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [f.name for f in fields(Trial)], lineterminator="\n")
        if is_new:
            writer.writeheader()
        row = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(trial).items()}
        writer.writerow(row)


# Measurements ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a learning rate is tuned for."""

    candidate: str
    rule: Rule
    rank: int = 0
    alpha: float = ALPHA

    def matches(self, trial: Trial) -> bool:
        """Whether `trial` was run with this setting, at any learning rate."""
        return (trial.candidate, trial.rule, trial.rank, trial.alpha) == (
            self.candidate, self.rule, self.rank, self.alpha,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Request:
    """A trial to run."""

    setting: Setting
    lr: float
    seed: int
    steps: int
    schedule: str

    def is_answered_by(self, trial: Trial) -> bool:
        """Whether `trial` is this one; the CSV keeps four digits of a learning rate."""
        return (
            self.setting.matches(trial)
            and (trial.steps, trial.schedule, trial.seed) == (self.steps, self.schedule, self.seed)
            and math.isclose(trial.lr, self.lr, rel_tol=1e-3)
        )


@functools.cache
def load_base() -> PreTrainedModel:
    """The embedded model, once per process."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    return model


@functools.cache
def load_candidate(candidate: str) -> dict[str, Encoded]:
    """Training and validation rows as tokens, once per process."""
    return {name: encode(rows) for name, rows in CANDIDATES[candidate]().items()}


def answer(request: Request) -> Trial:
    """Run the trial in a worker process.

    One thread: at this size the threads of one step wait for each other longer than they work, so
    two trials side by side are faster than two threads in a trial.
    """
    torch.set_num_threads(1)
    setting = request.setting
    return run_trial(
        load_base(),
        load_candidate(setting.candidate),
        candidate=setting.candidate,
        rule=setting.rule,
        rank=setting.rank,
        alpha=setting.alpha,
        lr=request.lr,
        steps=request.steps,
        schedule=request.schedule,
        seed=request.seed,
    )


class Bench:
    """The pool that runs trials, and the trials done so far."""

    def __init__(self, csv_path: Path, pool: Executor, *, steps: int, schedule: str) -> None:
        self.csv_path = csv_path
        self.pool = pool
        self.steps = steps
        self.schedule = schedule
        self.done = read_trials(csv_path)

    def trials(
        self, setting: Setting, rates: Sequence[float], seeds: Sequence[int]
    ) -> list[list[Trial]]:
        """For every learning rate its trials, one per seed; runs those that have no record."""
        requests = [
            Request(setting=setting, lr=lr, seed=seed, steps=self.steps, schedule=self.schedule)
            for lr in rates
            for seed in seeds
        ]
        missing = [r for r in requests if not any(r.is_answered_by(t) for t in self.done)]
        for trial in self.pool.map(answer, missing):
            append_trial(self.csv_path, trial)
        # From the file, so that the tables are the same whether a trial ran now or before.
        self.done = read_trials(self.csv_path)
        found = [next(t for t in self.done if r.is_answered_by(t)) for r in requests]
        return [found[k : k + len(seeds)] for k in range(0, len(found), len(seeds))]

    def tune(self, setting: Setting, seeds: Sequence[int], start_lr: float) -> list[Trial]:
        """Walk the grid start_lr * 2^k until the best mean loss has a worse one on both sides.

        Returns the trials, one per seed, at the best learning rate.
        """
        lr = start_lr
        while True:
            lower, here, upper = self.trials(setting, (lr / 2, lr, lr * 2), seeds)
            best = min((lower, here, upper), key=mean_val_loss)
            if best is here:
                return here
            lr = best[0].lr

    def tune_ranks(
        self, candidate: str, rule: Rule, ranks: Sequence[int], seeds: Sequence[int]
    ) -> list[list[Trial]]:
        """Tune rank after rank, each search starting where the one before ended."""
        start_lr = START_LR[rule]
        tuned: list[list[Trial]] = []
        for rank in ranks:
            setting = Setting(candidate=candidate, rule=rule, rank=rank)
            tuned.append(self.tune(setting, seeds, start_lr))
            start_lr = tuned[-1][0].lr
            print(table_line("", tuned[-1]), flush=True)
        return tuned


def mean_val_loss(trials: Sequence[Trial]) -> float:
    """Mean over the seeds, nats per completion token; infinite where a trial diverged."""
    loss = statistics.fmean(trial.val_loss for trial in trials)
    return loss if math.isfinite(loss) else math.inf


# Tables ----------------------------------------------------------------------------------------

RULE_NAMES: dict[Rule, str] = {"rslora": "rsLoRA", "lora": "LoRA", "full": "full fine-tuning"}
TABLE_HEAD = (
    "| what | rule | rank | alpha | learning rate | validation loss | exact match, % | s/trial |\n"
    "|---|---|---|---|---|---|---|---|"
)


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation over the seeds, the mean alone for a single seed."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table_line(what: str, trials: Sequence[Trial]) -> str:
    """One line below `TABLE_HEAD`; the time is the median, for other programs disturb it."""
    first = trials[0]
    loss = mean_and_deviation([t.val_loss for t in trials], 3)
    exact = mean_and_deviation([100.0 * t.exact_match for t in trials], 1)
    seconds = statistics.median(t.seconds for t in trials)
    rank, alpha = (str(first.rank), f"{first.alpha:g}") if first.rank else ("-", "-")
    return (
        f"| {what} | {RULE_NAMES[first.rule]} | {rank} | {alpha} | {first.lr:.2g} | {loss} "
        f"| {exact} | {seconds:.1f} |"
    )


def lr_table(trials: Sequence[Trial], rule: Rule) -> str:
    """Mean validation loss of the chosen task over rank and learning rate, three seeds each."""
    cells: dict[tuple[int, float], list[Trial]] = {}
    for trial in trials:
        if (trial.candidate, trial.rule, trial.alpha) == (CHOSEN, rule, ALPHA):
            cells.setdefault((trial.rank, trial.lr), []).append(trial)
    ranks = sorted({rank for rank, _ in cells})
    rates = sorted({lr for _, lr in cells})
    lines = [
        f"| {RULE_NAMES[rule]}, rank | " + " | ".join(f"{lr:.2g}" for lr in rates) + " |",
        "|---" * (len(rates) + 1) + "|",
    ]
    for rank in ranks:
        losses = [
            f"{mean_val_loss(cells[rank, lr]):.3f}" if (rank, lr) in cells else "" for lr in rates
        ]
        lines.append(f"| {rank} | " + " | ".join(losses) + " |")
    return "\n".join(lines)


def measure_chosen(bench: Bench, ranks: Sequence[int], seeds: Sequence[int]) -> list[str]:
    """Lines for the chosen task: both rules at every rank, full fine-tuning, PEFT's defaults."""
    peft_default = Setting(candidate=CHOSEN, rule="lora", rank=8, alpha=8.0)
    coarse = [rank for rank in ranks if rank in COARSE_RANKS]
    (untuned,) = bench.trials(peft_default, (5e-5,), seeds)
    return [
        TABLE_HEAD,
        *(table_line("tuned", t) for t in bench.tune_ranks(CHOSEN, "rslora", ranks, seeds)),
        *(table_line("tuned", t) for t in bench.tune_ranks(CHOSEN, "full", (0,), seeds)),
        *(table_line("tuned", t) for t in bench.tune_ranks(CHOSEN, "lora", coarse, seeds)),
        table_line("PEFT defaults", untuned),
        table_line("PEFT defaults, tuned", bench.tune(peft_default, seeds, START_LR["lora"])),
    ]


def screen(bench: Bench) -> list[str]:
    """Lines for every candidate: the lowest and the highest rank of rsLoRA, seed 0."""
    lines = [TABLE_HEAD]
    for candidate in CANDIDATES:
        tuned = bench.tune_ranks(candidate, "rslora", SCREENING_RANKS, SEEDS[:1])
        lines += [table_line(candidate, trials) for trials in tuned]
    return lines


def write_tables(path: Path, tables: str) -> None:
    """Replace what stands between the two markers of the report."""
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(TABLES_BEGIN)
    after = rest.split(TABLES_END)[1]
    path.write_text(f"{before}{TABLES_BEGIN}\n\n{tables}\n\n{TABLES_END}{after}", encoding="utf-8")


def quick(pool: Executor) -> None:
    """A few steps of the chosen task at one rank."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder) / "quick.csv", pool, steps=6, schedule="linear")
        print("\n".join(measure_chosen(bench, (2,), SEEDS[:1])))


def measure_everything(pool: Executor, schedule: str) -> None:
    """Run what has no record and rewrite the tables of the report."""
    bench = Bench(REPORT_DIR / "task-choice.csv", pool, steps=NUM_STEPS, schedule=schedule)
    chosen = measure_chosen(bench, RANKS, SEEDS)
    candidates = screen(bench)
    tables = [
        "### Candidates, seed 0", "", *candidates, "",
        f"### Chosen task `{CHOSEN}`, seeds {', '.join(map(str, SEEDS))}", "", *chosen, "",
        "### Validation loss over rank and learning rate", "",
        lr_table(bench.done, "rslora"), "", lr_table(bench.done, "lora"),
    ]  # fmt: skip
    write_tables(REPORT_DIR / "task-choice.md", "\n".join(tables))


def main() -> None:
    """Command line of the study."""
    parser = argparse.ArgumentParser(description="Choose the embedded fine-tuning task.")
    parser.add_argument("--quick", action="store_true", help="a few steps, nothing is kept")
    parser.add_argument("--schedule", choices=["linear", "constant"], default="linear")
    arguments = parser.parse_args()
    # Spawned, not forked: a fork of a process that has run torch's threads can hang.
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        if arguments.quick:
            quick(pool)
        else:
            measure_everything(pool, arguments.schedule)


if __name__ == "__main__":
    main()
