"""One training step under fake tensors: every allocation and free, without data or weights.

The model is built from its configuration on the meta device, its tensors are replaced by fake CPU
tensors (shape and dtype, no memory), and one step runs on them with the very functions that
training uses. Fake CPU tensors stand in for CUDA as well, because fake CUDA tensors abort the
process where PyTorch has no CUDA; attention, whose kernels differ, is then replaced.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.optim import Optimizer
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from rsauto.adapters.head import is_classifier
from rsauto.adapters.lora import trainable_parameters
from rsauto.architecture import architecture_of, attention_of, auto_class, num_positions
from rsauto.base import prepare
from rsauto.errors import InputError
from rsauto.garbage import collection_paused
from rsauto.memory.attention import attention_of_cuda, use_flash
from rsauto.memory.depth import DEPTHS, NotRepeatedError, Stack, cut, deepened, repeated_layers
from rsauto.memory.estimate import IMPORTANCE_BYTES, EstimatedProfile
from rsauto.memory.kinds import StepKind, StepSize
from rsauto.memory.methods import METHODS, adapt
from rsauto.memory.profile import line
from rsauto.memory.quantised import follow_bitsandbytes, stand_in_for_linears
from rsauto.memory.recorder import StorageEvent, StorageRecorder
from rsauto.memory.trace_pack import record_pack
from rsauto.memory.traced_optimizers import planned_optimizer
from rsauto.records import ADALORA_METHODS
from rsauto.training.flops import linear_weights
from rsauto.training.loop import clip_gradients, gradient_norms
from rsauto.training.loss import hits_of, summed_cross_entropy, token_mean

UNTRACEABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    NotImplementedError,
)
"""What a step raises that needs values, or an operation that fake tensors do not have."""

Batch = dict[str, Tensor]
"""What the model takes, each (batch, length), and labels as in `rsauto.training.loss`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTrace:
    """The events of one step of one size; what is resident before the step comes first."""

    size: StepSize
    num_trainable_params: int
    linear_weights: tuple[int, int]
    """(frozen, trainable), as FLOPs are counted from."""
    events: tuple[StorageEvent, ...]


def trace_step(kind: StepKind, size: StepSize, *, may_cut: bool = False) -> StepTrace:
    """Runs one step of `kind` and `size` on fake tensors and records its memory.

    With `may_cut` the layers of a deep model that repeat are traced a few at a time, see `depth`.
    Raises what the model raises where a step depends on values, which fake tensors do not have.
    """
    with torch.device("meta"):
        model = build_model(kind, size.rank)
    num_trainable = sum(p.numel() for p in trainable_parameters(model).values())
    weights = linear_weights(model)
    stack = repeated_layers(model) if may_cut else None
    events = None
    if stack is not None:
        with suppress(NotRepeatedError):
            events = _trace_cut(model, kind, size, stack)
        if events is None:
            return trace_step(kind, size)
    return StepTrace(
        size=size,
        num_trainable_params=num_trainable,
        linear_weights=weights,
        events=events or _trace(model, kind, size),
    )


def _trace_cut(
    model: PeftModel, kind: StepKind, size: StepSize, stack: Stack
) -> tuple[StorageEvent, ...]:
    """The events of all layers from those of the first ones. The model is cut for good."""
    num_groups = stack.num_groups
    shallow = []
    for depth in sorted(DEPTHS, reverse=True):
        cut(stack, depth)
        # All before the first step, in which an optimizer's hook finds the layers of every model.
        shallow.append(copy.deepcopy(model))
    four, three, two = (_trace(one, kind, size) for one in shallow)
    return deepened(two, three, four, num_groups)


def _trace(model: PeftModel, kind: StepKind, size: StepSize) -> tuple[StorageEvent, ...]:
    """The events of a step of a model on the meta device, whose tensors become fake ones."""
    with ExitStack() as stack:
        stack.enter_context(collection_paused())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if kind.device_type == "cuda":
            stack.enter_context(attention_of_cuda(kind.attn_implementation == "flash_attention_2"))
        stack.enter_context(_masks_are_read())
        _replace_meta_tensors(model)
        record = record_step if kind.pack_size == 1 else record_pack
        rows = kind.pack_size * size.micro_batch_size
        return record(
            model,
            kind,
            train_batch=_blank_batch(kind, rows, size.train_length),
            eval_batch=_blank_batch(kind, rows, size.eval_length),
        )


def require_positions(kind: StepKind, size: StepSize) -> None:
    """Raises InputError for sequences longer than the model has positions for."""
    limit = num_positions(architecture(kind)[0])
    for name, length in (("max_length", size.train_length), ("eval_length", size.eval_length)):
        if limit is not None and length > limit:
            raise InputError(
                f"{name}: {length}, but the model has positions for {limit} tokens. Give at most "
                "that."
            )


def estimated_profile(kind: StepKind, reason: str) -> EstimatedProfile:
    """The closed form for a step that cannot be traced, from the shapes of the model alone.

    Raises InputError for a method that the closed form does not hold for.
    """
    if kind.method in ("dora", "peft_adalora"):
        raise InputError(
            f"method: {kind.method} cannot be planned on this model: a step of it cannot be traced "
            f"({reason}), and the closed form is for LoRA and our AdaLoRA. Plan rslora, which "
            "needs less, or rsadalora."
        )
    allocates = kind.method in ADALORA_METHODS
    gathered_bytes = IMPORTANCE_BYTES if allocates and kind.score == "full" else 0.0
    with torch.device("meta"):
        low, high = (build_model(kind, rank) for rank in (8, 16))
    config: Any = low.get_base_model().config
    text = config.get_text_config()
    linear = (linear_weights(low), linear_weights(high))
    trained = [sum(p.numel() for p in trainable_parameters(m).values()) for m in (low, high)]
    frozen = {p: p.numel() * p.itemsize for p in low.parameters() if not p.requires_grad}
    decoder = getattr(text, "num_decoder_layers", getattr(text, "decoder_layers", 0))
    is_decoder = kind.task == "CAUSAL_LM"
    return EstimatedProfile(
        reason=reason,
        settings={
            "weight_bytes": sum(frozen.values()) + sum(b.nbytes for b in low.buffers()),
            "hidden_size": text.hidden_size,
            "num_layers": text.num_hidden_layers + (decoder or 0),
            "num_heads": text.num_attention_heads,
            "num_classes": text.vocab_size if is_decoder else config.num_labels,
            "per_token": is_decoder,
            "adapter_itemsize": getattr(torch, kind.adapter_dtype).itemsize,
            "state_bytes_per_param": _STATE_BYTES.get(kind.optimizer, 8.0) + gathered_bytes,
            "scaled_adapters": allocates,
            "activation_itemsize": getattr(torch, kind.autocast or kind.dtype).itemsize,
            "gradient_checkpointing": kind.gradient_checkpointing,
            "lora_dropout": kind.lora_dropout > 0,
            "keeps_attention": kind.attn_implementation not in ("sdpa", "flash_attention_2"),
        },
        params=line((8, 16), (trained[0], trained[1])),
        frozen_linear_weights=linear[0][0],
        trainable_linear_weights=line((8, 16), (linear[0][1], linear[1][1])),
    )


_STATE_BYTES = {"adamw_8bit": 2.0, "adafactor": 0.1, "sgd": 0.0}
"""Of an optimizer for every trained number, where it is not 8. Adafactor keeps rows and columns."""


def build_model(kind: StepKind, rank: int) -> PeftModel:
    """The adapted model as training builds it, on the current default device.

    Raises InputError where transformers has no such model, or PEFT cannot adapt it.
    """
    config, model_class = architecture(kind)
    attention = attention_of(model_class, kind.attn_implementation, needs_package=False)
    flash = attention == "flash_attention_2"
    try:
        model = auto_class(kind.task).from_config(
            config,
            dtype=getattr(torch, kind.dtype),
            attn_implementation="sdpa" if flash else attention,
            trust_remote_code=False,
        )
    except Exception as error:  # whatever a configuration has that no model was ever built with
        raise InputError(
            f"model: transformers cannot build a {model_class.__name__} from this configuration "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]}). Check its "
            "config.json."
        ) from error
    if kind.quant_bits is not None:
        stand_in_for_linears(model, kind.quant_bits, kind.device_type)
    if flash:
        use_flash(model)
    prepare(model, kind.gradient_checkpointing, kind.use_reentrant)
    adapted = adapt(model, kind, rank)
    follow_bitsandbytes(adapted)
    return adapted


def architecture(kind: StepKind) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
    """The configuration and class that transformers has for it. Raises InputError for none."""
    fields: dict[str, Any] = json.loads(kind.model_config)
    model_type = fields.pop("model_type", None)
    try:
        config = AutoConfig.for_model(model_type, **fields)
    except Exception as error:
        # Each configuration class of transformers checks its fields in its own way.
        raise InputError(
            f"model: transformers cannot read this {model_type!r} configuration ("
            f"{' '.join(str(error).split())[:300]}). Check its config.json; models with code of "
            "their own are not supported."
        ) from error
    return config, architecture_of(str(model_type), config, kind.task)


def record_step(
    model: PeftModel, kind: StepKind, *, train_batch: Batch, eval_batch: Batch | None
) -> tuple[StorageEvent, ...]:
    """A step as it is once the optimizer has its states, then one evaluation batch.

    Works on fake and on real tensors alike.
    """
    method = METHODS[kind.method]
    optimizer = _stepped_optimizer(model, kind)
    recorder = StorageRecorder(kind.device_type, is_padded=kind.padded)
    _record_residents(recorder, model, kind, optimizer, (train_batch, eval_batch or {}))
    parameters = list(trainable_parameters(model).values())
    with recorder:
        model.train()
        _forward_backward(recorder, model, kind, train_batch)
        recorder.phase = "optimizer"
        _, norm = gradient_norms(parameters)
        if kind.clip:
            clip_gradients(parameters, norm, max_norm=1.0)
        optimizer.step()
        if method.after_step is not None:
            method.after_step(model)
        optimizer.zero_grad()
        recorder.phase = "evaluation"
        model.eval()
        if eval_batch:
            _evaluate(recorder, model, kind, eval_batch)
        return recorder.finish()


def _stepped_optimizer(model: PeftModel, kind: StepKind) -> Optimizer:
    """An optimizer whose states exist, and the gradients that are alive when a forward starts.

    One micro-batch with gradients already there stands for all of an accumulating step but the
    first. Weight decay is on because it costs plain SGD a temporary and the others nothing.
    """
    optimizer = planned_optimizer(model, kind.optimizer, kind.device_type)
    for parameter in trainable_parameters(model).values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after_step = METHODS[kind.method].after_step
    if after_step is not None:
        after_step(model)
    if not kind.accumulate:
        optimizer.zero_grad()
    return optimizer


def _record_residents(
    recorder: StorageRecorder,
    model: PeftModel,
    kind: StepKind,
    optimizer: Optimizer,
    batches: tuple[Batch, ...],
) -> None:
    trainable = list(trainable_parameters(model).values())
    states = [v for state in optimizer.state.values() for v in state.values()]
    recorder.assign("adapters", trainable)
    recorder.assign("weights", (p for p in model.parameters() if not p.requires_grad))
    recorder.assign("weights", model.buffers())
    recorder.assign("optimizer", (v for v in states if isinstance(v, Tensor)))
    recorder.assign("optimizer", METHODS[kind.method].kept(model))
    recorder.assign("gradients", (p.grad for p in trainable if p.grad is not None))
    for batch in batches:
        recorder.assign("activations", batch.values())


def _forward_backward(
    recorder: StorageRecorder, model: PeftModel, kind: StepKind, batch: Batch
) -> None:
    """One micro-batch. Nothing but the graph may hold the logits while backward runs."""
    recorder.phase = "forward"
    recorder.expect_logits(_num_logits(model, batch))
    with _mixed_precision(kind):
        own_loss = METHODS[kind.method].loss
        if own_loss is not None:
            loss = own_loss(model, batch)
        else:
            loss = token_mean(summed_cross_entropy(_logits(model, batch), batch["labels"]), 1)
    recorder.phase = "backward"
    loss.backward()
    gradients = (p.grad for p in trainable_parameters(model).values())
    recorder.assign("gradients", (g for g in gradients if g is not None))


@torch.no_grad()
def _evaluate(recorder: StorageRecorder, model: PeftModel, kind: StepKind, batch: Batch) -> None:
    recorder.expect_logits(_num_logits(model, batch))
    with _mixed_precision(kind):
        logits = _logits(model, batch)
        summed_cross_entropy(logits, batch["labels"])
        hits_of(logits, batch["labels"])


def _mixed_precision(kind: StepKind) -> Any:
    """CUDA's autocast is off where there is no CUDA; the CPU's stands in for it."""
    if kind.autocast is None:
        return nullcontext()
    return torch.autocast("cpu", dtype=getattr(torch, kind.autocast))


def _logits(model: PeftModel, batch: Batch) -> Tensor:
    """(batch, length, vocabulary), or (batch, classes)."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits: Tensor = model(**inputs).logits
    return logits


def _num_logits(model: PeftModel, batch: Batch) -> int:
    if is_classifier(model.get_base_model()):
        return batch["labels"].numel() * int(model.config.num_labels)
    head: nn.Module = model.get_output_embeddings()
    return batch["labels"].numel() * head.get_parameter("weight").shape[0]


def _blank_batch(kind: StepKind, num_sequences: int, length: int) -> Batch:
    """Empty where the length is zero."""
    if length == 0:
        return {}
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if kind.has_token_types else [])]
    batch = {name: torch.zeros(num_sequences, length, dtype=torch.long) for name in names}
    labels = (num_sequences,) if kind.task == "SEQ_CLS" else (num_sequences, length)
    return {**batch, "labels": torch.zeros(labels, dtype=torch.long)}


def _replace_meta_tensors(model: nn.Module) -> None:
    """Puts a fake CPU tensor in the place of every meta parameter and buffer, tied ones once.

    Under an active fake mode. The model cannot be built in that mode directly: PEFT moves its
    adapters with Module.to, which refuses to swap fake tensors.
    """
    fakes: dict[Tensor, Tensor] = {}
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for slots in tables:
            for name, tensor in slots.items():
                if tensor is None:
                    continue
                if tensor not in fakes:
                    fakes[tensor] = _fake_like(tensor)
                slots[name] = fakes[tensor]


def _fake_like(tensor: Tensor) -> Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake


@contextmanager
def _masks_are_read() -> Iterator[None]:
    """Lets transformers look into fake attention masks, too: it skips those of nothing but ones.

    What it finds there is up to the recorder.
    """
    name = "transformers.masking_utils.is_tracing"
    with mock.patch(name, lambda *_args, **_kwargs: False):
        yield
