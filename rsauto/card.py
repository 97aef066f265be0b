"""The Hugging Face model card of an adapter or a merged model: its README.md.

What it is, how it was trained, how good it is, what memory it took, where it comes from, and how to
load it. The results are also in the metadata, where the hub reads them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from rsauto.config import DataConfig, StudyConfig
from rsauto.records import TrialRecord
from rsauto.report.markdown import code, fenced, inline
from rsauto.units import bytes_text

Form = Literal["lora", "adalora", "merged"]
"""Of the files beside the card."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a card is about."""

    config: StudyConfig
    base_name: str
    """As the study has it: 'embedded', a hub id or a folder."""
    record: TrialRecord
    form: Form = "lora"
    label_names: tuple[str, ...] | None = None
    """Of a classifier."""
    pad_token_id: int = 0
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Of model and data."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Versions, by the packages' names."""
    test_metrics: Mapping[str, float] = field(default_factory=dict)
    """On the test rows, where it was evaluated on them."""


def model_card(subject: Subject) -> str:
    """The card as Markdown, with its metadata on top."""
    config, record = subject.config, subject.record
    base = f"quantised to {record.quant_bits} bits, " if record.quant_bits else ""
    content = f"""---
{_metadata(subject).to_yaml()}
---
# {_title(subject)}

Trained by rsauto in study {code(config.name)}, trial {record.number}, on the frozen base model
{code(_shown(subject.base_name))}, {base}with seed {record.seed}.

{_what_the_files_hold(subject)}

| trained with | |
|---|---|
{_training_rows(subject)}

| data | |
|---|---|
{_data_rows(config.data, subject)}

{_result_tables(subject)}

| memory | |
|---|---|
{_memory_rows(record)}

| made with | |
|---|---|
{_provenance_rows(subject)}

{fenced(loading_code(subject), "python")}
"""
    return str(ModelCard(content))


def is_hub_id(name: str) -> bool:
    """Whether a model's or a dataset's name is one of the hub, and not a folder or our own."""
    looks_so = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None
    return looks_so and name not in ("embedded", "in-memory") and not Path(name).exists()


def _shown(name: str) -> str:
    """A name to publish: of a local folder or file its last part alone."""
    return name if is_hub_id(name) else Path(name).name


def _metadata(subject: Subject) -> ModelCardData:
    is_classifier = subject.label_names is not None
    task = "text-classification" if is_classifier else "text-generation"
    data = subject.config.data.name
    return ModelCardData(
        base_model=subject.base_name if is_hub_id(subject.base_name) else None,
        datasets=[data] if is_hub_id(data) else None,
        library_name="transformers" if subject.form == "merged" else "peft",
        pipeline_tag=task,
        tags=["lora", "rsauto"],
        model_name=f"{subject.config.name}-{subject.record.number}",
        eval_results=_eval_results(subject, task) or None,
    )


def _eval_results(subject: Subject, task: str) -> list[EvalResult]:
    data = subject.config.data
    found: list[EvalResult] = []
    for split, values in _results(subject).items():
        for metric, value in values.items():
            found.append(
                EvalResult(
                    task_type=task,
                    dataset_type=_shown(data.name),
                    dataset_name=_shown(data.name),
                    dataset_config=data.subset,
                    dataset_revision=data.revision,
                    dataset_split=split,
                    metric_type=metric,
                    metric_name=metric,
                    metric_value=value,
                )
            )
    return found


def _results(subject: Subject) -> dict[str, dict[str, float]]:
    """Loss and metrics of every split that there are numbers of."""
    record = subject.record
    validation = {"eval_loss": record.eval_loss, "perplexity": record.perplexity, **record.metrics}
    known = {name: value for name, value in validation.items() if value is not None}
    both = {"validation": known, "test": dict(subject.test_metrics)}
    return {split: values for split, values in both.items() if values}


def _title(subject: Subject) -> str:
    record = subject.record
    rank = f"rank {record.rank}{' on average' if record.rank_pattern else ''}"
    if subject.form == "merged":
        return f"{inline(_shown(subject.base_name))} with a LoRA adapter of {rank} merged in"
    kind = "AdaLoRA" if subject.form == "adalora" else "LoRA"
    return f"{kind} adapter, {rank}"


def _what_the_files_hold(subject: Subject) -> str:
    gamma = f"gamma_r = {subject.record.gamma_r:.6g} ({_rule(subject.record)})"
    if subject.form == "merged":
        return f"The files hold the whole model: its weights plus {gamma} times the adapter's."
    if subject.form == "adalora":
        return (
            "The files hold the active triplets in the format of PEFT's own AdaLoRA, which scales\n"
            f"them as they were trained, with {gamma}."
        )
    return (
        "The files hold plain LoRA of scale 1 (`lora_alpha` = `r`): the factor\n"
        f"{gamma} it was trained with is folded into the factors."
    )


def _rule(record: TrialRecord) -> str:
    if record.scaling_exponent is not None:
        return f"alpha r^{record.scaling_exponent:g}"
    return "alpha / sqrt(r)" if record.scaling_rule == "rslora" else "alpha / r"


def _training_rows(subject: Subject) -> str:
    record = subject.record
    targets = record.target_modules
    rows: list[tuple[str, Any]] = [
        ("method", record.method),
        ("rank, alpha", f"{record.rank}, {record.alpha}"),
        ("scaling rule", f"gamma_r = {_rule(record)} = {record.gamma_r:.6g}"),
        ("adapted layers", targets if isinstance(targets, str) else ", ".join(targets)),
        ("learning rate (A), lr_ratio (B/A)", f"{record.learning_rate:g}, {record.lr_ratio:g}"),
        *_rank_rows(record),
    ]
    if record.init_scale is not None:
        rows.append(("A drawn", f"{record.init_scale:.3g} times as wide as usual"))
    if record.head_learning_rate is not None:
        rows.append(("learning rate of the head", f"{record.head_learning_rate:g}"))
    clip = "none" if record.max_grad_norm is None else f"{record.max_grad_norm:g}"
    rows += [
        ("optimizer, schedule", f"{record.optimizer}, {record.schedule}"),
        ("warm-up, weight decay", f"{record.warmup_share:g} of the steps, {record.weight_decay:g}"),
        ("gradient clipping", clip),
        ("steps x batch size", f"{record.steps} x {record.batch_size}"),
    ]
    return _table(rows)


def _rank_rows(record: TrialRecord) -> list[tuple[str, Any]]:
    """How rank is spread, where modules differ."""
    if record.rank_pattern is None:
        return []
    empty = sum(rank == 0 for rank in record.rank_pattern.values())
    rows: list[tuple[str, Any]] = [
        ("ranks of the modules", f"up to {record.r_max}; {empty} of them are not adapted"),
        ("a server must allow", f"rank {record.r_max}"),
    ]
    if record.allocation is not None:
        rows += [
            ("rank at the start", f"{record.init_rank} in every module"),
            ("learning rate of lambda", f"{record.lambda_lr_ratio:g} times that of A"),
        ]
    return rows


def _data_rows(data: DataConfig, subject: Subject) -> str:
    rows: list[tuple[str, Any]] = [("name", Code(_shown(data.name)))]
    for name in ("subset", "revision", "prompt", "completion", "text", "text_pair", "messages",
                 "label"):  # fmt: skip
        value = getattr(data, name)
        if value is not None:
            rows.append((name, Code(repr(value))))
    rows.append(("the loss counts", "all" if data.loss_on == "all" else "completions"))
    rows.append(("tokens a row, at most", data.max_length))
    if subject.label_names is not None:
        rows.append(("classes", ", ".join(subject.label_names)))
    return _table(rows)


def _result_tables(subject: Subject) -> str:
    tables = []
    for split, values in _results(subject).items():
        rows = [(name, f"{value:.4f}" if name == "eval_loss" else f"{value:.4g}")
                for name, value in values.items()]  # fmt: skip
        tables.append(f"| on the {split} rows | |\n|---|---|\n{_table(rows)}")
    return "\n\n".join(tables) or "It was not evaluated."


def _memory_rows(record: TrialRecord) -> str:
    measured = "not measured: it was trained together with others"
    if record.measured_peak_bytes is not None:
        measured = bytes_text(record.measured_peak_bytes)
    return _table(
        [
            ("peak of training, predicted", bytes_text(record.predicted_peak_bytes)),
            ("peak of training, measured", measured),
            ("at a micro-batch of", record.micro_batch_size or "-"),
            ("trainable parameters", f"{record.num_trainable_params or 0:,}"),
        ]
    )


def _provenance_rows(subject: Subject) -> str:
    record = subject.record
    versions = ", ".join(f"{name} {number}" for name, number in subject.packages.items())
    rows: list[tuple[str, Any]] = [
        ("study, trial", f"{subject.config.name}, {record.number} ({record.role})"),
        ("seed", record.seed),
        ("begun", record.started_at or "-"),
    ]
    rows += [(f"fingerprint of the {k}", Code(v)) for k, v in subject.fingerprints.items()]
    return _table([*rows, ("packages", versions or "-")])


def _table(rows: list[tuple[str, Any]]) -> str:
    return "\n".join(f"| {inline(name)} | {_cell(value)} |" for name, value in rows)


class Code(str):
    """A value to be shown as code."""


def _cell(value: Any) -> str:
    """Names of classes, layers and files are other people's: nothing in them is markup."""
    # A table ends its cells at every bar, those of code too.
    return code(value).replace("|", "\\|") if isinstance(value, Code) else inline(str(value))


def loading_code(subject: Subject) -> str:
    """Python that loads what the card is about."""
    auto, options = "AutoModelForCausalLM", ""
    if subject.label_names is not None:
        auto = "AutoModelForSequenceClassification"
        options = f"""
    id2label={dict(enumerate(subject.label_names))!r},
    ignore_mismatched_sizes=True,  # of a head with other classes; the adapter brings its own
    pad_token_id={subject.pad_token_id},
"""
    if subject.form == "merged":
        return f"""from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")"""
    local = "" if is_hub_id(subject.base_name) else "path/to/"
    name = repr(f"{local}{_shown(subject.base_name)}")
    imports = f"from peft import PeftModel\nfrom transformers import {auto}\n"
    if subject.base_name == "embedded":
        name = "MODEL_DIR"
        imports += "\nfrom rsauto.embedded import MODEL_DIR\n"
    return f"""{imports}
base = {auto}.from_pretrained({name}{"," if options else ""}{options})
model = PeftModel.from_pretrained(base, "path/to/this/folder")"""
