"""Where the data of a block comes from: what the model was called with, what was made of it, and what is constant.

A tensor without a gradient is told by its memory: it is an argument of the model, a view of one, a buffer or a frozen
parameter. In a block that verifies, `Derivations` follows further what functions make of the model's arguments.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradnorm_ext.layers.layouts import Examples, Kind

DERIVED = "derived"  # the source of data that is no argument of the model


@dataclasses.dataclass(frozen=True)
class Argument:
    """A tensor that the model was called with and that shows the batch.

    Attributes:
        name: the argument, as the caller wrote it.
        step: the stride of its batch dimension; None where rows are packed.
        first, last: where its entries lie in their memory, which arguments may share.
    """

    name: str
    step: int | None
    first: int
    last: int

    @staticmethod
    def of(name: str, tensor: Tensor, step: int | None) -> Argument:
        first = int(tensor.storage_offset())
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return Argument(name, step, first, first + reach)

    def kind_of(self, tensor: Tensor, kind: Kind, count: int) -> Kind | None:
        """How rows of a view of it lie, where its strides say so: 'leading' and 'second' look alike where T == B."""
        if self.step is None or kind == "packed":
            return kind if self.step is None and kind == "packed" else None
        if tensor.dim() == 0:
            return None
        if kind in ("leading", "second"):
            if tensor.stride(0) == self.step and tensor.shape[0] == count:
                return "leading"
            return "second" if tensor.dim() > 1 and tensor.stride(1) == self.step and tensor.shape[1] == count else None
        rows_each = tensor.shape[0] // count
        return kind if kind == "flat" and tensor.stride(0) * rows_each == self.step else None


def memory_of(tensor: Tensor) -> int | None:
    """Where a tensor's entries lie; None of one that has none itself: a DTensor, or what a collective has yet to bring."""
    if hasattr(tensor, "device_mesh"):
        return None
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # torch's, of wrappers without a storage
        return None


def tensors_in(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested arguments or results, by the way to each: dicts, sequences, dataclasses, outputs of transformers."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from tensors_in(one, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for index, one in enumerate(value):
            yield from tensors_in(one, f"{name}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for each in dataclasses.fields(value):
            yield from tensors_in(getattr(value, each.name, None), f"{name}.{each.name}" if name else each.name)


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """The tensors that a module is called with, by the names of its arguments."""
    own = getattr(type(module), "_gradnorm_base", type(module))  # an observed module has another class
    names = _names_of(own.forward)
    found: list[tuple[str, Tensor]] = []
    for i, one in enumerate(args):
        found += tensors_in(one, names[i] if i < len(names) else f"input[{i}]")
    return [*found, *tensors_in(kwargs)]


@functools.cache
def _names_of(forward: Any) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return () if code is None else code.co_varnames[1 : code.co_argcount]


class Sources:
    """What is known of a block's data, by its memory."""

    def __init__(self, constants: Callable[[], frozenset[int]], gathers: bool) -> None:
        self.constants = functools.cache(constants)  # where the model's buffers and frozen parameters lie
        self.gathers = gathers  # frozen parameters lie elsewhere whenever they are whole (FSDP2)
        self.frozen: dict[int, Tensor] = {}
        self.data: set[int] = set()  # where the arguments of modules lie that carry no gradient
        self.arguments: dict[int, list[Argument]] = {}  # of the model, by their memory
        self.derived: dict[
            int, tuple[str, Tensor]
        ] = {}  # of an argument's name, row by row; kept, lest memory is used again
        self.reordered: dict[int, Tensor] = {}  # rows of an argument in another order
        self.rows_per_example: set[int] = set()  # of tensors that show the batch
        self.steady_nodes: set[Any] = set()  # that index within examples
        self.first: str | None = None  # the first argument that shows the batch
        self.argument_nodes: set[Any] = set()  # of arguments that carry a gradient

    def look_at_frozen(self, parameter: nn.Parameter) -> None:
        """Under FSDP2 a frozen parameter lies elsewhere whenever it is whole, which is when it is read."""
        if self.gathers and not hasattr(parameter, "device_mesh"):
            self.frozen[parameter.untyped_storage().data_ptr()] = parameter

    def look_at_data(self, args: tuple[Any, ...]) -> None:
        """What a module is given is no constant."""
        for one in args:
            if isinstance(one, Tensor) and not one.requires_grad and (where := memory_of(one)) is not None:
                self.data.add(where)

    def look_at_arguments(self, named: list[tuple[str, Tensor]], batch: Examples, *, of_model: bool) -> None:
        """Which of a call's arguments show the batch, and how many rows an example has there.

        ``of_model``: this is the caller's call, in the caller's order.
        """
        dim, count = batch.batch_dim, batch.count
        for name, one in named:
            packed = bool(batch.told(one.shape)) and batch.kind_of(one.shape, set()) == "packed"
            shows = one.dim() > dim and one.shape[dim] == count
            if shows:
                first = one.shape[1 - dim] if one.dim() > 1 else 1
                self.rows_per_example |= {first * math.prod(one.shape[2:end]) for end in range(2, one.dim() + 1)}
            if not (of_model and (shows or packed)):
                continue
            self.first = self.first or (name if shows or batch.packing is not None else None)
            if one.requires_grad:
                self.argument_nodes.add(torch.autograd.graph.get_gradient_edge(one).node)
            if (where := memory_of(one)) is not None:
                argument = Argument.of(name, one, None if packed else one.stride(dim))
                self.arguments.setdefault(where, []).append(argument)

    def argument_of(self, tensor: Tensor) -> Argument | None:
        """The model's argument that this is, or a view of."""
        if (where := memory_of(tensor)) is None or not (sharing := self.arguments.get(where)):
            return None
        place = tensor.storage_offset()
        return max((one for one in sharing if one.first <= place <= one.last), key=lambda one: one.first, default=None)

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether this is a buffer or a frozen parameter, which has no batch dimension whatever its sizes."""
        if (where := memory_of(tensor)) is None:
            return False
        gathered = self.frozen.get(where)
        return where in self.constants() or (
            gathered is not None and gathered.untyped_storage().data_ptr() == where  # else its memory is another's now
        )

    def is_data(self, tensor: Tensor) -> bool:
        """Whether this is known to be no constant: an activation, or an argument of the model or one of its modules."""
        return tensor.requires_grad or memory_of(tensor) in self.data

    def derivation_of(self, tensor: Tensor) -> str | None:
        """The argument whose rows this has, in their order; None: that is not known."""
        where = memory_of(tensor)
        found = None if where is None else self.derived.get(where)
        return None if found is None else found[0]

    def is_reordered(self, tensor: Tensor) -> bool:
        """Whether this is known to have an argument's rows in another order."""
        return memory_of(tensor) in self.reordered

    def following(self, batch: Examples) -> Derivations:
        """Follow the arguments through the functions of a block that verifies."""
        return Derivations(self, batch)


class Derivations(TorchFunctionMode):
    """While the model runs: what is made of its arguments without a gradient, and keeps their rows."""

    def __init__(self, sources: Sources, batch: Examples) -> None:
        super().__init__()
        self.sources, self.batch = sources, batch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        indexed = result if name == "__getitem__" else args[0] if name in _PUTTING and args else None
        if isinstance(indexed, Tensor) and indexed.requires_grad:
            if len(args) > 1 and not self._moves(args[1]) and indexed.grad_fn is not None:
                self.sources.steady_nodes.add(indexed.grad_fn)
        elif type(result) is Tensor and not result.requires_grad and result.dim() > 0:
            self._look_at(name, args, kwargs or {}, result)
        return result

    def _moves(self, index: Any) -> bool:
        """Whether an index takes rows from some examples to others."""
        index = tuple(index) if isinstance(index, (tuple, list)) else (index,)
        covered = 0
        for one in index:
            if one is Ellipsis or covered > self.batch.batch_dim:
                return False
            if isinstance(one, (Tensor, list)):
                return not self._is_every_example(index, torch.as_tensor(one))
            covered += one is not None
        return False

    def _is_every_example(self, index: tuple[Any, ...], first: Tensor) -> bool:
        """``h[arange(B), last]``: one place of every example, in order."""
        if len(index) < 2 or first.dtype == torch.bool or first.dim() == 0 or len(first) != self.batch.count:
            return False
        each = torch.arange(self.batch.count, device=first.device).view(-1, *[1] * (first.dim() - 1))
        return bool((first == each).all())

    def _look_at(self, name: str, args: Any, kwargs: dict[str, Any], result: Tensor) -> None:
        sources = self.sources
        first = next(iter(args), None) if args else next(iter(kwargs.values()), None)
        for one in (first,) if name in _PRODUCTS else (*args, *kwargs.values()):
            if not isinstance(one, Tensor) or one is result or one.requires_grad:
                continue
            found = sources.argument_of(one)
            source = sources.derivation_of(one) if found is None else found.name
            reordered = sources.is_reordered(one)
            if (source is None and not reordered) or (where := memory_of(result)) is None:
                continue
            if where == memory_of(one):  # a view, which its strides tell
                continue
            if reordered or (one is first and self._reorders(name, args, kwargs)):
                sources.reordered[where] = result
            elif source is not None and self._has_rows_of(one, result):
                sources.derived[where] = source, result
            return

    def _has_rows_of(self, one: Tensor, result: Tensor) -> bool:
        kind = self.batch.kind_of(one.shape, set())
        return kind in ("leading", "second", "packed") and kind == self.batch.kind_of(result.shape, set())

    def _reorders(self, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the function gives rows of its first argument another order or number."""
        if name == "__getitem__":
            return self._moves(args[1])
        if name in _ALONG_DIM:
            dim = kwargs.get("dim", next((a for a in args[1:] if isinstance(a, int)), None))
            return dim is None or dim in (0, self.batch.batch_dim)
        if name in ("flip", "roll"):
            given = kwargs.get("dims", args[-1] if len(args) > 1 + (name == "roll" and "shifts" not in kwargs) else ())
            dims = given if isinstance(given, (tuple, list)) else (given,)
            return not dims or any(dim in (0, self.batch.batch_dim) for dim in dims)
        return name in _MOVING


_PUTTING = {"__setitem__", "index_put", "index_put_"}
_PRODUCTS = {"matmul", "mm", "bmm", "addmm", "baddbmm", "linear", "__matmul__"}
_ALONG_DIM = {"gather", "index_select", "take_along_dim", "sort", "topk", "msort"}
_MOVING = {"masked_select", "take", "unique", "nonzero", "argsort", "repeat_interleave", "flipud"}


def calls_from(modules: frozenset[int]) -> bool:
    """Whether the running call comes from inside of one of these modules: then it is not the caller's."""
    frame: Any = sys._getframe(3)  # past this, the block and the module's own call
    while frame is not None:
        code = frame.f_code
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if id(first) in modules and getattr(getattr(type(first), code.co_name, None), "__code__", None) is code:
            return True
        frame = frame.f_back
    return False
