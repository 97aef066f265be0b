"""What several test files need: a tiny model, and records as a study would write them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

pytest_plugins = ["sampling"]

# Before any library reads them: nothing is downloaded, and tiny models are fastest on one thread.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from rsauto.records import TrialRecord, TrialSpec


@pytest.fixture(autouse=True, scope="session")
def _plans_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Plans are kept from test to test, but never read from an earlier run."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of the whole run, whose other process plans the same
    os.environ["RSAUTO_CACHE_DIR"] = str(folder / "cache")


@pytest.fixture(autouse=True)
def _no_child_outlives_its_test() -> Iterator[None]:
    yield
    if "processes" in sys.modules:
        sys.modules["processes"].kill_all()


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """A random Llama of 2 blocks, 32 wide, 64 tokens, prepared as in a study."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rsauto.base import prepare

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    prepare(model, gradient_checkpointing=False)
    return model.eval()


@pytest.fixture
def record_of() -> Callable[..., TrialRecord]:
    """Makes the record of a trial that ended with a given loss or outcome."""
    from rsauto.records import EvalPoint, TrialRecord
    from rsauto.scaling import gamma_r

    def make(
        spec: TrialSpec,
        number: int = 0,
        eval_loss: float | None = 1.0,
        outcome: str = "complete",
        **changes: Any,
    ) -> TrialRecord:
        same = {
            name: getattr(spec, name)
            for name in (
                "role", "method", "rank", "alpha", "scaling_rule", "target_modules",
                "learning_rate", "lr_ratio", "optimizer", "schedule", "batch_size", "max_length",
                "seed",
            )
        }  # fmt: skip
        curve = ()
        if eval_loss is not None and outcome in ("complete", "pruned"):
            steps = spec.steps if outcome == "complete" else 1
            curve = (EvalPoint(step=steps, train_loss=1.0, eval_loss=eval_loss, grad_norm=1.0),)
        fields = {
            "number": number,
            "outcome": outcome,
            **same,
            "gamma_r": gamma_r(spec.scaling_rule, spec.alpha, spec.rank),
            "eval_loss": eval_loss if curve else None,
            "curve": curve,
            "predicted_peak_bytes": 1000 + spec.rank,
            "memory_budget_bytes": 10_000,
            **changes,
        }
        return TrialRecord(**fields)

    return make
