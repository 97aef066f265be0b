"""The base model's layers while several trials share it: one product of W, batched ones of A and B.

The rows of trial k lie side by side in every batch, so what a layer sees can be cut into trials
without moving anything. Samples never look at one another, so nothing else of the model changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from rsauto.adapters.low_rank import add_product, hidden_gradient
from rsauto.packing.rows import NotPackableError as NotPackableError
from rsauto.packing.stack import Stack
from rsauto.packing.tensors import Key


@dataclass(frozen=True, slots=True)
class Part:
    """The trials of one stack that take part in a batch, as one layer sees them."""

    stack: Stack
    count: int
    """How many trials, K."""
    a: Tensor
    """(K, r, d_in)"""
    b: Tensor
    """(K, d_out, r)"""
    scale: Tensor
    """gamma_r, (K, 1, 1)"""
    values: Tensor | None
    """AdaLoRA's lambda, (K, r, 1)."""
    unit: Tensor
    """Ones, (K, 1, 1)"""
    gradients: tuple[Tensor, ...]
    """Of A, B and lambda, where all trials of the stack take part; a choice is not trained."""

    def product_factors(self) -> tuple[Tensor, Tensor]:
        """What x is multiplied by, and its product: A and gamma_r, or gamma_r diag(lambda) Q."""
        if self.values is None:
            return self.a, self.scale
        return self.a * (self.values * self.scale).to(self.a.dtype), self.unit


class Seating:
    """Whose rows a batch holds: those of every trial of every stack, in order, equally many."""

    def __init__(self) -> None:
        self.stacks: list[Stack] = []
        self.num_rows = 0
        """Sequences in the batch, all trials together."""
        self.length = 0
        """Tokens of each."""
        self.counts: list[int] = []
        """Of every stack the trials that take part."""
        self.num_trials = 0
        self._sizes: list[int] = []
        """The counts that are not zero."""
        self._chosen: list[Tensor | None] = []
        self._parts: dict[str, list[Part]] = {}
        # Factors are no inputs of the layers' functions, so that gradients go where they belong
        # without a copy; this makes autograd ask for them all the same.
        self.anchor = nn.Parameter(torch.zeros(()))

    def seat(self, chosen: Sequence[Sequence[int]] | None = None) -> None:
        """Lets all trials take part, or of every stack the chosen rows only."""
        self._parts, self._chosen, self.counts = {}, [], []
        for index, stack in enumerate(self.stacks):
            rows = None if chosen is None else list(chosen[index])
            everyone = rows is None or rows == list(range(stack.size))
            self._chosen.append(None if everyone else torch.tensor(rows, device=stack.device))
            self.counts.append(stack.size if rows is None else len(rows))
        self.num_trials = sum(self.counts)
        self._sizes = [count for count in self.counts if count]

    def parts(self, layer: PackedLinear) -> list[Part]:
        """One for every stack of which somebody takes part."""
        if layer.name not in self._parts:
            self._parts[layer.name] = [
                _part(stack, rows, count, layer)
                for stack, rows, count in zip(self.stacks, self._chosen, self.counts, strict=True)
                if count
            ]
        return self._parts[layer.name]

    def chosen(self) -> Iterator[tuple[Stack, Tensor | None, int]]:
        """Every stack of which somebody takes part, which rows (None: all), and how many."""
        for stack, rows, count in zip(self.stacks, self._chosen, self.counts, strict=True):
            if count:
                yield stack, rows, count

    def cut(self, tensor: Tensor) -> Sequence[Tensor]:
        """A tensor (all rows, ..., d) as one (K, T, d) for every part."""
        of_trials = tensor.view(self.num_trials, -1, tensor.shape[-1])
        if len(self._sizes) == 1:
            return (of_trials,)
        pieces: Sequence[Tensor] = of_trials.split(self._sizes)
        return pieces


def _part(stack: Stack, rows: Tensor | None, count: int, layer: PackedLinear) -> Part:
    module = layer.name
    if module not in stack.modules:
        return _empty_part(stack, count, *layer.shape)
    names = ("A", "B", "E") if "lambda" in stack.groups else ("A", "B")
    tensors = [stack.view("values", Key(module, name)) for name in names]
    tensors.append(stack.scale[module])
    gradients: tuple[Tensor, ...] = ()
    if rows is None:
        gradients = tuple(stack.view("gradients", Key(module, name)) for name in names)
    else:
        tensors = [tensor.index_select(0, rows) for tensor in tensors]
    a, b, *values, scale = tensors
    unit = torch.ones_like(scale)
    return Part(stack, count, a, b, scale, values[0] if values else None, unit, gradients)


def _empty_part(stack: Stack, count: int, d_in: int, d_out: int) -> Part:
    """Of trials that do not adapt the layer, which others do: rank 0."""
    like = stack.groups["A"].values
    a, b = like.new_empty(count, 0, d_in), like.new_empty(count, d_out, 0)
    unit = like.new_ones(count, 1, 1)
    return Part(stack, count, a, b, unit, None, unit, (a, b))


class PackedLinear(nn.Module):
    """A linear layer with an adapter for every trial."""

    def __init__(self, base_layer: nn.Module, name: str, seating: Seating) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.seating = seating
        self.fuses = _is_plain(base_layer)
        self._is_transposed = isinstance(base_layer, Conv1D)

    def forward(self, x: Tensor) -> Tensor:
        """W x + gamma_r B A x, each trial's rows with its own factors."""
        self._require_rows(x)
        anchor = self.seating.anchor
        if self.fuses:
            y: Tensor = _Product.apply(x, anchor, self)  # type: ignore[no-untyped-call]
        else:
            base = self._base_of_each(x)
            y = _Addition.apply(base, x, anchor, self)  # type: ignore[no-untyped-call]
        return y

    @property
    def weight(self) -> Tensor:
        """As it is stored; some models ask a layer for its dtype."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    def matrix(self) -> Tensor:
        """W, (d_out, d_in)."""
        return self.weight.T if self._is_transposed else self.weight

    @property
    def shape(self) -> tuple[int, int]:
        """(d_in, d_out), also of weights that are stored in 4 bit."""
        layer = self.base_layer
        if isinstance(layer, nn.Linear):
            return layer.in_features, layer.out_features
        d_out, d_in = self.matrix().shape
        return d_in, d_out

    def _base_of_each(self, x: Tensor) -> Tensor:
        """W x by the base layer itself, one trial after the other where it looks at all rows."""
        if not _looks_at_all_rows(self.base_layer):
            return _apply(self.base_layer, x)
        return torch.cat(
            [_apply(self.base_layer, part) for part in x.chunk(self.seating.num_trials)]
        )

    def _require_rows(self, x: Tensor) -> None:
        seats = self.seating
        if len(x) != seats.num_rows and len(x) != seats.num_rows * seats.length:
            raise NotPackableError(
                f"{self.name} is given {tuple(x.shape)} where the batch has {seats.num_rows} rows "
                f"of {seats.length} tokens: its inputs are not one trial's after the other's"
            )


class _Product(torch.autograd.Function):
    """W x + b + s B A x of all trials; keeps x and h. Its gradients have none of their own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _anchor: Tensor, layer: PackedLinear) -> Tensor:
        x = x.contiguous()
        y = F.linear(x, layer.matrix(), layer.base_layer.bias)  # type: ignore[arg-type]
        ctx.layer = layer
        ctx.save_for_backward(x, *_add_all(layer, y, x))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        x, *hidden = ctx.saved_tensors
        grad = grad.contiguous()
        dx = grad.matmul(ctx.layer.matrix()) if ctx.needs_input_grad[0] else None
        _take_gradients(ctx.layer, grad, x, hidden, dx)
        return dx, None, None


class _Addition(torch.autograd.Function):
    """y + s B A x of all trials, where the base layer computes y in its own way."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, _anchor: Tensor, layer: PackedLinear) -> Tensor:
        x = x.contiguous()
        y = y.clone(memory_format=torch.contiguous_format)  # the layer may keep its own
        ctx.layer = layer
        ctx.save_for_backward(x, *_add_all(layer, y, x))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, *hidden = ctx.saved_tensors
        grad = grad.contiguous()
        dx = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        _take_gradients(ctx.layer, grad, x, hidden, dx)
        return grad, dx, None, None


def _add_all(layer: PackedLinear, y: Tensor, x: Tensor) -> list[Tensor]:
    """Adds every trial's product to y in place; the hidden tensors, one a part."""
    seats = layer.seating
    hidden = []
    for out, inputs, part in zip(seats.cut(y), seats.cut(x), seats.parts(layer), strict=True):
        a, scale = part.product_factors()
        hidden.append(add_product(out, inputs.to(a.dtype), a, part.b, scale))
    return hidden


def _take_gradients(
    layer: PackedLinear, grad: Tensor, x: Tensor, hidden: Sequence[Tensor], dx: Tensor | None
) -> None:
    """Adds the factors' gradients to the stacks', and those of x to ``dx``, in place."""
    seats = layer.seating
    of_inputs = [None] * len(hidden) if dx is None else seats.cut(dx)
    cuts = zip(seats.cut(grad), seats.cut(x), of_inputs, strict=True)
    for (g, inputs, of_input), h, part in zip(cuts, hidden, seats.parts(layer), strict=True):
        a, scale = part.product_factors()
        g, inputs = g.to(a.dtype), inputs.to(a.dtype)
        dh = hidden_gradient(g, part.b, scale)
        _add_to(part.gradients[1], g.mT, h)
        if part.values is None:
            _add_to(part.gradients[0], dh.mT, inputs)
        else:
            _take_triplets(part, torch.bmm(dh.mT, inputs))
        if of_input is not None:
            if of_input.dtype == dh.dtype:
                of_input.baddbmm_(dh, a)
            else:
                of_input.add_(torch.bmm(dh, a))


def _add_to(gradient: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds a product to a gradient, which is not contiguous: trials lie far apart.

    On a CPU the batched product needs a result that is, or else goes through its trials one by one.
    """
    if gradient.is_cuda:
        gradient.baddbmm_(left, right)
    else:
        gradient.add_(torch.bmm(left, right))


def _take_triplets(part: Part, dq: Tensor) -> None:
    """From the gradient of gamma_r diag(lambda) Q, (K, r, d_in), those of Q and of lambda."""
    assert part.values is not None
    da, _, de = part.gradients
    de.addcmul_(torch.linalg.vecdot(dq, part.a).unsqueeze(-1), part.scale)
    da.addcmul_(dq, part.values * part.scale)


class _Trained(torch.autograd.Function):
    """A tensor of all trials, whose gradient is added to the stack's."""

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.gradient.add_(grad)
        return None, None, None


class PackedHead(nn.Module):
    """A module of a classifier's head, trained whole by every trial."""

    def __init__(self, base_layer: nn.Module, name: str, seating: Seating) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.seating = seating

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The head's own forward pass with each trial's parameters, in float32."""
        seats = self.seating
        if len(x) != seats.num_rows:
            raise NotPackableError(f"{self.name} is given {tuple(x.shape)}, not one trial's rows")
        rows = x.float().unflatten(0, (seats.num_trials, -1))
        begin, found = 0, []
        for stack, chosen, count in seats.chosen():
            found.append(self._of(stack, chosen, rows[begin : begin + count], args, kwargs))
            begin += count
        return torch.cat(found).flatten(0, 1)

    def _of(self, stack: Stack, chosen: Tensor | None, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        def one(parameters: dict[str, Tensor], rows: Tensor) -> Tensor:
            result: Tensor = functional_call(
                self.base_layer, parameters, (rows, *args), kwargs, tie_weights=False
            )
            return result

        found: Tensor = torch.vmap(one)(self._parameters_of(stack, chosen), x)
        return found

    def _parameters_of(self, stack: Stack, chosen: Tensor | None) -> dict[str, Tensor]:
        found = {}
        for name, _ in self.base_layer.named_parameters():
            key = Key(self.name, name)
            values = stack.view("values", key)
            if chosen is None:
                gradient = stack.view("gradients", key)
                found[name] = _Trained.apply(self.seating.anchor, values, gradient)  # type: ignore[no-untyped-call]
            else:
                found[name] = values.index_select(0, chosen)
        return found


def _is_plain(layer: nn.Module) -> bool:
    """Whether W x + b is all that it computes, from a weight as it is stored."""
    forward = type(layer).forward
    plain = forward is nn.Linear.forward or forward is Conv1D.forward
    wrapped = layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__
    return plain and not wrapped and layer.get_parameter("weight").is_floating_point()


def _looks_at_all_rows(layer: nn.Module) -> bool:
    """LLM.int8 takes a column apart when any row of the batch has an outlier in it."""
    return type(layer).__name__ == "Linear8bitLt"


def _apply(layer: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = layer(x)
    return result
