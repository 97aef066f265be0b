"""One training step under fake tensors: every allocation and free, without data or weights.

The model is built from its configuration on the meta device, its tensors are replaced by fake CPU
tensors (shape and dtype, no memory), and one step runs on them with the very functions that
training uses. Fake CPU tensors stand in for CUDA as well: fake CUDA tensors abort the process
where PyTorch has no CUDA, and both keep q, k, v, output and log-sum-exp of fused attention.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from transformers import AutoConfig

from rsauto.adapters.head import is_classifier
from rsauto.adapters.lora import add_adapter, trainable_parameters
from rsauto.adapters.optimizers import build_optimizer
from rsauto.architecture import auto_class
from rsauto.base import prepare
from rsauto.config import TaskType
from rsauto.memory.quantised import follow_bitsandbytes, stand_in_for_linears
from rsauto.memory.recorder import StorageEvent, StorageRecorder
from rsauto.quantisation import Bits
from rsauto.records import TrialSpec
from rsauto.scaling import OptimizerName
from rsauto.training.loop import clip_gradients, gradient_norms
from rsauto.training.loss import hits_of, summed_cross_entropy, token_mean

Batch = dict[str, Tensor]
"""What the model takes, each (batch, length), and labels as in `rsauto.training.loss`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """Everything but the rank that changes the bytes of a step. Equal shapes give equal traces."""

    model_config: str
    """The Hugging Face configuration as JSON."""
    quant_bits: Bits | None = None
    """Of the base's linear layers; None where they are in `dtype`."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    dtype: torch.dtype
    """Of the base weights; adapters are float32."""
    attn_implementation: str
    gradient_checkpointing: bool
    target_modules: str | tuple[str, ...]
    optimizer: OptimizerName
    clip: bool
    """Whether gradients are clipped by their norm."""
    micro_batch_size: int
    """Sequences per forward pass, in training and in evaluation."""
    accumulate: bool
    """Whether gradients of an earlier micro-batch are alive in the forward pass."""
    train_length: int
    """Tokens of the longest training sequence."""
    eval_length: int
    """Tokens of the longest evaluation sequence."""
    device_type: str
    """"cpu" or "cuda"."""
    task: TaskType = "CAUSAL_LM"
    has_token_types: bool = False
    """Whether batches carry token_type_ids."""

    @property
    def padded(self) -> bool:
        """A sequence alone in its micro-batch has no padding, and models then build no mask."""
        return self.micro_batch_size > 1


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTrace:
    """The events of one step at one rank; what is resident before the step comes first."""

    rank: int
    num_trainable_params: int
    events: tuple[StorageEvent, ...]


def trace_step(shape: StepShape, rank: int) -> StepTrace:
    """Runs one step of `shape` at `rank` on fake tensors and records its memory."""
    with torch.device("meta"):
        model = build_model(shape, rank)
    with ExitStack() as stack:
        stack.enter_context(_no_garbage_collection())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if not shape.padded:
            stack.enter_context(_masks_are_read())
        _replace_meta_tensors(model)
        events = record_step(
            model,
            shape,
            train_batch=_blank_batch(shape, shape.train_length),
            eval_batch=_blank_batch(shape, shape.eval_length),
        )
    num_trainable = sum(p.numel() for p in trainable_parameters(model).values())
    return StepTrace(rank=rank, num_trainable_params=num_trainable, events=events)


def build_model(shape: StepShape, rank: int) -> PeftModel:
    """The adapted model as training builds it, on the current default device."""
    fields: dict[str, Any] = json.loads(shape.model_config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = auto_class(shape.task).from_config(
        config, dtype=shape.dtype, attn_implementation=shape.attn_implementation
    )
    if shape.quant_bits is not None:
        stand_in_for_linears(model, shape.quant_bits, shape.device_type)
    prepare(model, shape.gradient_checkpointing)
    spec = TrialSpec(
        role="search",
        method="rslora",
        rank=rank,
        alpha=rank,
        scaling_rule="rslora",
        target_modules=shape.target_modules,
        learning_rate=1e-4,
        adapter_dtype=shape.adapter_dtype,
    )
    adapted = add_adapter(model, spec)
    follow_bitsandbytes(adapted)
    return adapted


def record_step(
    model: PeftModel, shape: StepShape, *, train_batch: Batch, eval_batch: Batch
) -> tuple[StorageEvent, ...]:
    """A step as it is once the optimizer has its states, then one evaluation batch.

    Works on fake and on real tensors alike.
    """
    optimizer = _stepped_optimizer(model, shape)
    recorder = StorageRecorder(shape.device_type)
    _record_residents(recorder, model, optimizer, (train_batch, eval_batch))
    parameters = list(trainable_parameters(model).values())
    with recorder:
        model.train()
        _forward_backward(recorder, model, train_batch)
        recorder.phase = "optimizer"
        _, norm = gradient_norms(parameters)
        if shape.clip:
            clip_gradients(parameters, norm, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        recorder.phase = "evaluation"
        model.eval()
        _evaluate(recorder, model, eval_batch)
        return recorder.finish()


def _stepped_optimizer(model: PeftModel, shape: StepShape) -> Optimizer:
    """An optimizer whose states exist, and the gradients that are alive when a forward starts.

    One micro-batch with gradients already there stands for all of an accumulating step: the first
    needs less, the others the same. Weight decay is on because it costs plain SGD a temporary and
    the other optimizers nothing.
    """
    optimizer = build_optimizer(model, name=shape.optimizer, learning_rate=1e-4, weight_decay=0.01)
    if shape.optimizer == "sgd" and shape.device_type == "cuda":
        for group in optimizer.param_groups:
            group["foreach"] = True  # torch's default on CUDA, not on the stand-in CPU
    for parameter in trainable_parameters(model).values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if not shape.accumulate:
        optimizer.zero_grad()
    return optimizer


def _record_residents(
    recorder: StorageRecorder,
    model: PeftModel,
    optimizer: Optimizer,
    batches: tuple[Batch, ...],
) -> None:
    trainable = list(trainable_parameters(model).values())
    states = [v for state in optimizer.state.values() for v in state.values()]
    recorder.assign("adapters", trainable)
    recorder.assign("weights", (p for p in model.parameters() if not p.requires_grad))
    recorder.assign("weights", model.buffers())
    recorder.assign("optimizer", (v for v in states if isinstance(v, Tensor)))
    recorder.assign("gradients", (p.grad for p in trainable if p.grad is not None))
    for batch in batches:
        recorder.assign("activations", batch.values())


def _forward_backward(recorder: StorageRecorder, model: PeftModel, batch: Batch) -> None:
    """One micro-batch. Nothing but the graph may hold the logits while backward runs."""
    recorder.phase = "forward"
    recorder.expect_logits(_num_logits(model, batch))
    loss = token_mean(summed_cross_entropy(_logits(model, batch), batch["labels"]), 1)
    recorder.phase = "backward"
    loss.backward()
    gradients = (p.grad for p in trainable_parameters(model).values())
    recorder.assign("gradients", (g for g in gradients if g is not None))


@torch.no_grad()
def _evaluate(recorder: StorageRecorder, model: PeftModel, batch: Batch) -> None:
    recorder.expect_logits(_num_logits(model, batch))
    logits = _logits(model, batch)
    summed_cross_entropy(logits, batch["labels"])
    hits_of(logits, batch["labels"])


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


def _blank_batch(shape: StepShape, length: int) -> Batch:
    size = shape.micro_batch_size
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if shape.has_token_types else [])]
    batch = {name: torch.zeros(size, length, dtype=torch.long) for name in names}
    labels = (size,) if shape.task == "SEQ_CLS" else (size, length)
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
def _no_garbage_collection() -> Iterator[None]:
    """Storages in reference cycles would be freed at a random moment of the trace."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _masks_are_read() -> Iterator[None]:
    """Lets transformers look into an attention mask and skip it, as it does for real tensors.

    It never does for fake ones, which is right for a padded batch only.
    """
    name = "transformers.masking_utils.is_tracing"
    with mock.patch(name, lambda *_args, **_kwargs: False):
        yield
