"""Where a parameter's uses are seen: while a module is observed, reading a trainable parameter through it gives a `Tap`.

A tap is a tensor subclass that stands for the parameter (or a view of it). Every torch function that consumes one comes
to `Tap.__torch_function__`, which hands it to that function's rule. A function without a rule runs as it is where its
result carries no gradient (sizes, dtypes, comparisons); where it does, it is refused by name, or, where the Meter was
made with ``on_unsupported="vmap"``, left to `gradnorm_ext.layers.unruled`.

A module is observed by giving it, for the time of one block, a subclass of its own class with another `__getattr__`
(and a `__call__` that shows the block the model's inputs).
Outside observe blocks a model is exactly what it was.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gradnorm_ext.layers.callsites import call_site
from gradnorm_ext.layers.layouts import Layout
from gradnorm_ext.layers.observation import Observation, Slot, Use

_SESSION = "_gradnorm_observation"


@dataclass(frozen=True)
class LookedUp:
    """Rows of a table that all examples share: the ids, the row without a gradient, and the values.

    ``order``: once the rows were rearranged, where each entry was before.
    """

    ids: Tensor
    padding_idx: int | None
    rows: Tensor
    table: Tensor
    order: Tensor | None = None

    def rearranged(self, rows: Tensor, how: Callable[[Tensor], Tensor]) -> LookedUp:
        order = self.order
        if order is None:
            order = torch.arange(self.rows.numel(), device=rows.device).view(self.rows.shape)
        return replace(self, rows=rows, order=how(order))

    def rows_of(self, gradient: Tensor) -> Tensor:
        """``[B, ids, width]`` of a gradient per example, ``[B, *rows.shape]``."""
        entries = self.ids.numel() * self.table.shape[1]
        if self.order is not None:
            flat = gradient.new_zeros(len(gradient), entries)
            gradient = flat.index_add_(1, self.order.reshape(-1), gradient.reshape(len(gradient), -1))
        return gradient.reshape(len(gradient), self.ids.numel(), -1)


class Tap(Tensor):
    """A parameter, or a view of it, whose consuming functions are seen; of a parameter, there is one in a block.

    The tap of a parameter answers as the parameter does: to ``isinstance``, with its attributes, to copies.
    """

    observation: Observation
    slot: Slot
    value: Tensor
    views: tuple[str, ...]
    path: tuple[Callable[[Tensor], Tensor], ...]  # from the parameter to the value, view by view
    others: tuple[Slot, ...]  # further parameters that the value was derived from
    looked_up: LookedUp | None
    derived_by: str  # the function of parameters that no rule knows, of which this is the result
    rules: ClassVar[dict[Callable[..., Any], Callable[..., Any]]] = {}  # filled by `rules`, as is the next
    modules: ClassVar[dict[Callable[..., Any], Callable[..., Any]]] = {}  # forwards of modules that need no taps
    modules_with: ClassVar[dict[str, Callable[..., Any]]] = {}  # the same, for classes that have an attribute
    unruled: ClassVar[Callable[..., Any]]  # what becomes of a function without a rule

    @staticmethod
    def of(
        observation: Observation,
        slot: Slot,
        value: Tensor,
        views: tuple[str, ...] = (),
        others: tuple[Slot, ...] = (),
        path: tuple[Callable[[Tensor], Tensor], ...] = (),
        looked_up: LookedUp | None = None,
        derived_by: str = "",
    ) -> Tap:
        tap: Tap
        if observation.traces:
            tap = Tensor._make_wrapper_subclass(_TracedTap, value.shape, dtype=value.dtype, device=value.device)
        else:
            with torch._C.DisableTorchFunctionSubclass():
                tap = _Unseen.apply(value, observation, slot).as_subclass(Tap)
        vars(tap).update(
            observation=observation,
            slot=slot,
            value=value,
            views=views,
            others=others,
            path=path,
            looked_up=looked_up,
            derived_by=derived_by,
        )
        return tap

    @staticmethod
    def of_parameter(observation: Observation, slot: Slot, parameter: Tensor) -> Tap:
        """The tap of a parameter itself, the same one whenever it is read."""
        tap = observation.taps.get(id(parameter))
        if tap is None:
            tap = observation.taps[id(parameter)] = Tap.of(observation, slot, parameter)
            if taken := sorted(vars(parameter).keys() & _own_names()):
                raise RuntimeError(
                    f"{observation.who}: attributes of a trainable parameter must not be called as those that it is observed "
                    f"with, got {', '.join(taken)} on {slot.name}; rename them"
                )
        return tap

    @property
    def is_parameter(self) -> bool:
        """Whether this stands for the parameter itself, in place of a view or function of it."""
        return not self.path and self.looked_up is None and not self.views

    @property
    def is_derived(self) -> bool:
        """Whether this is a function of parameters, in place of a parameter or its view."""
        return "derived" in self.views

    @property
    def is_unmeasurable(self) -> bool:
        """Whether this is such a function where these are not differentiated: nothing may consume it for a gradient."""
        return self.is_derived and not self.observation.derives

    def is_met_by_constant(self, x: Tensor) -> bool:
        """Whether this is a derived parameter and ``x`` not known to be data: then the result is one, too."""
        return self.is_derived and not self.observation.is_data(x)

    def viewed(self, how: Callable[[Tensor], Tensor], view: str, value: Tensor | None = None) -> Tap:
        """The tap of a view of this one, or of a cast or a shift, whose gradient has the same norm.

        ``value``: what ``how`` makes of this one's, where it is there already.
        """
        value = how(self.value) if value is None else value
        if value is self.value:
            return self
        views, path, looked_up = self.views, self.path, self.looked_up
        if looked_up is not None:
            looked_up = replace(looked_up, rows=value.detach())
        elif not (view == "cast" and value.dtype == self.value.dtype):
            views, path = (*views, view), (*path, how)
        return Tap.of(self.observation, self.slot, value, views, self.others, path, looked_up, self.derived_by)

    def looked_up_rows(self, rows: Tensor, ids: Tensor, padding_idx: int | None) -> Tap:
        """The tap of rows looked up in this table, the same ones for every example."""
        looked_up = LookedUp(ids, padding_idx, rows.detach(), self.value)
        return Tap.of(self.observation, self.slot, rows, self.views, self.others, self.path, looked_up, self.derived_by)

    def rearranged(self, value: Tensor, how: Callable[[Tensor], Tensor]) -> Tap:
        """The tap of a view of rows that all examples share; ``how`` does to any tensor what was done to them."""
        assert self.looked_up is not None
        looked_up = self.looked_up.rearranged(value.detach(), how)
        return Tap.of(
            self.observation, self.slot, value, self.views, self.others, self.path, looked_up, self.derived_by
        )

    def use(self, function: str, layout: Layout, *, sums: bool = False) -> Use:
        """Write down that a function consumes this tap; ``sums``: its gradient is a `PerSampleGrads`."""
        if self.is_unmeasurable or ("curved" in self.views and not sums):
            raise self.refusal(function if self.is_unmeasurable else f"{function} (of a function of it)")
        if self.observation.closed:
            raise RuntimeError(
                f"{self.observation.who}: a parameter must be read in the block that uses it, got {self.slot.name} of a block "
                f"that has closed at {function}{call_site()}; read it through its module again"
            )
        shared = self.looked_up is not None
        value = self.looked_up.table if self.looked_up is not None else self.value
        use = self.observation.use(self.slot, value, self.views, function, layout, shared=shared, others=self.others)
        use.path = self.path
        return use

    def refusal(self, function: str, *met: Any) -> RuntimeError:
        """The error for a function that no rule knows; ``met``: what else it was given."""
        shapes = ", ".join(str(list(one.shape)) for one in met if isinstance(one, Tensor))
        others = f" with {shapes}" if shapes else ""
        which = f"{function} of {self.slot.name} {list(self.value.shape)}{others}, which is trainable"
        if self.derived_by:
            shape = list(self.slot.parameter.shape)
            which = f"{self.derived_by} of {self.slot.name} {shape}, which is trainable, in {function}{others}"
        return RuntimeError(
            f"{self.observation.who}: no rule for {which}{call_site()}; {self._advice}freeze it with requires_grad_(False), or "
            "write the layer with linear, embedding, layer_norm, rms_norm, addmm, matmul, mul, add or expand of the parameter "
            "and a tensor whose first dimension is the batch"
        )

    @property
    def _advice(self) -> str:
        if self.observation.derives:
            return ""
        return 'make the Meter with on_unsupported="vmap" to have such uses differentiated one example at a time, '

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = cls.rules.get(func) if torch.is_grad_enabled() else None
        if rule is not None:
            with torch._C.DisableTorchFunctionSubclass():
                result = _called_if_it_fits(rule, args, kwargs)
            if result is not NotImplemented:
                return result
        name = getattr(func, "__name__", str(func))
        if not torch.is_grad_enabled():
            return _called_plainly(func, args, kwargs)
        if roots := _roots(func, args, kwargs):
            raise roots[0].refusal(name)
        if _is_in_place(name) and isinstance(args[0], Tensor) and not isinstance(args[0], Tap):
            return _write(func, name, args, kwargs)
        return cls.unlisted(func, name, args, kwargs)

    @classmethod
    def unlisted(cls, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """What a function gives that no rule knows."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        taps = [leaf for leaf in leaves if isinstance(leaf, Tap)]
        met = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, Tap)]
        derives = taps[0].observation.derives
        before = _Before([leaf.value if isinstance(leaf, Tap) else leaf for leaf in leaves])
        with saving_themselves() if derives else contextlib.nullcontext():
            result = _called_plainly(func, args, kwargs)
        if before.written():
            raise taps[0].refusal(f"{name} (in place)", *met)
        if not before.follows(result, [tap.value for tap in taps]):
            return _same_taps(result, taps)
        if any(tap.looked_up is not None for tap in taps) or (met and not derives):
            raise taps[0].refusal(name, *met)
        # Of parameters alone: perhaps not for a gradient (DoRA, a norm that is logged), and refused where it is used.
        with torch._C.DisableTorchFunctionSubclass():
            return cls.unruled(func, name, leaves, spec, result)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """For ``isinstance``."""
        return type(self.value) if self.is_parameter else Tap

    def __getattr__(self, name: str) -> Any:
        if name in vars(self) or not self.is_parameter:
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        return getattr(self.value, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.value, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.value, name)

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self.value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.value.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self.value, memo)


@functools.cache
def _own_names() -> frozenset[str]:
    return frozenset(name for name in (*Tap.__annotations__, *vars(Tap)) if not name.startswith("__"))


_ROOTS = {Tensor.backward: "self", torch.autograd.backward: "tensors", torch.autograd.grad: "outputs"}


def _roots(func: Any, args: Any, kwargs: Any) -> list[Tap]:
    """Functions of parameters that a backward starts from, which nothing would measure."""
    if func not in _ROOTS:
        return []
    return [leaf for leaf in pytree.tree_leaves(args[0] if args else kwargs[_ROOTS[func]]) if isinstance(leaf, Tap)]


def _called_plainly(func: Any, args: Any, kwargs: Any) -> Any:
    """The function of values, in place of taps."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    args, kwargs = pytree.tree_unflatten([leaf.value if isinstance(leaf, Tap) else leaf for leaf in leaves], spec)
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _is_in_place(name: str) -> bool:
    """Whether a function of this name writes to its first argument: ``lerp_``, ``__iadd__``, ``__setitem__``."""
    is_augmented = name.startswith("__i") and name[3:-2] in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
    return (name.endswith("_") and not name.endswith("__")) or is_augmented or name == "__setitem__"


def _write(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """What a function writes into an activation that no rule knows: what it gives of a copy, written over it."""

    def of_a_copy(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = x.clone()
        func(x, *args, **kwargs)
        return x

    written = Tap.unlisted(of_a_copy, name, args, kwargs)
    if isinstance(written, Tap):
        raise written.refusal(f"{name} (in place)", args[0])
    with torch._C.DisableTorchFunctionSubclass():
        args[0].copy_(written)
    return None if name == "__setitem__" else args[0]


class _Before:
    """What was before a function was called, to tell afterwards what it wrote and what its results depend on."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.tensors = [one for one in values if isinstance(one, Tensor) and not one.is_inference()]
        self.versions = [one._version for one in self.tensors]
        self.nodes = [get_gradient_edge(one).node if one.requires_grad else None for one in self.tensors]

    def written(self) -> bool:
        """Whether a tensor with gradients was written to."""
        return any(
            one.requires_grad and one._version != version
            for one, version in zip(self.tensors, self.versions, strict=True)
        )

    def follows(self, result: Any, parameters: Sequence[Tensor]) -> bool:
        """Whether a gradient goes from something in the result to one of these."""
        ends = {node for one, node in zip(self.tensors, self.nodes, strict=True) if any(one is p for p in parameters)}
        waiting: list[Node | None] = [
            one.grad_fn
            for one in pytree.tree_leaves(result)
            if isinstance(one, Tensor) and one.grad_fn is not None and not any(one is known for known in self.tensors)
        ]
        known: set[Any] = set(self.nodes)
        while waiting:
            node = waiting.pop()
            if node in ends:
                return True
            if node is not None and node not in known:
                known.add(node)
                waiting += [following for following, _ in node.next_functions]
        return False


def _same_taps(result: Any, taps: Sequence[Tap]) -> Any:
    """A result in which taps' values are these taps: a function may return what it was given."""
    if isinstance(result, Tensor):
        return next((tap for tap in taps if tap.value is result), result)
    if isinstance(result, (tuple, list, dict)):
        return pytree.tree_map(lambda leaf: _same_taps(leaf, taps) if isinstance(leaf, Tensor) else leaf, result)
    return result


def _called_if_it_fits(rule: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What a rule says of a call; NotImplemented where it does not know an argument by its name."""
    try:
        return rule(*args, **kwargs)
    except TypeError:
        try:
            inspect.signature(rule).bind(*args, **kwargs)
        except TypeError:
            return NotImplemented
        raise


class _Unseen(torch.autograd.Function):
    """What a tap itself leads to: whatever consumes its entries, in place of its value's, was seen by no rule."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, observation: Observation, slot: Slot) -> Tensor:
        ctx.observation, ctx.slot = observation, slot
        return value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        ctx.observation.failures.append(
            f"{ctx.slot.name} got a gradient from a use that was not seen: a custom autograd.Function, a torch.jit.script "
            "function or compiled code, which look past tensor subclasses, was given it"
        )
        return g, None, None


class _TracedTap(Tap):
    """A tap in a compiler's trace, whose tensors cannot be of our class: one without entries beside its value."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{func} of a tap")


def saving_themselves() -> Any:
    """For graphs that are gone through when the block closes, after which a checkpoint would not compute them again."""
    return torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@functools.cache
def _observed_class(base: Any) -> type:
    # What is compiled is observed as a graph (`compiled`); a compiler must see the modules as they were.
    def __getattr__(self: nn.Module, name: str) -> Any:
        value = base.__getattr__(self, name)
        if torch.compiler.is_compiling():
            return value
        observation: Observation | None = self.__dict__.get(_SESSION)
        if observation is None or not isinstance(value, nn.Parameter):
            return value
        if not value.requires_grad:
            observation.sources.look_at_frozen(value)
            return value
        if not torch.is_grad_enabled():
            return value
        if (tap := observation.taps.get(id(value))) is not None:
            return tap
        if (slot := observation.slot_of(self, name, value)) is not None:
            if hasattr(value, "device_mesh"):
                raise observation.split_read(slot, self)
            if type(value) is not nn.Parameter and is_traceable_wrapper_subclass(value):
                raise observation.wrapped_read(slot, value)
            return Tap.of_parameter(observation, slot, value)
        return value

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return base.__call__(self, *args, **kwargs)
        observation: Observation | None = self.__dict__.get(_SESSION)
        if observation is not None and torch.is_grad_enabled():
            return observation.call(base.__call__, self, args, kwargs)
        return base.__call__(self, *args, **kwargs)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        return _unobserved, (base, {key: value for key, value in self.__dict__.items() if key != _SESSION})

    members = {
        "__getattr__": __getattr__,
        "__call__": __call__,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_gradnorm_base": base,
    }
    rule = Tap.modules.get(base.forward)
    for attribute, of_any in Tap.modules_with.items():
        rule = of_any if hasattr(base, attribute) else rule
    if rule is not None:

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return base.forward(self, *args, **kwargs)
            observation: Observation | None = self.__dict__.get(_SESSION)
            result = NotImplemented
            if observation is not None and torch.is_grad_enabled():
                result = rule(observation, self, *args, **kwargs)
            return base.forward(self, *args, **kwargs) if result is NotImplemented else result

        members["forward"] = forward
    return type(base.__name__, (base,), members)


def _unobserved(base: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    """A copy made or unpickled in the middle of a block is an ordinary module."""
    module = base.__new__(base)
    module.__setstate__(state)
    return module


def _set_class(module: nn.Module, own: type) -> None:
    object.__setattr__(module, "__class__", own)  # modules look long at what is set on them


def observe_modules(modules: Sequence[tuple[str, nn.Module]], observation: Observation) -> None:
    """Make every read of a trainable parameter through these modules (of one model, itself first) a tap."""
    # What DDP wraps is the model: its own backward queues a reduction that no test may start.
    modules = [one for one in modules if not isinstance(one[1], nn.parallel.DistributedDataParallel)]
    observation.modules = frozenset(id(module) for _, module in modules)
    for index, (name, module) in enumerate(modules):
        if _SESSION in module.__dict__:
            release_modules(modules, observation)
            raise RuntimeError(
                f"{observation.who}: a model is observed by one block at a time, got {name or type(module).__name__}, "
                "which another open observe block observes; close that one first, or use one Meter for both"
            )
        if isinstance(module, torch.jit.ScriptModule):
            if not any(parameter.requires_grad for parameter in module.parameters()):
                continue
            release_modules(modules, observation)
            raise RuntimeError(
                f"{observation.who}: modules with trainable parameters must be Python, got {name or 'the model'}, which "
                "torch.jit has compiled: it reads its parameters where no block sees it; observe the module that it was "
                "made of, or freeze it"
            )
        if module._backward_hooks and not module._is_full_backward_hook:
            release_modules(modules, observation)
            raise RuntimeError(
                f"{observation.who}: backward hooks of modules must be full ones, got register_backward_hook on "
                f"{name or type(module).__name__}, which sees what a node of the graph was given, another one in a block; "
                "use register_full_backward_hook"
            )
        has_parameters = any(parameter is not None for parameter in module._parameters.values())
        if index == 0 or observation.verify or has_parameters:
            module.__dict__[_SESSION] = observation
            own: Any = type(module)
            _set_class(module, _observed_class(own))


def release_modules(modules: Sequence[tuple[str, nn.Module]], observation: Observation) -> None:
    """Give the modules their own classes back."""
    for _, module in modules:
        if module.__dict__.get(_SESSION) is observation:
            del module.__dict__[_SESSION]
            _set_class(module, vars(type(module))["_gradnorm_base"])
