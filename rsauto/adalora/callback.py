"""AdaLoRA inside transformers' Trainer, or any loop that takes its callbacks."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from rsauto.adalora.model import RsAdaLoraModel
from rsauto.training.schedule import steps_of_share


class RsAdaLoraCallback(TrainerCallback):
    """Allocates ranks after every optimizer step of a `Trainer`.

        Trainer(model=get_peft_model(base, RsAdaLoraConfig(...)),
                callbacks=[RsAdaLoraCallback(warmup_share=0.1, final_share=0.3)], ...)

    The number of steps is the trainer's own; whatever ``total_step`` says is replaced by it. The
    shares of the run, where given, replace ``tinit`` and ``tfinal``.
    """

    def __init__(
        self, *, warmup_share: float | None = None, final_share: float | None = None
    ) -> None:
        """Raises ValueError for shares that leave nothing in between."""
        shares = {"warmup_share": warmup_share, "final_share": final_share}
        for name, share in shares.items():
            if share is not None and not 0 <= share < 1:
                raise ValueError(f"{name}: {share!r} must be at least 0 and below 1, or None.")
        if (warmup_share or 0) + (final_share or 0) >= 1:
            raise ValueError(
                f"warmup_share {warmup_share} and final_share {final_share} leave no part of the "
                "run to allocate ranks in. Lower them."
            )
        self._shares = {"tinit": warmup_share, "tfinal": final_share}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Sets the schedule to the length of the run."""
        tuner = _tuner(model)
        config = tuner.config_of(tuner.trained_adapter)
        before = config.tinit, config.tfinal
        for name, share in self._shares.items():
            if share is not None:
                setattr(config, name, steps_of_share(share, state.max_steps))
        try:
            tuner.set_total_step(state.max_steps)
        except ValueError:
            config.tinit, config.tfinal = before
            raise

    def on_optimizer_step(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Trainer counts the step only afterwards."""
        _tuner(model).update_and_allocate(state.global_step + 1, optimizer)


def _tuner(model: Any) -> RsAdaLoraModel:
    """The tuner of a PEFT model, however it is wrapped. Raises ValueError where it is another."""
    inner = getattr(model, "module", model)
    tuner = getattr(inner, "base_model", None)
    if not isinstance(tuner, RsAdaLoraModel):
        raise ValueError(
            f"RsAdaLoraCallback: the model is a {type(inner).__name__} without an RsAdaLoraConfig. "
            "Wrap it with peft.get_peft_model(model, RsAdaLoraConfig(...)) first."
        )
    return tuner
