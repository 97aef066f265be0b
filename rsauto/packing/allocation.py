"""AdaLoRA for a stack: every trial places its own rank, as `rsauto.adalora.allocator` does alone.

Lambdas of all layers lie in one buffer (K, P), a number a triplet. Where pruned triplets are gone
for good (``recovery: none``) a stack keeps their room, at zero, until it is made anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rsauto.adalora.budget import BudgetSchedule, keep_best
from rsauto.adalora.config import RsAdaLoraConfig
from rsauto.adalora.importance import RANK_DIM, SCORED, Factor
from rsauto.adapters.optimizers import GroupName
from rsauto.packing.stack import IMPORTANCE, Group, Run, Stack
from rsauto.packing.tensors import HOST, Key, TrialTensors

GROUP: dict[Factor, GroupName] = {"A": "A", "B": "B", "E": "lambda"}


def importance_fields(config: RsAdaLoraConfig) -> dict[str, tuple[GroupName, ...]]:
    """What is kept of which group, to know how important triplets are."""
    groups = tuple(GROUP[factor] for factor in SCORED[config.score])
    return dict.fromkeys(IMPORTANCE, groups)


def way_of(config: RsAdaLoraConfig) -> tuple[object, ...]:
    """What the trials of one stack have in common; ranks and schedules are each one's own."""
    c = config
    orthogonality = (c.orth_reg_form, c.orth_reg_weight)
    return (c.score, c.recovery, c.scale_rank, c.beta1, c.beta2, *orthogonality)


class StackAllocation:
    """Places the rank of every trial of one stack. All have one way of doing it, not one rank."""

    def __init__(self, stack: Stack, trials: Sequence[TrialTensors]) -> None:
        self.stack = stack
        self.configs = [_config(trial) for trial in trials]
        self.config = self.configs[0]
        self._lambdas = stack.groups["lambda"]
        self._spans = [self._spans_of(trial) for trial in trials]
        self.alive = self._masks([trial.alive for trial in trials])
        """(K, P) boolean, False for pads and for triplets that are gone for good."""
        self.active = self._masks([trial.active for trial in trials])
        """(K, P) boolean, True where lambda may differ from zero."""
        self.schedules: list[BudgetSchedule] = [
            config.schedule(len(trial.gamma))
            for config, trial in zip(self.configs, trials, strict=True)
        ]
        # On the host, so that nobody waits for the device to know them.
        self.ranks = [dict(trial.ranks) for trial in trials]
        """Active triplets of every layer, of every trial."""
        self.num_alive = [dict(trial.num_alive) for trial in trials]
        """Of every layer the triplets that are not gone for good."""

    @torch.no_grad()
    def add_orthogonality(self) -> None:
        """Adds the gradient of `rsauto.adalora.orthogonality` to those of P and Q."""
        weight = self.config.orth_reg_weight
        if weight == 0:
            return
        by_norm = self.config.orth_reg_form == "norm"
        shares = [weight / (2 * len(g)) if by_norm else weight for g in self.stack.gamma]
        share = self.alive.new_tensor(shares, dtype=torch.float32).view(-1, 1, 1, 1)
        for factor in ("A", "B"):
            group = self.stack.groups[GROUP[factor]]
            for run in group.runs:
                self._add_orthogonality(factor, group, run, share)

    def _add_orthogonality(self, factor: Factor, group: Group, run: Run, share: Tensor) -> None:
        values = group.run(group.values, run).float()  # (K, n, r, d_in) or (K, n, d_out, r)
        gram = values @ values.mT if factor == "A" else values.mT @ values
        gram.diagonal(dim1=-2, dim2=-1).sub_(self._alive_of(run).to(gram.dtype))
        if self.config.orth_reg_form == "norm":
            norms = torch.linalg.matrix_norm(gram, keepdim=True).clamp_min_(1e-30)
            gram.mul_(2.0 * share / norms)
        else:
            gram.mul_(4.0 * share)
        gradient = gram @ values if factor == "A" else values @ gram
        group.run(group.gradients, run).add_(gradient.to(group.values.dtype))

    @torch.no_grad()
    def after_step(self, steps: Sequence[int]) -> None:
        """Gathers importance and chooses triplets; ``steps`` are those done by every trial."""
        open_rows = [row for row, step in enumerate(steps) if step <= self._final(row)]
        if open_rows:
            self._gather([step < self._final(row) for row, step in enumerate(steps)])
            due = [row for row in open_rows if self._allocates(row, steps[row])]
            if due:
                self._allocate(due, steps)
        self._lambdas.values.mul_(self._as_column(self.active))

    def num_tensors(self, row: int) -> int:
        """Factors of one trial that take part in a step: three of every layer with a rank left."""
        return 3 * sum(count > 0 for count in self.num_alive[row].values())

    def masks(self, row: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(alive, active) of every layer of one trial, copies on the host."""
        alive, active = (mask[row].to(HOST, copy=True) for mask in (self.alive, self.active))
        return self._split(alive, row), self._split(active, row)

    def _gather(self, rows: Sequence[bool]) -> None:
        """`rsauto.adalora.importance.Importance.update` of the trials that still gather."""
        gathers = torch.tensor(rows, device=self.alive.device).float().unsqueeze(1)
        for factor in SCORED[self.config.score]:
            group = self.stack.groups[GROUP[factor]]
            smoothed, uncertainty = (group.buffers[field] for field in IMPORTANCE)
            now = torch.mul(group.values.float(), group.gradients.float()).abs_()
            smoothed.lerp_(now, gathers * (1 - self.config.beta1))
            uncertainty.lerp_(now.sub_(smoothed).abs_(), gathers * (1 - self.config.beta2))

    def _scores(self) -> Tensor:
        """Importance of every triplet, (K, P)."""
        sensitivity, uncertainty = (self._lambdas.buffers[field] for field in IMPORTANCE)
        scores = sensitivity * uncertainty
        for factor in SCORED[self.config.score]:
            if factor == "E":
                continue
            entries = 2 - RANK_DIM[factor]  # behind the trials
            for name in self.stack.modules:
                pair = [self.stack.view(field, Key(name, factor)) for field in IMPORTANCE]
                mean = torch.linalg.vecdot(*pair, dim=entries) / pair[0].shape[entries]
                begin = self._lambdas.begin(Key(name, "E"))
                scores[:, begin : begin + mean.shape[1]] += mean
        return scores

    def _allocate(self, due: Sequence[int], steps: Sequence[int]) -> None:
        scores = self._scores()
        for row in due:
            self._choose(row, scores[row], self.schedules[row].budget(steps[row]))
        active = self.active.to(HOST)  # one transfer for all
        for row in due:
            self.ranks[row] = {n: int(m.sum()) for n, m in self._split(active[row], row).items()}
            if self.config.scale_rank == "live":
                gamma_r = self.configs[row].gamma_r
                self.stack.set_gamma(row, {n: gamma_r(rank) for n, rank in self.ranks[row].items()})
        if self.config.recovery == "none":
            self.alive &= self.active
            for row in due:
                self.num_alive[row] = self.ranks[row]
            self._clear()

    def _choose(self, row: int, scores: Tensor, budget: int) -> None:
        """Makes the best triplets of one trial the active ones, of those that are alive."""
        spans = self._spans[row].values()
        alive = [self.alive[row, span] for span in spans]
        active = [self.active[row, span] for span in spans]
        found = [scores[span][mask] for span, mask in zip(spans, alive, strict=True)]
        was = [mask[own] for mask, own in zip(active, alive, strict=True)]
        # After triplets are gone for good there may be fewer than a budget asks for.
        kept = keep_best(found, was, min(budget, sum(map(len, found))))
        for mask, own, now in zip(active, alive, kept, strict=True):
            mask[own] = now

    def _clear(self) -> None:
        """Sets everything of the triplets that are gone to zero, where it would move again."""
        for factor in ("A", "B"):
            group = self.stack.groups[GROUP[factor]]
            fields = [f for f in ("values", "exp_avg") if f in group.buffers]
            for run in group.runs:
                mask = self._alive_of(run).unsqueeze(-1 if factor == "A" else -2)
                for field in fields:
                    group.run(group.buffers[field], run).mul_(mask)
        if "exp_avg" in self._lambdas.buffers:
            self._lambdas.buffers["exp_avg"].mul_(self.alive)

    def _alive_of(self, run: Run) -> Tensor:
        """(K, n, r), boolean, of the layers of a run of P or Q."""
        found = []
        for key in run.keys:
            begin = self._lambdas.begin(Key(key.module, "E"))
            width = self._lambdas.shapes[Key(key.module, "E")][0]
            found.append(self.alive[:, begin : begin + width])
        return torch.stack(found, dim=1)

    def _allocates(self, row: int, step: int) -> bool:
        return step == self._final(row) or self.schedules[row].allocates(step)

    def _final(self, row: int) -> int:
        return self.schedules[row].final_step

    def _spans_of(self, trial: TrialTensors) -> dict[str, slice]:
        """Of every layer of a trial, in model order, where its triplets lie."""
        begins = {name: self._lambdas.begin(Key(name, "E")) for name in trial.gamma}
        return {name: slice(at, at + len(trial.alive[name])) for name, at in begins.items()}

    def _masks(self, tables: Sequence[dict[str, Tensor]]) -> Tensor:
        mask = torch.zeros_like(self._lambdas.values, dtype=torch.bool)
        for row, (table, spans) in enumerate(zip(tables, self._spans, strict=True)):
            for name, span in spans.items():
                mask[row, span] = table[name].to(mask.device)
        return mask

    def _split(self, mask: Tensor, row: int) -> dict[str, Tensor]:
        return {name: mask[span] for name, span in self._spans[row].items()}

    def _as_column(self, mask: Tensor) -> Tensor:
        return mask.to(self._lambdas.values.dtype)


def _config(trial: TrialTensors) -> RsAdaLoraConfig:
    assert trial.config is not None, "a trial that allocates says how"
    return trial.config
