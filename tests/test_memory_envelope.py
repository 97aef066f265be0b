"""Two traces at low ranks against traces at high ones, on a model of the size that people train.

No weights are needed, so this is Llama 2 7B itself, in bfloat16, as it would run on CUDA.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from planning import kind_of
from test_memory import rounded
from transformers import LlamaConfig

from rsauto.memory.kinds import StepKind, StepSize
from rsauto.memory.presets import model_preset
from rsauto.memory.profile import GRANULE_BYTES, StepProfile, profile_from, second_sizes
from rsauto.memory.trace import trace_step

pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning"),
]

GRANULE = GRANULE_BYTES["cuda"]
ALONE = StepSize(4, 1, 512, 0)


def llama_7b(num_layers: int = 32, **changes: Any) -> StepKind:
    """A single sequence, so without padding, unless a test says else."""
    fields = model_preset("llama-2-7b") | {"num_hidden_layers": num_layers}
    settings = {"dtype": "bfloat16", "device_type": "cuda", "padded": False, **changes}
    return kind_of(LlamaConfig(**fields), **settings)


def profile_of(kind: StepKind, low: StepSize, high: StepSize) -> StepProfile:
    return profile_from(trace_step(kind, low), trace_step(kind, high), "cuda")


def require_equal(profile: StepProfile, kind: StepKind, size: StepSize) -> None:
    """Every size, and with them the peak, where it is and what makes it."""
    direct = trace_step(kind, size)
    signed = rounded(direct, GRANULE)
    in_use = list(itertools.accumulate(signed))
    top = in_use.index(max(in_use))
    prediction = profile.predict(size, "cuda")
    assert profile.covers(size)
    assert profile.sizes(size, GRANULE).tolist() == signed
    assert prediction.peak_bytes == max(in_use)
    assert (prediction.phase, prediction.operation) == (
        direct.events[top].phase,
        direct.events[top].operation,
    )
    assert prediction.num_trainable_params == direct.num_trainable_params


@pytest.mark.thorough
def test_two_low_ranks_tell_every_high_one() -> None:
    """All 32 layers. The peak moves from the loss to the end of backward, so no line would do."""
    kind = llama_7b()
    profile = profile_of(kind, ALONE, ALONE._replace(rank=32))
    require_equal(profile, kind, ALONE._replace(rank=2048))
    peaks = {rank: profile.predict(ALONE._replace(rank=rank), "cuda") for rank in (4, 32, 2048)}
    low, middle, high = (peak.peak_bytes for peak in peaks.values())
    assert low + (middle - low) / 28 * 2044 < 0.97 * high
    # 32 layers of 4 square matrices and 3 of the MLP, 2 factors to each.
    assert peaks[2048].num_trainable_params == 2048 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    # 6.74 billion weights of 2 bytes.
    assert peaks[2048].breakdown["weights"] == pytest.approx(2 * 6_738_415_616, rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"autocast": "bfloat16"},
        {"gradient_checkpointing": True, "use_reentrant": True},
        {"gradient_checkpointing": True, "use_reentrant": False, "autocast": "bfloat16"},
        {"method": "dora", "gradient_checkpointing": True},
        {"quant_bits": 4, "lora_dropout": 0.05},
    ],
)
@pytest.mark.sample(2)
def test_kinds_of_steps(changes: dict[str, Any]) -> None:
    kind = llama_7b(4, **changes)
    profile = profile_of(kind, ALONE, ALONE._replace(rank=32))
    for rank in (256, 2048):
        require_equal(profile, kind, ALONE._replace(rank=rank))


def test_adalora_grows_with_the_square_of_the_rank() -> None:
    """Its regularisation multiplies every factor by itself: matrices of rank times rank."""
    kind = llama_7b(2, method="peft_adalora", gradient_checkpointing=True)
    profile = profile_of(kind, ALONE._replace(rank=8), ALONE._replace(rank=24))
    assert 2 in profile.exponents[:, 0]
    for rank in (256, 1024):
        require_equal(profile, kind, ALONE._replace(rank=rank))


@pytest.mark.parametrize(
    "changes",
    [
        {"padded": True},
        {"padded": True, "attn_implementation": "eager", "gradient_checkpointing": True},
        {"padded": False, "attn_implementation": "flash_attention_2"},
    ],
)
@pytest.mark.sample(1)
def test_batches_and_lengths(changes: dict[str, Any]) -> None:
    """Attention by matrices and masks grow with the square of the length."""
    kind = llama_7b(2, **changes)
    first = StepSize(8, 8, 2048, 4096)
    profile = profile_of(kind, first, next(second_sizes(first, "cuda")))
    require_equal(profile, kind, StepSize(64, 3, 1024, 2048))
    require_equal(profile, kind, StepSize(512, 5, 512, 4096))
