"""One step of several trials that are trained together, traced as `trace` does a trial alone."""

from __future__ import annotations

from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rsauto.adapters.head import is_classifier
from rsauto.adapters.lora import remove_adapter
from rsauto.adapters.optimizers import GROUP_NAMES
from rsauto.memory.kinds import StepKind
from rsauto.memory.recorder import StorageEvent, StorageRecorder, Tag
from rsauto.packing.model import PackedModel
from rsauto.packing.optimizer import PackedOptimizer
from rsauto.packing.tensors import TrialTensors, read
from rsauto.training.loss import cross_entropy_of_trials, hits_of, summed_cross_entropy

Batch = dict[str, Tensor]

_TAGS: dict[str, Tag] = {"values": "adapters", "gradients": "gradients"}
"""What a field of a stack counts as; all others are what the optimizer keeps."""


def record_pack(
    adapted: PeftModel, kind: StepKind, *, train_batch: Batch, eval_batch: Batch | None
) -> tuple[StorageEvent, ...]:
    """A step of ``kind.pack_size`` trials like the adapted one, then one evaluation batch.

    Batches hold the rows of all trials. Works on fake and on real tensors alike; the model is left
    without its adapter.
    """
    pack = _seated(adapted, kind)
    recorder = StorageRecorder(kind.device_type, is_padded=kind.padded)
    _record_residents(recorder, pack, (train_batch, eval_batch or {}))
    size = kind.pack_size
    with recorder:
        pack.base.train()
        if not kind.accumulate:
            pack.zero_gradients()
        _forward_backward(recorder, pack, train_batch)
        recorder.phase = "optimizer"
        pack.gradient_norms()
        if kind.clip:
            pack.scale_gradients([0.5] * size)
        pack.step([dict.fromkeys(GROUP_NAMES, 1e-3)] * size, [0.1] * size, [1] * size)
        recorder.phase = "evaluation"
        pack.base.eval()
        if eval_batch:
            _evaluate(recorder, pack, eval_batch)
        return recorder.finish()


def _seated(adapted: PeftModel, kind: StepKind) -> PackedModel:
    tensors = read(adapted)
    base = cast(PreTrainedModel, remove_adapter(adapted))
    trials = [
        TrialTensors(
            {"values": dict(tensors.values)},
            dict(tensors.gamma),
            tensors.config,
            dict(tensors.alive),
            dict(tensors.active),
        )
        for _ in range(kind.pack_size)
    ]
    pack = PackedModel(base, cast(PackedOptimizer, kind.optimizer))
    pack.seat(trials, tokens=1)
    return pack


def _record_residents(
    recorder: StorageRecorder, pack: PackedModel, batches: tuple[Batch, ...]
) -> None:
    recorder.assign("weights", pack.base.parameters())
    recorder.assign("weights", pack.base.buffers())
    for stack in pack.seating.stacks:
        for group in stack.groups.values():
            for field, buffer in group.buffers.items():
                recorder.assign(_TAGS.get(field, "optimizer"), [buffer])
    for batch in batches:
        recorder.assign("activations", batch.values())


def _forward_backward(recorder: StorageRecorder, pack: PackedModel, batch: Batch) -> None:
    recorder.phase = "forward"
    recorder.expect_logits(_num_logits(pack, batch))
    losses = cross_entropy_of_trials(_logits(pack, batch), batch["labels"], pack.seating.num_trials)
    total = (losses / torch.ones_like(losses)).sum()
    recorder.phase = "backward"
    total.backward()


@torch.no_grad()
def _evaluate(recorder: StorageRecorder, pack: PackedModel, batch: Batch) -> None:
    """Of all trials together, then counted one after the other."""
    recorder.expect_logits(_num_logits(pack, batch))
    size = pack.seating.num_trials
    logits, labels = _logits(pack, batch).chunk(size), batch["labels"].chunk(size)
    for own_logits, own_labels in zip(logits, labels, strict=True):
        summed_cross_entropy(own_logits, own_labels)
        hits_of(own_logits, own_labels)


def _logits(pack: PackedModel, batch: Batch) -> Tensor:
    """(rows, length, vocabulary), or (rows, classes)."""
    pack.seating.num_rows, pack.seating.length = batch["input_ids"].shape
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits: Tensor = pack.base(**inputs).logits
    return logits


def _num_logits(pack: PackedModel, batch: Batch) -> int:
    if is_classifier(pack.base):
        return batch["labels"].numel() * int(pack.base.config.num_labels or 0)
    head: nn.Module = pack.base.get_output_embeddings()
    return batch["labels"].numel() * head.get_parameter("weight").shape[0]
