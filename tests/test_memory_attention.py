"""What attention allocates in place of CUDA's kernels, against lists derived by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
)
from transformers.integrations import flash_attention
from transformers.masking_utils import AttentionMaskInterface

from rsauto.errors import InputError
from rsauto.memory.attention import attention_of_cuda, use_flash
from rsauto.memory.kinds import StepKind, StepSize
from rsauto.memory.quantised import stand_in_for_linears
from rsauto.memory.recorder import StorageRecorder
from rsauto.memory.trace import trace_step

BF16, FP32 = torch.bfloat16, torch.float32
B, H, S, D = 2, 4, 40, 16
RNG = [16, 8]


@contextmanager
def tensors(fake: bool) -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
        yield


def states(
    dtype: torch.dtype = BF16, heads: int = H, key_heads: int = H, length: int = S, dim: int = D
) -> list[Tensor]:
    """q, k and v as models make them: (batch, heads, length, dim), laid out by length first."""
    shapes = [(B, length, n, dim) for n in (heads, key_heads, key_heads)]
    return [torch.zeros(s, dtype=dtype).transpose(1, 2).requires_grad_() for s in shapes]


class Allocated:
    """Bytes of every storage of one call, in order, and what of them is left."""

    def __init__(self, inputs: list[Tensor], call: Callable[..., Tensor]) -> None:
        recorder = StorageRecorder("cuda")
        recorder.assign("weights", inputs)
        num_inputs = len({t.untyped_storage()._cdata for t in inputs})
        with recorder:
            out = call(*inputs)
            recorder.phase = "backward"
            if out.requires_grad:
                out.backward(torch.empty_like(out))
            del out
            events = recorder.finish()[num_inputs:]
        self.forward = [e.nbytes for e in events if e.nbytes > 0 and e.phase == "forward"]
        self.backward = [e.nbytes for e in events if e.nbytes > 0 and e.phase == "backward"]
        self.kept = sum(e.nbytes for e in events if e.phase == "forward")
        self.left = sum(e.nbytes for e in events)


def attend(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, **arguments)


@pytest.mark.parametrize("fake", [True, False])
@pytest.mark.parametrize(
    "length, dim, rows, padded_dim",
    [(40, 16, 128, 32), (130, 64, 256, 64), (128, 80, 128, 96), (16, 160, 128, 192)],
)
def test_flash_keeps_its_output_and_sums_in_float32(
    length: int, dim: int, rows: int, padded_dim: int, fake: bool
) -> None:
    with tensors(fake), attention_of_cuda(flash=False):
        used = Allocated(states(length=length, dim=dim), lambda *qkv: attend(*qkv, is_causal=True))
    state = 2 * B * H * length * dim
    accumulators = [4 * B * H * rows, 4 * B * H * rows * padded_dim]
    assert used.forward == [state, 4 * B * H * length, *RNG]
    assert used.backward == [state, state, state, state, *accumulators]
    assert used.kept == sum(used.forward)
    assert used.left == 3 * state


def test_flash_takes_fewer_heads_of_k_and_v_and_expands_only_their_gradients() -> None:
    with tensors(True), attention_of_cuda(flash=False):
        used = Allocated(
            states(key_heads=2), lambda *qkv: attend(*qkv, is_causal=True, enable_gqa=True)
        )
    state = 2 * B * H * S * D
    assert used.forward == [state, 4 * B * H * S, *RNG]
    assert used.backward[:4] == [state, state, state // 2, state // 2]
    assert used.backward[6:] == [state, state]
    assert used.left == 2 * state


def test_flash_pads_heads_to_a_multiple_of_8() -> None:
    with tensors(True), attention_of_cuda(flash=False):
        used = Allocated(states(dim=12), lambda *qkv: attend(*qkv, is_causal=True))
    assert used.forward[:3] == [2 * B * H * S * 16] * 3


def test_dropout_changes_nothing() -> None:
    mask = torch.ones(B, 1, S, S, dtype=torch.bool)
    for options in ({"is_causal": True}, {"attn_mask": mask}):
        with tensors(True), attention_of_cuda(flash=False):
            plain = Allocated(states(), lambda *qkv, o=options: attend(*qkv, **o))
            dropped = Allocated(states(), lambda *qkv, o=options: attend(*qkv, dropout_p=0.1, **o))
        assert vars(plain) == vars(dropped)


@pytest.mark.parametrize("fake", [True, False])
@pytest.mark.parametrize(
    "length, dim, workspace",
    [
        (40, 16, 16 + 4 * 64 * 64),
        (200, 64, 4 * (16 + 4 * 64 * 64)),
        (200, 128, 2 * (16 + 4 * 128 * 128)),
        # Too wide for registers: also 4 blocks of 64 keys for the gradients of k and of v.
        (200, 256, 2 * 4 * (16 + 4 * 128 * 64) + 2 * 4 * 4 * 64 * 256),
    ],
)
def test_a_mask_takes_the_memory_efficient_kernel(
    length: int, dim: int, workspace: int, fake: bool
) -> None:
    with tensors(fake), attention_of_cuda(flash=False):
        mask = torch.ones(B, 1, length, length, dtype=torch.bool)
        used = Allocated(states(length=length, dim=dim), lambda *qkv: attend(*qkv, attn_mask=mask))
    state, bias = 2 * B * H * length * dim, 2 * B * length * length
    logsumexp = 4 * B * H * 32 * math.ceil(length / 32)
    scratch = [2 * state] if dim > 128 else []
    assert used.forward == [bias, state, logsumexp, *scratch]
    assert used.backward == [*[state] * 4, 4 * B * H * length, B * H * workspace]
    assert used.kept == bias + state + logsumexp
    assert used.left == 3 * state


def test_a_bias_of_odd_length_is_padded_by_a_copy() -> None:
    with tensors(True), attention_of_cuda(flash=False):
        mask = torch.ones(B, 1, 41, 41, dtype=torch.bool)
        used = Allocated(states(length=41), lambda *qkv: attend(*qkv, attn_mask=mask))
    unpadded, padded = 2 * B * 41 * 41, 2 * B * 41 * 48
    assert used.forward[:2] == [unpadded, padded]
    assert used.kept == sum(used.forward) - unpadded


def test_a_bias_in_the_dtype_of_q_is_kept_as_it_is() -> None:
    with tensors(True), attention_of_cuda(flash=False):
        bias = torch.zeros(1, 1, S, S, dtype=BF16)
        used = Allocated([*states(), bias], lambda q, k, v, m: attend(q, k, v, attn_mask=m))
    assert used.forward == [2 * B * H * S * D, 4 * B * H * 64]


def test_float32_takes_the_memory_efficient_kernel() -> None:
    with tensors(True), attention_of_cuda(flash=False):
        used = Allocated(states(FP32), lambda *qkv: attend(*qkv, is_causal=True))
    state, delta = 4 * B * H * S * D, 4 * B * H * S
    assert used.forward == [state, 4 * B * H * 64]
    workspace = B * H * (16 + 4 * 64 * 64)
    assert used.backward == [*[state] * 5, delta, delta, workspace]


def test_without_gradients_no_logsumexp_is_kept() -> None:
    with tensors(True), attention_of_cuda(flash=False), torch.no_grad():
        used = Allocated(states(FP32), lambda *qkv: attend(*qkv, is_causal=True))
    assert used.forward == [4 * B * H * S * D]
    assert used.left == 0


@pytest.mark.parametrize("dtype, dim, key_heads", [(FP32, 16, 2), (BF16, 272, 2), (FP32, 18, 4)])
def test_what_no_kernel_takes_runs_as_plain_operations(
    dtype: torch.dtype, dim: int, key_heads: int
) -> None:
    def call(*qkv: Tensor) -> Tensor:
        return attend(*qkv, is_causal=True, enable_gqa=key_heads < H)

    with tensors(True):
        with attention_of_cuda(flash=False):
            ours = Allocated(states(dtype, key_heads=key_heads, dim=dim), call)
        with sdpa_kernel(SDPBackend.MATH):
            plain = Allocated(states(dtype, key_heads=key_heads, dim=dim), call)
    assert 4 * B * H * S * S in ours.forward
    assert vars(ours) == vars(plain)


def test_autocast_casts_before_a_kernel_is_chosen() -> None:
    with tensors(True), attention_of_cuda(flash=False), torch.autocast("cpu", dtype=BF16):
        used = Allocated(states(FP32), lambda *qkv: attend(*qkv, is_causal=True))
        out = attend(*states(FP32), is_causal=True)
    state = 2 * B * H * S * D
    assert out.dtype == BF16
    assert used.forward == [state, state, state, state, 4 * B * H * S, *RNG]
    assert used.left == 3 * 2 * state


@pytest.mark.parametrize("fake", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_with_the_same_kernel(reentrant: bool, fake: bool) -> None:
    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, is_causal=True).tanh()

    def checkpointed(*qkv: Tensor) -> Tensor:
        out: Tensor = checkpoint(block, *qkv, use_reentrant=reentrant, preserve_rng_state=False)
        return out

    with tensors(fake), attention_of_cuda(flash=False):
        used = Allocated(states(), checkpointed)
    state, logsumexp = 2 * B * H * S * D, 4 * B * H * S
    assert used.kept == state
    assert logsumexp in used.forward
    assert logsumexp in used.backward
    assert 4 * B * H * 128 * 32 in used.backward
    assert used.left == 3 * state


# Whole models, adapted and traced as a plan does it.

LLAMA = LlamaConfig(
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=96,
    vocab_size=128,
    num_attention_heads=4,
    num_key_value_heads=4,
)
QWEN2 = Qwen2Config(
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=96,
    vocab_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
)
SIZE = StepSize(rank=4, micro_batch_size=2, train_length=40, eval_length=40)


def traced(config: Any, **changes: Any) -> list[tuple[int, str]]:
    kind = StepKind(
        model_config=config.to_json_string(use_diff=False), **{"dtype": "bfloat16", **changes}
    )
    events = trace_step(kind, SIZE).events
    return [(e.nbytes, e.phase) for e in events if abs(e.nbytes) > 512]


def held_after_forward(events: list[tuple[int, str]]) -> int:
    first_backward = next(i for i, (_, phase) in enumerate(events) if phase == "backward")
    return sum(nbytes for nbytes, _ in events[:first_backward])


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")
@pytest.mark.parametrize("config", [LLAMA, QWEN2], ids=["llama", "qwen2"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": True, "use_reentrant": True},
        {"gradient_checkpointing": True, "use_reentrant": False},
        {"dtype": "float32", "autocast": "bfloat16"},
    ],
    ids=["plain", "reentrant", "not reentrant", "autocast"],
)
@pytest.mark.sample(3)
def test_without_padding_flash_attn_is_sdpas_flash_kernel(
    config: Any, changes: dict[str, Any]
) -> None:
    sdpa = traced(config, padded=False, **changes)
    flash = traced(config, padded=False, attn_implementation="flash_attention_2", **changes)
    assert flash == sdpa


@pytest.mark.parametrize("config", [LLAMA, QWEN2], ids=["llama", "qwen2"])
def test_padding_is_removed_and_put_back(config: Any) -> None:
    flash = {"attn_implementation": "flash_attention_2"}
    dense = traced(config, padded=False, **flash)
    packed = traced(config, padded=True, **flash)
    tokens = SIZE.micro_batch_size * SIZE.train_length
    # Either way q, k, v and the output are kept once; packed, also where the tokens were, and the
    # output with its padding, which is what the next layer is given and keeps.
    layers = config.num_hidden_layers
    indices, padded = 8 * tokens * layers, BF16.itemsize * tokens * config.hidden_size * layers
    assert held_after_forward(packed) - held_after_forward(dense) == indices + padded
    accumulator = 4 * 2 * (SIZE.train_length + 128) * 4 * 32
    assert (accumulator, "backward") in packed
    assert (accumulator, "backward") not in dense


def test_flash_attn_refuses_float32() -> None:
    with pytest.raises(InputError, match=r"autocast to one, not torch\.float32"):
        traced(LLAMA, dtype="float32", attn_implementation="flash_attention_2")


def test_architectures_that_choose_attention_when_built_are_refused() -> None:
    config = FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
    with torch.device("meta"):
        model = FalconForCausalLM._from_config(config, attn_implementation="sdpa")
    with pytest.raises(InputError, match="FalconForCausalLM; use 'sdpa' or 'eager'"):
        use_flash(model)


def test_quantised_layers_do_not_name_the_dtype_of_queries() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(LLAMA, dtype=BF16, attn_implementation="sdpa")
        stand_in_for_linears(model, 8, "cuda")
    query = torch.empty(1, 4, 8, 16)
    attention = model.model.layers[0].self_attn
    assert flash_attention.get_target_dtype(query, attention) == torch.int8
    use_flash(model)
    assert flash_attention.get_target_dtype(query, attention) == BF16


def test_everything_is_restored() -> None:
    def replaced() -> list[Any]:
        return [
            nn.functional.scaled_dot_product_attention,
            flash_attention._flash_attention_forward,
            AttentionMaskInterface._global_mapping["flash_attention_2"],
        ]

    before = replaced()
    with pytest.raises(ZeroDivisionError), attention_of_cuda(flash=True):
        within = replaced()
        raise ZeroDivisionError
    assert not any(ours is own for ours, own in zip(within, before, strict=True))
    assert all(now is then for now, then in zip(replaced(), before, strict=True))
