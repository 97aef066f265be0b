"""The low-rank product as one operation, against the plain formula, torch's counter and PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from planning import kind_of
from test_memory_truth import LM, PADDED, peak, require_equal, step_of
from tiny_study import study_values
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from rsauto.adapters import fused
from rsauto.adapters.export import export_lora
from rsauto.adapters.fused import FusedLoraLinear, adapted_linear
from rsauto.adapters.lora import add_adapter, lora_layers, remove_adapter, trainable_parameters
from rsauto.adapters.low_rank import cheaper_order, num_operations
from rsauto.base import prepare
from rsauto.memory.kinds import Prediction
from rsauto.memory.measure import PeakMeter
from rsauto.memory.methods import METHODS
from rsauto.memory.planner import MemoryPlanner
from rsauto.memory.product import mean_tokens, planned_order
from rsauto.records import ProductOrder, TrialSpec
from rsauto.search.setup import set_up
from rsauto.study_file import validate

ORDERS: tuple[ProductOrder, ...] = ("factors", "merged")
D_IN, D_OUT, RANK, SCALE = 6, 5, 3, 0.7

both_orders = pytest.mark.parametrize("order", ORDERS)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def spec_of(**changes: Any) -> TrialSpec:
    settings: dict[str, Any] = {
        "role": "search",
        "method": "rslora",
        "rank": 4,
        "alpha": 7,  # a factor that is no power of two, which would round nothing
        "scaling_rule": "rslora",
        "learning_rate": 1e-3,
    }
    return TrialSpec(**(settings | changes))


def tensors(*shape: int, dtype: torch.dtype = torch.float64, **changes: Any) -> list[Tensor | None]:
    """x, W, bias, A, B; W and bias are frozen."""
    settings = {"bias": True, "factors": dtype, "needs_x": True} | changes
    return [
        torch.randn(*shape, D_IN, dtype=dtype, requires_grad=settings["needs_x"]),
        torch.randn(D_OUT, D_IN, dtype=dtype),
        torch.randn(D_OUT, dtype=dtype) if settings["bias"] else None,
        torch.randn(RANK, D_IN, dtype=settings["factors"], requires_grad=True),
        torch.randn(D_OUT, RANK, dtype=settings["factors"], requires_grad=True),
    ]


def formula(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """As PEFT's layer computes it."""
    return (F.linear(x, weight, bias) + F.linear(F.linear(x.to(a.dtype), a), b) * SCALE).to(x.dtype)


def results(function: Callable[..., Tensor], given: list[Tensor | None]) -> list[Tensor]:
    """What a function gives, and the gradients of a curved function of that."""
    y = function(*given)
    wanted = [tensor for tensor in given if tensor is not None and tensor.requires_grad]
    return [y, *torch.autograd.grad(y.double().square().sum(), wanted)]


def in_order(order: ProductOrder) -> Callable[..., Tensor]:
    return lambda *given: adapted_linear(*given, SCALE, order)


# ------------------------------------------------------------ the function


@both_orders
@pytest.mark.parametrize("shape", [(7,), (2, 4), (2, 3, 4), (1,), (0,)])
@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"needs_x": False}], ids=str)
def test_values_and_gradients_are_those_of_the_formula(
    order: ProductOrder, shape: tuple[int, ...], changes: dict[str, Any]
) -> None:
    given = tensors(*shape, **changes)
    ours, plain = results(in_order(order), given), results(formula, given)
    assert len(ours) == (3 if "needs_x" in changes else 4)
    for one, other in zip(ours, plain, strict=True):
        assert one.stride() == other.stride()
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@both_orders
def test_gradients_are_those_of_differences(order: ProductOrder) -> None:
    assert torch.autograd.gradcheck(in_order(order), tensors(2, 4))


@both_orders
def test_of_a_transposed_weight_and_a_transposed_input(order: ProductOrder) -> None:
    x, weight, *others = tensors(4, 3)
    assert x is not None and weight is not None
    given = [x.detach().mT.contiguous().mT.requires_grad_(), weight.T.contiguous().T, *others]
    for one, other in zip(results(in_order(order), given), results(formula, given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@both_orders
def test_only_the_gradients_that_are_needed_are_made(order: ProductOrder) -> None:
    x, weight, bias, a, b = tensors(4)
    assert a is not None and b is not None
    for frozen, trained in ((a, b), (b, a)):
        frozen.requires_grad_(False)
        trained.requires_grad_()
        in_order(order)(x, weight, bias, a, b).sum().backward()
        assert frozen.grad is None and trained.grad is not None
        frozen.grad = trained.grad = None


@both_orders
@pytest.mark.parametrize(
    "base, factors",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
def test_every_pair_of_dtypes_is_as_close_to_the_truth_as_peft(
    order: ProductOrder, base: torch.dtype, factors: torch.dtype
) -> None:
    given = tensors(64, 8, dtype=base, factors=factors)
    exact = results(
        formula,
        [t if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in given],
    )
    for ours, theirs, truth in zip(
        results(in_order(order), given), results(formula, given), exact, strict=True
    ):
        assert ours.dtype == theirs.dtype
        error, allowed = ((t.double() - truth).norm() / truth.norm() for t in (ours, theirs))
        assert error <= 1.5 * allowed, (error, allowed)


def test_merged_is_for_one_dtype_of_at_least_32_bits() -> None:
    """A weight of half precision would lose what a small adapter adds to it."""
    for base, factors in ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)):
        given = tensors(4, dtype=base, factors=factors)
        ours, factored = (results(in_order(order), given) for order in ("merged", "factors"))
        assert all(torch.equal(one, other) for one, other in zip(ours, factored, strict=True))


@both_orders
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_nothing(order: ProductOrder, use_reentrant: bool) -> None:
    given = tensors(3, 4)

    def recomputed(*given: Tensor) -> Tensor:
        y = checkpoint(in_order(order), *given, use_reentrant=use_reentrant)
        assert isinstance(y, Tensor)
        return y

    function = results if not use_reentrant else _results_by_backward
    for one, other in zip(
        function(recomputed, given), results(in_order(order), given), strict=True
    ):
        assert torch.equal(one, other)


def _results_by_backward(
    function: Callable[..., Tensor], given: list[Tensor | None]
) -> list[Tensor]:
    """Reentrant checkpoints allow nothing else."""
    y = function(*given)
    y.square().sum().backward()
    return [y, *(t.grad for t in given if t is not None and t.grad is not None)]


@both_orders
def test_a_model_may_write_into_the_result(order: ProductOrder) -> None:
    given = tensors(2, 3)

    def doubled(*given: Tensor) -> Tensor:
        return in_order(order)(*given).mul_(2)

    ours, plain = results(doubled, given), results(lambda *g: formula(*g) * 2, given)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_second_derivative_is_refused_not_wrong() -> None:
    given = tensors(3)
    (grad,) = torch.autograd.grad(
        in_order("factors")(*given).square().sum(), given[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ------------------------------------------------------------ operations


@both_orders
@pytest.mark.parametrize(
    "tokens, d_in, d_out, rank", [(40, 6, 5, 3), (8, 16, 32, 16), (1, 4, 4, 1)]
)
def test_operations_are_those_that_torch_counts(
    order: ProductOrder, tokens: int, d_in: int, d_out: int, rank: int
) -> None:
    x = torch.randn(tokens, d_in, requires_grad=True)
    weight = torch.randn(d_out, d_in)
    a, b = (torch.randn(*shape, requires_grad=True) for shape in ((rank, d_in), (d_out, rank)))
    with FlopCounterMode(display=False) as counter:
        adapted_linear(x, weight, None, a, b, SCALE, order).sum().backward()
    of_the_base = 2 * 2 * tokens * d_in * d_out
    counted = counter.get_total_flops() - of_the_base
    assert counted == num_operations(order, tokens, d_in, d_out, rank)


def test_the_cheaper_order_turns_where_the_closed_form_says() -> None:
    """Square layers of width d and T tokens: 12 T r d = 8 d^2 r + 2 T d^2."""
    width, tokens = 128, 400
    turn = 2 * tokens * width / (12 * tokens - 8 * width)
    shapes = [(width, width)] * 3
    assert 27 < turn < 28
    assert cheaper_order(shapes, tokens, 27) == "factors"
    assert cheaper_order(shapes, tokens, 28) == "merged"
    few = 8 * width // 12  # the sum of the weights alone costs more, whatever the rank
    assert cheaper_order(shapes, few, 10**6) == "factors"


def test_all_layers_together_choose_one_order() -> None:
    wide, narrow = (128, 512), (32, 32)
    assert cheaper_order([wide], 400, 16) == "factors"
    assert cheaper_order([narrow], 400, 16) == "merged"
    assert cheaper_order([narrow, wide], 400, 16) == "factors"
    assert cheaper_order([narrow] * 100 + [wide], 400, 16) == "merged"


# ------------------------------------------------------------ models


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    model = GPT2LMHeadModel(config)
    prepare(model, gradient_checkpointing=False)
    return model


@pytest.fixture(params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, llama: LlamaForCausalLM) -> nn.Module:
    return llama if request.param == "llama" else gpt2()


def adapted_to(model: nn.Module, *, fused: bool = True, **changes: Any) -> PeftModel:
    """A copy with an adapter; each such adapter starts with the same numbers."""
    torch.manual_seed(3)
    return add_adapter(copy.deepcopy(model), spec_of(**changes), fused=fused)


def adapted(model: nn.Module, dtype: torch.dtype = torch.float32, **changes: Any) -> PeftModel:
    """All in one dtype."""
    return adapted_to(model, **changes).to(dtype)


def with_values(model: PeftModel) -> PeftModel:
    """B is zero at the start, and an adapter that does nothing proves nothing."""
    torch.manual_seed(4)
    with torch.no_grad():
        for layer in lora_layers(model):
            layer.lora_B["default"].weight.normal_(std=0.1)
    return model.eval()


def batches(number: int, length: int = 12) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    for _ in range(number):
        ids = torch.randint(0, 64, (4, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, length // 2 :] = 0
        yield {"input_ids": ids, "attention_mask": mask}


def loss_of(model: PeftModel, batch: dict[str, Tensor]) -> Tensor:
    logits = model(**batch).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


def trained(model: PeftModel, steps: int = 10, learning_rate: float = 1e-3) -> list[float]:
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=learning_rate)
    losses = []
    model.train()
    for batch in batches(steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@both_orders
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_ten_steps_are_those_of_stock_peft(
    base: nn.Module, order: ProductOrder, dtype: torch.dtype, tolerance: float
) -> None:
    ours, stock = adapted(base, dtype, product_order=order), adapted(base, dtype, fused=False)
    assert {type(layer) for layer in lora_layers(ours)} == {FusedLoraLinear}
    assert not any(isinstance(layer, FusedLoraLinear) for layer in lora_layers(stock))
    mine, theirs = trained(ours), trained(stock)
    assert mine == pytest.approx(theirs, rel=0, abs=tolerance)
    assert theirs[-1] != theirs[0]
    assert with_logits(ours).sub(with_logits(stock)).abs().max() < 10 * tolerance


def with_logits(model: PeftModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(**next(batches(1))).logits
    return logits


@both_orders
def test_gradients_of_a_frozen_start_are_those_of_stock_peft(
    base: nn.Module, order: ProductOrder
) -> None:
    found = []
    for changes in ({"product_order": order}, {"fused": False}):
        model = with_values(adapted(base, torch.float64, **changes))
        loss_of(model, next(batches(1))).backward()
        found.append({name: p.grad for name, p in trainable_parameters(model).items()})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_of_a_model(llama: LlamaForCausalLM, use_reentrant: bool) -> None:
    plain = trained(adapted(llama))
    prepare(llama, gradient_checkpointing=True, use_reentrant=use_reentrant)
    assert trained(adapted(llama)) == plain


def test_a_bf16_base_under_float32_adapters_learns_as_in_stock_peft(base: nn.Module) -> None:
    base.to(torch.bfloat16)
    ours, stock = adapted_to(base), adapted_to(base, fused=False)
    assert {p.dtype for p in trainable_parameters(ours).values()} == {torch.float32}
    assert trained(ours) == pytest.approx(trained(stock), rel=1e-2)  # logits have 8 bits


def test_names_repr_and_removal_are_those_of_peft(base: nn.Module) -> None:
    ours, stock = adapted(base), adapted(base, fused=False)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert repr(ours) == repr(stock)
    before = base.state_dict()
    removed = remove_adapter(ours)
    assert type(removed) is type(base) and repr(removed) == repr(base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in removed.state_dict().items())


@both_orders
def test_merging_and_unmerging_keep_what_the_model_computes(
    base: nn.Module, order: ProductOrder
) -> None:
    model = with_values(adapted(base, torch.float64, product_order=order))
    expected = with_logits(model)
    untouched = with_logits(with_values(adapted(base, torch.float64))), expected
    assert untouched[0].sub(untouched[1]).abs().max() < 1e-6
    for change in (model.merge_adapter, model.unmerge_adapter):
        change()
        torch.testing.assert_close(with_logits(model), expected, rtol=0, atol=1e-6)
    with model.disable_adapter():
        assert with_logits(model).sub(expected).abs().max() > 1e-3


def test_a_saved_adapter_is_one_of_stock_peft(base: nn.Module, tmp_path: Path) -> None:
    model = adapted(base, product_order="merged")
    trained(model, learning_rate=1e-2)
    expected = with_logits(model)
    model.save_pretrained(tmp_path / "as it is")
    export_lora(model, tmp_path / "exported", base_name="base", card="")
    factor = next(lora_layers(model)).scaling["default"]
    for folder, scale in (("as it is", 7 / 4**0.5), ("exported", 1.0)):
        assert "rsauto" not in (tmp_path / folder / "adapter_config.json").read_text()
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder)
        assert not any(isinstance(layer, FusedLoraLinear) for layer in lora_layers(loaded))
        assert next(lora_layers(loaded)).scaling["default"] == pytest.approx(scale)
        torch.testing.assert_close(with_logits(loaded), expected, rtol=0, atol=1e-5)
    assert factor == pytest.approx(7 / 4**0.5)


# ------------------------------------------------------------ PEFT's own way


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every product that is computed as one operation."""
    found: list[str] = []

    def counted(*given: Any) -> Tensor:
        found.append("fused")
        return adapted_linear(*given)

    monkeypatch.setattr(fused, "adapted_linear", counted)
    return found


NUM_LAYERS = {"LlamaForCausalLM": 14, "GPT2LMHeadModel": 8}


def test_every_plain_layer_is_one_operation(base: nn.Module, calls: list[str]) -> None:
    with_logits(adapted(base))
    assert len(calls) == NUM_LAYERS[type(base).__name__]


@pytest.mark.parametrize(
    "options", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}], ids=str
)
def test_adapters_that_are_more_than_a_product_go_peft_s_way(
    llama: LlamaForCausalLM, calls: list[str], options: dict[str, Any]
) -> None:
    outputs = []
    for is_fused in (True, False):
        torch.manual_seed(3)
        model = add_adapter(copy.deepcopy(llama), spec_of(), fused=is_fused, **options)
        with_values(model).train()
        torch.manual_seed(6)
        outputs.append(model(**next(batches(1))).logits)
    assert not calls
    assert torch.equal(*outputs)


def _under_autocast(model: PeftModel) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return with_logits(model)


def _disabled(model: PeftModel) -> Tensor:
    with model.disable_adapter():
        return with_logits(model)


def _merged(model: PeftModel) -> Tensor:
    model.merge_adapter()
    return with_logits(model)


def _of_several_adapters(model: PeftModel) -> Tensor:
    with torch.no_grad():
        batch = {**next(batches(1)), "adapter_names": ["default", "__base__"] * 2}
        logits: Tensor = model.eval()(**batch).logits
    return logits


def _with_two_active(model: PeftModel) -> Tensor:
    torch.manual_seed(7)
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    return with_logits(model)


def _with_a_trained_base(model: PeftModel) -> Tensor:
    for layer in lora_layers(model):
        layer.get_base_layer().weight.requires_grad_()
    return with_logits(model)


def _with_hooks(where: str) -> Callable[[PeftModel], Tensor]:
    def run(model: PeftModel) -> Tensor:
        for layer in lora_layers(model):
            part = layer.get_base_layer() if where == "base" else layer.lora_A["default"]
            part.register_forward_hook(lambda _module, _inputs, out: 2 * out)
        return with_logits(model)

    return run


def _with_a_forward_of_its_own(model: PeftModel) -> Tensor:
    for layer in lora_layers(model):
        linear = layer.get_base_layer()
        linear.forward = lambda x, plain=linear.forward: 2 * plain(x)
    return with_logits(model)


@pytest.mark.parametrize(
    "run",
    [
        _under_autocast,
        _disabled,
        _merged,
        _of_several_adapters,
        _with_two_active,
        _with_a_trained_base,
        _with_hooks("base"),
        _with_hooks("lora_A"),
        _with_a_forward_of_its_own,
    ],
)
def test_what_is_not_one_plain_product_goes_peft_s_way(
    llama: LlamaForCausalLM, calls: list[str], run: Callable[[PeftModel], Tensor]
) -> None:
    ours, theirs = (run(with_values(adapted(llama, fused=f))) for f in (True, False))
    assert not calls
    assert torch.equal(ours, theirs)


def test_an_input_without_batch_goes_peft_s_way(llama: LlamaForCausalLM, calls: list[str]) -> None:
    layer: Any = next(lora_layers(adapted(llama)))
    assert layer(torch.randn(32)).shape == (32,)
    assert not calls
    layer(torch.randn(1, 32))
    assert len(calls) == 1


def test_an_adapter_that_joins_and_stays_inactive_changes_nothing(
    llama: LlamaForCausalLM, calls: list[str]
) -> None:
    model = with_values(adapted(llama))
    expected = with_logits(model)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    assert torch.equal(with_logits(model), expected)
    assert len(calls) == 2 * NUM_LAYERS["LlamaForCausalLM"]


# ------------------------------------------------------------ memory


def step_peak(model: PeftModel) -> int:
    """Bytes at the peak of a training step, as the CPU's allocator tells."""
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), fused=True)
    meter = PeakMeter(torch.device("cpu"), model, optimizer)
    first, second = batches(2, length=48)
    for batch, is_watched in ((first, False), (second, True)):
        with meter.watch(is_watched):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert meter.peak_bytes is not None
    return meter.peak_bytes


@pytest.mark.parametrize("dtype, share", [(torch.float32, 1.0), (torch.bfloat16, 0.9)])
def test_a_step_needs_less_memory_than_with_stock_peft(
    base: nn.Module, dtype: torch.dtype, share: float
) -> None:
    base.to(dtype)
    ours, stock = (step_peak(adapted_to(base, fused=f).train()) for f in (True, False))
    assert ours < share * stock


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_checkpointing": True}, {"accumulate": True}, {"dtype": "bfloat16"}],
    ids=str,
)
@pytest.mark.sample(4)
def test_the_merged_order_is_predicted_to_the_byte(name: str, changes: dict[str, Any]) -> None:
    merged = require_equal(step_of(name, LM, product_order="merged", **changes), PADDED)
    factors = require_equal(step_of(name, LM, **changes), PADDED)
    assert (merged != factors) == ("dtype" not in changes)


def test_predictions_are_those_of_the_fused_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock ones keep their inputs in the adapters' dtype, in which they are twice as large."""
    stock = replace(METHODS["lora"], adapt=partial(METHODS["lora"].adapt, fused=False))
    monkeypatch.setitem(METHODS, "stock", stock)
    size = PADDED._replace(train_length=36, eval_length=0)
    ours, theirs = (
        peak(require_equal(step_of("llama", LM, method=method, dtype="bfloat16"), size))
        for method in ("lora", "stock")
    )
    assert ours < 0.95 * theirs


# ------------------------------------------------------------ the order of a trial


def test_the_order_is_planned_by_the_layers_the_rank_and_the_tokens(
    llama: LlamaForCausalLM,
) -> None:
    kind = kind_of(llama.config)
    few, many = 8, 400
    assert planned_order(kind, 1, many) == "factors"
    assert planned_order(kind, 32, many) == "merged"
    assert planned_order(kind, 32, few) == "factors"


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16"},
        {"adapter_dtype": "bfloat16"},
        {"dtype": "bfloat16", "adapter_dtype": "bfloat16"},
        {"autocast": "bfloat16"},
        {"quant_bits": 4},
        {"method": "adalora"},
        {"method": "dora"},
        {"lora_dropout": 0.1},
        {"rank_pattern": (("model.layers.0.self_attn.q_proj", 32),)},
    ],
    ids=str,
)
def test_what_cannot_be_merged_exactly_is_not(
    llama: LlamaForCausalLM, changes: dict[str, Any]
) -> None:
    assert planned_order(kind_of(llama.config, **changes), 32, 400) == "factors"


def test_a_study_plans_the_order_of_every_trial(tmp_path: Path) -> None:
    values = study_values(tmp_path, method=["rslora", "rsadalora"])
    setup = set_up(validate(values | {"memory_budget": "1GiB"}))
    low, high = (setup.space.middle(rank, "rslora") for rank in (2, 256))
    found = setup.predict(high)
    settings = {"batch_size": 4, "micro_batch_size": 4}
    assert found == setup.planner.predict(256, **settings, product_order="merged")
    for spec in (low, setup.space.middle(256, "rsadalora")):
        prediction = setup.predict(spec)
        assert prediction is not None and prediction.product_order == "factors"
    assert found is not None and found.micro_batch_size == 4
    spec = replace(high, product_order=found.product_order)
    layers: Any = lora_layers(add_adapter(setup.load_model().model, spec))
    assert {layer.product_order for layer in layers} == {"merged"}


def test_an_order_that_needs_more_than_the_budget_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = set_up(validate(study_values(tmp_path) | {"memory_budget": "1GiB"}))
    spec = setup.space.middle(16, "rslora")
    prediction = setup.predict(spec)
    assert prediction is not None and prediction.product_order == "merged"

    def needed_bytes(_: MemoryPlanner, prediction: Prediction) -> int:
        return setup.memory_budget_bytes + (prediction.product_order == "merged")

    monkeypatch.setattr(MemoryPlanner, "needed_bytes", needed_bytes)
    prediction = setup.predict(spec)
    assert prediction is not None and prediction.product_order == "factors"


def test_tokens_of_a_micro_batch_count_its_padding() -> None:
    assert mean_tokens([10], 8, 8) == 80
    assert mean_tokens([10], 8, 2) == 20
    lengths = [4] * 50 + [12] * 50
    whole, halves, single = (mean_tokens(lengths, 8, size) for size in (8, 4, 1))
    assert 90 < whole <= 96  # a batch of eight short rows is rare
    assert whole > 2 * halves > 8 * single  # rows of like length are together
    assert single == pytest.approx(8, abs=1)


def test_a_spec_from_before_there_were_orders_is_read() -> None:
    written = spec_of(product_order="merged").to_json()
    assert TrialSpec.from_json(written).product_order == "merged"
    del written["product_order"]
    assert TrialSpec.from_json(written).product_order == "factors"


def test_the_order_is_no_part_of_the_configuration() -> None:
    one, other = spec_of(), spec_of(product_order="merged")
    assert one.configuration() == other.configuration()
