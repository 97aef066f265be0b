"""StudyConfig: what a study file may say, checked in one place, every error at once.

A study file is YAML with a memory budget and a section each for model, data, training, search,
adalora and packing. Unknown keys are refused with the nearest right one. Bytes inside, GiB only in
what people write.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from rsauto.choices import Part, RateRange, Rates, as_tuple
from rsauto.records import ADALORA_METHODS
from rsauto.strategies import MINIMISED as MINIMISED
from rsauto.strategies import SearchConfig as SearchConfig
from rsauto.units import bytes_text

TaskType = Literal["CAUSAL_LM", "SEQ_CLS"]
"""What is trained, in PEFT's words: a causal language model or a sequence classifier."""


def _budget_bytes(value: Any) -> Any:
    """Bytes from a size or the name of a GPU; 'auto' passes through. Else raises ValueError."""
    from rsauto.devices import read_budget  # which itself reads sizes with `parse_bytes`

    return value if value == "auto" else read_budget(value).total_bytes


def _budget_bytes_or_none(value: Any) -> Any:
    return None if value is None else _budget_bytes(value)


class ModelConfig(Part):
    """The base model, frozen during the study."""

    name: str = Field("embedded", min_length=1)
    """'embedded', a Hugging Face hub id, or a local folder."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the frozen weights; 'auto' takes what the model was saved in."""
    quant_bits: Literal[4, 8] | None = None
    """Of the frozen linear layers, through bitsandbytes: 8 (LLM.int8) or 4 (nf4, double
    quantisation); None keeps them in `dtype`."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the trained factors; bfloat16 halves their memory and rounds small updates away."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """'auto' is sdpa where the architecture has it, else eager."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more time."""
    target_modules: Literal["all-linear", "attention"] | tuple[str, ...] = "all-linear"
    """Layers that get an adapter; the output head never does."""

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.target_modules == ():
            raise ValueError("target_modules must name at least one layer, or be all-linear")
        return self


class DataConfig(Part):
    """The fine-tuning data: text, prompt and completion, chat messages, or labelled text."""

    name: str = Field("embedded", min_length=1)
    """'embedded', a hub id, a json, jsonl, csv or parquet file, or a folder of such files."""
    subset: str | None = None
    """Configuration name of a hub dataset, such as 'main'."""
    revision: str | None = None
    train_split: str = Field("train", min_length=1)
    validation_split: str | None = None
    """None takes 'validation' (or 'valid', 'dev') where there is one, else a share of train.

    A split called test is refused: nothing is ever chosen on it."""
    validation_file: str | None = None
    """A file of validation rows beside a training file."""
    validation_rows: int = Field(200, ge=1)
    """At most this many rows are evaluated on; also the size of a split made from train."""
    max_train_rows: int | None = Field(None, ge=1)
    split_seed: int = Field(0, ge=0)
    """Of the validation split made where there is none."""
    text: str | None = None
    """Template such as '{title}\\n{body}'; all of it is trained on."""
    prompt: str | None = None
    """Template such as '{question}\\n', not trained on unless loss_on is all."""
    completion: str | None = None
    """Template such as '{answer}'."""
    messages: str | None = None
    """Column of chats, lists of {role, content}; loss on the assistant's turns only."""
    chat_template: str | None = None
    """File of a Jinja template that takes the place of the tokenizer's own."""
    label: str | None = None
    """Column of the class, whole numbers or names. Giving it makes the study train a sequence
    classifier on `text` (and `text_pair`) instead of a causal language model."""
    text_pair: str | None = None
    """Template of a second text, for classifying pairs."""
    loss_on: Literal["completion", "all"] = "completion"
    max_length: int = Field(512, ge=2)
    """Tokens per row, the end-of-text token included; longer rows are truncated."""
    forgetting: str | None = Field(None, min_length=1)
    """Also measure the rise of the loss on a text that is not trained on: english, code (both come
    with the package), or a text file."""

    @property
    def task(self) -> TaskType:
        return "CAUSAL_LM" if self.label is None else "SEQ_CLS"

    @model_validator(mode="after")
    def _one_format(self) -> Self:
        pair = self.prompt is not None or self.completion is not None
        given = {"text": self.text is not None, "prompt and completion": pair,
                 "messages": self.messages is not None}  # fmt: skip
        formats = [name for name, there in given.items() if there]
        if len(formats) > 1:
            raise ValueError(f"give one of {' or '.join(formats)}, not both")
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion belong together: give both")
        if self.label is not None and (pair or self.messages is not None):
            raise ValueError("label is for classifying text: give text, not " + formats[0])
        if self.label is not None and self.forgetting is not None:
            raise ValueError("forgetting is measured on language models, not on classifiers")
        if self.label is None and self.text_pair is not None:
            raise ValueError("text_pair is for classification: give label as well")
        if self.validation_split is not None and self.validation_file is not None:
            raise ValueError("give validation_split or validation_file, not both")
        if (self.validation_split or "").lower().startswith("test"):
            raise ValueError("validation_split must not be the test split")
        if self.train_split.lower().startswith("test"):
            raise ValueError("train_split must not be the test split")
        return self


class TrainingConfig(Part):
    """What every trial has in common."""

    steps: int | None = Field(None, ge=1)
    """Optimizer steps of a full-length trial; give steps or epochs."""
    epochs: float | None = Field(None, gt=0)
    batch_size: int = Field(16, ge=1)
    """Sequences per optimizer step."""
    micro_batch_size: int | Literal["auto"] = "auto"
    """Sequences per forward pass. 'auto': the largest divisor of batch_size that fits."""
    optimizer: Literal["adamw", "sgd", "adafactor"] = "adamw"
    head_learning_rate: float = Field(5e-4, gt=0, le=1e6)
    """Of a classifier's head, trained whole beside the adapter; the same in every trial."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_share: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from zero."""
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Gradients are clipped to this global L2 norm; null clips nothing."""
    num_evals: int = Field(4, ge=1)
    """Evaluations per trial, evenly spread; pruning decides on them."""
    logging_steps: int | None = Field(None, ge=1)
    """Keep training loss and gradient norm in the records, their means over so many steps."""
    activation_moments: bool = False
    """Keep moments of the adapted layers' activations and gradients in the records, measured at
    every evaluation with one more forward and backward; such trials run one by one."""
    seed: int = Field(0, ge=0)
    """Of adapter initialisation and data order, the same in every search trial."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs; null takes one back")
        micro = self.micro_batch_size
        if micro != "auto" and (micro < 1 or self.batch_size % micro):
            tried = range(1, min(self.batch_size, 1024) + 1)
            divisors = [d for d in tried if self.batch_size % d == 0]
            raise ValueError(
                f"micro_batch_size must divide batch_size {self.batch_size}: one of {divisors}"
            )
        if self.steps is not None and self.num_evals > self.steps:
            raise ValueError(f"num_evals must be at most steps, which is {self.steps}")
        return self


class AdaLoraSettings(Part):
    """How the methods adalora and rsadalora place their rank. Of no account to other methods."""

    init_ratio: float = Field(1.5, ge=1, le=16)
    """Rank of every module at the start over `rank`, which is their mean at the end."""
    warmup_share: float = Field(0.1, ge=0, lt=1)
    """Share of the steps at the initial rank."""
    final_share: float = Field(0.3, ge=0, lt=1)
    """Share of the steps, the last ones, at a fixed pattern."""
    interval: int = Field(1, ge=1)
    """Steps between two allocations."""
    recovery: Literal["paper", "none"] = "none"
    """none: the memory of a pruned triplet is given back at once, which cost no loss that could be
    told from the seeds' spread (reports/adalora); paper: it is only masked, and can come back."""
    score: Literal["full", "lambda"] = "lambda"
    """Importance from lambda alone, or, as in the paper, from P and Q as well, which takes 8 bytes
    more for each of their numbers and kept the same triplets where it was measured."""
    scale_rank: Literal["target", "init", "live"] = "target"
    """The rank in gamma_r: `rank`, the initial one, or what a module has at the moment."""
    lambda_lr_ratio: Annotated[Rates, BeforeValidator(as_tuple)] = (4.0,)
    """Learning rate of lambda over that of Q; a list is searched."""
    orth_reg_weight: float = Field(0.1, ge=0)
    """Of the orthogonality of P and Q in the training objective."""
    orth_reg_form: Literal["norm", "squared"] = "norm"
    beta1: float = Field(0.85, gt=0, lt=1)
    """Smoothing of the sensitivity."""
    beta2: float = Field(0.85, gt=0, lt=1)
    """Smoothing of the uncertainty."""
    init_std: float | None = Field(None, gt=0)
    """Of P's and Q's entries; null gives vectors of unit length."""
    refit: bool = True
    """Also train rsLoRA with the rank pattern of the best AdaLoRA trial."""

    @model_validator(mode="after")
    def _room_to_allocate(self) -> Self:
        if self.warmup_share + self.final_share >= 1:
            raise ValueError("warmup_share and final_share must leave a part of the steps between")
        if len(set(self.lambda_lr_ratio)) != len(self.lambda_lr_ratio):
            raise ValueError("lambda_lr_ratio lists a value twice")
        return self


def _off_as_a_word(value: Any) -> Any:
    """YAML reads a bare off as false."""
    return "off" if value is False else value


class PackingSettings(Part):
    """How search trials are trained together, in one forward and backward over one frozen base.

    Defaults and the finalists' other seeds always run alone, so that their time and memory are
    their own."""

    mode: Annotated[Literal["auto", "off"], BeforeValidator(_off_as_a_word)] = "auto"
    """auto: search trials are trained together wherever that is exact and faster; off: every trial
    runs alone."""
    trials: int = Field(8, ge=1, le=64)
    """Most trials trained together; fewer where a short probe finds that faster."""
    lookahead: int | None = Field(None, ge=1)
    """A trial is proposed from the results of those at least this many before it, so that what is
    proposed does not depend on how many really run at once. null: as many as the study first trains
    together, which depends on the machine; a number asks the same on every one. More leaves the
    sampler less to learn from."""
    admission: Literal["elastic", "together"] = "elastic"
    """elastic: the next trial takes a slot as soon as one is free. together: a pack is filled only
    once it is empty, so that all of its trials are at the same step and see the same minibatch."""


class StudyConfig(Part):
    """A whole study file."""

    name: str = Field("study", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")
    """Names the study folder, runs/<name>; letters, digits, dot, dash and underscore."""
    memory_budget: Annotated[int | Literal["auto"], BeforeValidator(_budget_bytes)] = "auto"
    """Bytes of the device for the whole fine-tune, or a GPU such as rtx4090; 'auto' is what the
    device has."""
    pack_memory_budget: Annotated[
        int | Literal["auto"] | None, BeforeValidator(_budget_bytes_or_none)
    ] = None
    """Bytes of the device that trials trained together may use, or a GPU; 'auto' is what the device
    has, None the memory_budget. Each of them alone still has to fit the memory_budget."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig(steps=100)
    search: SearchConfig = SearchConfig()
    adalora: AdaLoraSettings = AdaLoraSettings()
    packing: PackingSettings = PackingSettings()
    presets: dict[str, dict[str, JsonValue]] = Field(default_factory=dict)
    """Named sets of changes, chosen with --preset; each a partial study file."""

    @model_validator(mode="after")
    def _packs_hold_a_trial(self) -> Self:
        pack, alone = self.pack_memory_budget, self.memory_budget
        if isinstance(pack, int) and isinstance(alone, int) and pack < alone:
            raise ValueError(
                f"pack_memory_budget must be at least memory_budget, which is {bytes_text(alone)} "
                f"(got {bytes_text(pack)}); null makes it the same"
            )
        return self

    @model_validator(mode="after")
    def _moments_are_those_of_lora(self) -> Self:
        if self.training.activation_moments and self.allocates():
            raise ValueError(
                "training.activation_moments is for the methods lora and rslora; leave adalora and "
                "rsadalora out of search.method"
            )
        return self

    @model_validator(mode="after")
    def _whole_grid(self) -> Self:
        """A grid of which every point is repeated is one answer: a part of it is none."""
        search = self.search
        if search.repeat == "finalists" or isinstance(search.learning_rate, RateRange):
            return self
        num_rates = len(search.learning_rate)
        of_each = num_rates * search.seeds
        if search.repeat == "tuned":
            of_each = num_rates + search.seeds - 1
        needed = self.num_combinations * of_each
        if search.trials < needed:
            raise ValueError(
                f"search.trials is {search.trials}, and the grid with its seeds needs {needed} "
                f"({self.num_combinations} combinations, {num_rates} learning rates, "
                f"{search.seeds} seeds, repeat {search.repeat}); give search.trials: {needed}"
            )
        return self

    @property
    def num_combinations(self) -> int:
        """Points of the grid at one learning rate."""
        search = self.search
        ratios = {method: len(self.adalora.lambda_lr_ratio) for method in ADALORA_METHODS}
        axes = (
            search.ranks, search.alphas, search.lr_ratio, self.target_choices(),
            search.scaling_exponent or (None,), search.init_exponent,
        )  # fmt: skip
        return math.prod(map(len, axes)) * sum(ratios.get(m, 1) for m in search.method)

    def target_choices(self) -> tuple[str | tuple[str, ...], ...]:
        """The choices of layers that trials may use."""
        return self.search.target_modules or (self.model.target_modules,)

    def allocates(self) -> bool:
        """Whether trials may use a method that places its rank while it trains."""
        return any(method in ADALORA_METHODS for method in self.search.method)


RESUMABLE = frozenset(
    {
        "search.trials", "search.seeds", "search.rank", "search.max_failures",
        "search.max_seconds", "search.max_tokens", "search.max_gpu_hours",
        "packing.mode", "packing.trials", "packing.admission", "pack_memory_budget",
    }
)  # fmt: skip
"""Settings that may change when a study is continued; anything else would mix two studies.

How many trials run at once changes their results by rounding alone; from which results one is
proposed stays once some have run together."""


def differences(old: StudyConfig, new: StudyConfig) -> list[str]:
    """Dotted settings that differ and may not, each as 'key: was X, is Y'."""
    before, after = _flat(old), _flat(new)
    return [
        f"{key}: was {before.get(key)!r}, is {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not _resumable(key)
    ]


def _resumable(key: str) -> bool:
    return key.startswith("presets") or any(
        key == allowed or key.startswith(allowed + ".") for allowed in RESUMABLE
    )


def _flat(config: StudyConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value and value.keys() != {"low", "high"}:
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            flat[prefix] = value

    walk("", config.model_dump(mode="json", exclude={"presets"}))
    return flat
