"""A trial in a pack: what it is, how far it has come, and what it has given so far."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from peft import PeftModel

from rsauto.adapters.optimizers import GroupName
from rsauto.data import TokenisedData, batch_plan
from rsauto.packing.model import Norms
from rsauto.packing.tensors import TrialTensors, read
from rsauto.records import ActivationMoments, EvalPoint, StepPoint, TrialSpec
from rsauto.training.evaluate import Evaluation
from rsauto.training.flops import linear_weights
from rsauto.training.log import Log
from rsauto.training.loop import (
    Diverged,
    cut,
    eval_point,
    require_finite,
    require_finite_losses,
)
from rsauto.training.schedule import evaluation_steps, rate_multiplier, warmup_steps
from rsauto.training.trial import OutOfMemory


class Member:
    """One trial. Its tensors are in the pack's stacks while it is seated."""

    def __init__(self, data: TokenisedData, spec: TrialSpec, adapted: PeftModel) -> None:
        """``adapted`` is the base with the trial's adapter as PEFT has drawn it."""
        assert spec.micro_batch_size is not None, "a pack has one micro-batch for all"
        self.spec = spec
        self.started_at = datetime.now(UTC).isoformat(timespec="seconds")
        self.curve: list[EvalPoint] = []
        self.last: StepPoint | None = None
        self.flops = 0.0
        """Floating-point operations of the steps done so far, see `training_flops`."""
        self.rank_pattern: dict[str, int] | None = dict(spec.rank_pattern or ()) or None
        """Rank of each module as it is now, None where all have the same by design."""
        self.pack_size = 1
        """Most trials that were trained together with this one, itself included."""
        self.tensors: TrialTensors = read(adapted)
        self.num_trainable_params = sum(t.numel() for t in self.tensors.values.values())
        self._frozen_weights, self._trained_weights = linear_weights(adapted)
        self._head_weights = self._trained_weights - self.tensors.num_adapter_weights
        order = batch_plan(len(data.train), spec.batch_size, spec.steps, spec.seed)
        self.batches = [cut(indices, data, spec.micro_batch_size) for indices in order]
        """Of every step the micro-batches, as indices of training examples."""
        self.tokens = [sum(len(data.train[i].input_ids) for i in indices) for indices in order]
        self.evaluates_after = evaluation_steps(spec.steps, spec.num_evals)
        self.log = Log(spec.logging_steps)
        self.moments: list[ActivationMoments] = []
        """Never measured in a pack."""
        self._losses: list[float] = []
        self._norms: list[float] = []

    @property
    def steps_done(self) -> int:
        return 0 if self.last is None else self.last.step

    @property
    def is_finished(self) -> bool:
        return self.steps_done == self.spec.steps

    @property
    def next_batches(self) -> tuple[tuple[int, ...], ...]:
        """Rows of the next step's micro-batches. Raises ValueError after the last step."""
        if self.is_finished:
            raise ValueError("a trial that is finished must be released from its pack")
        return tuple(map(tuple, self.batches[self.steps_done]))

    @property
    def evaluates_next(self) -> bool:
        """Whether the next step is followed by an evaluation."""
        return self.steps_done + 1 in self.evaluates_after

    def rates(self) -> dict[GroupName, float]:
        """Learning rate of every group at the next step."""
        spec = self.spec
        num_warmup = warmup_steps(spec.steps, spec.warmup_share)
        share = rate_multiplier(spec.schedule, self.steps_done, spec.steps, num_warmup)
        rate = spec.learning_rate
        return {
            "A": rate * share,
            "B": rate * spec.lr_ratio * share,
            "lambda": rate * (spec.lambda_lr_ratio or 1.0) * share,
            "head": (spec.head_learning_rate or rate) * share,
        }

    def set_adapter_weights(self, number: int) -> None:
        """How many numbers A and B have from now on, where AdaLoRA has freed some."""
        self._trained_weights = self._head_weights + number

    def advance(
        self, loss: float, norms: Norms, seconds: float, found: Evaluation | None
    ) -> StepPoint:
        """Takes in a step, and the evaluation after it. Raises Diverged where one is no number."""
        step = self.steps_done + 1
        require_finite(step, loss)
        require_finite(step, norms.total, "gradient norm")
        self._losses.append(loss)
        self._norms.append(norms.mean)
        evaluation = None
        if found is not None:
            require_finite_losses(step, found)
            evaluation = eval_point(step, found, self._losses, self._norms)
            self._losses, self._norms = [], []
            self.curve.append(evaluation)
        tokens, rate = self.tokens[step - 1], self.rates()["A"]
        self.flops += tokens * (4.0 * self._frozen_weights + 6.0 * self._trained_weights)
        self.last = StepPoint(
            step=step,
            train_loss=loss,
            grad_norm=norms.mean,
            learning_rate=rate,
            tokens=tokens + (0 if self.last is None else self.last.tokens),
            seconds=seconds,
            evaluation=evaluation,
        )
        self.log.add(self.last)
        return self.last


@dataclass(frozen=True)
class Advance:
    """What a step of the pack gave for one of its trials: a point, or the error that ends it."""

    member: Member
    point: StepPoint | None = None
    error: Diverged | OutOfMemory | None = None
