"""Training loss and gradient norm of a trial over its steps, thinned out as it was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from rsauto.records import LogPoint, StepPoint


class Log:
    """Takes in every step, and has a point after every ``every`` of them."""

    def __init__(
        self, every: int | None, points: Sequence[LogPoint] = (), since: Sequence[StepPoint] = ()
    ) -> None:
        """``points`` and the steps ``since`` the last are those of a run that is continued."""
        self.every = every
        self.points = list(points)
        self.since = list(since)

    def add(self, point: StepPoint) -> None:
        if self.every is None:
            return
        self.since.append(point)
        if point.step % self.every == 0:
            self.points.append(
                LogPoint(
                    step=point.step,
                    train_loss=fmean(p.train_loss for p in self.since),
                    grad_norm=fmean(p.grad_norm for p in self.since),
                )
            )
            self.since = []
