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
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

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
    """A parameter, or a view of it, whose consuming functions are seen."""

    observation: Observation
    slot: Slot
    value: Tensor
    views: tuple[str, ...]
    path: tuple[Callable[[Tensor], Tensor], ...] = ()  # from the parameter to the value, view by view
    others: tuple[Slot, ...]  # further parameters that the value was derived from
    looked_up: LookedUp | None
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
    ) -> Tap:
        tap: Tap
        if observation.traces:
            tap = Tensor._make_wrapper_subclass(_TracedTap, value.shape, dtype=value.dtype, device=value.device)
        else:
            with torch._C.DisableTorchFunctionSubclass():
                tap = value.as_subclass(Tap)
        tap.observation, tap.slot, tap.value, tap.views, tap.looked_up = observation, slot, value, views, None
        tap.others = others
        return tap

    @property
    def is_derived(self) -> bool:
        """Whether this is a function of parameters, in place of a parameter or its view."""
        return "derived" in self.views

    @property
    def name(self) -> str:
        return self.slot.name

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
        tap = Tap.of(self.observation, self.slot, value, self.views, self.others)
        tap.path = self.path
        if self.looked_up is not None:
            tap.looked_up = replace(self.looked_up, rows=value.detach())
        elif not (view == "cast" and value.dtype == self.value.dtype):
            tap.views, tap.path = (*self.views, view), (*self.path, how)
        return tap

    def looked_up_rows(self, rows: Tensor, ids: Tensor, padding_idx: int | None) -> Tap:
        """The tap of rows looked up in this table, the same ones for every example."""
        tap = Tap.of(self.observation, self.slot, rows, self.views, self.others)
        tap.looked_up, tap.path = LookedUp(ids, padding_idx, rows.detach(), self.value), self.path
        return tap

    def rearranged(self, value: Tensor, how: Callable[[Tensor], Tensor]) -> Tap:
        """The tap of a view of rows that all examples share; ``how`` does to any tensor what was done to them."""
        assert self.looked_up is not None
        tap = Tap.of(self.observation, self.slot, value, self.views, self.others)
        tap.looked_up, tap.path = self.looked_up.rearranged(value.detach(), how), self.path
        return tap

    def use(self, function: str, layout: Layout, *, sums: bool = False) -> Use:
        """Write down that a function consumes this tap; ``sums``: its gradient is a `PerSampleGrads`."""
        if (self.is_derived and not self.observation.derives) or ("curved" in self.views and not sums):
            raise self.refusal(f"{function} (of a function of it)")
        shared = self.looked_up is not None
        value = self.looked_up.table if self.looked_up is not None else self.value
        use = self.observation.use(self.slot, value, self.views, function, layout, shared=shared, others=self.others)
        use.path = self.path
        return use

    def refusal(self, function: str) -> RuntimeError:
        """The error for a function that no rule knows."""
        return RuntimeError(
            f"{self.observation.who}: no rule for {function} of {self.name} {list(self.shape)}, which is trainable; "
            'make the Meter with on_unsupported="vmap" to have such uses differentiated one example at a time, freeze it '
            "with requires_grad_(False), or write the layer with linear, embedding, layer_norm, rms_norm, addmm, matmul, "
            "mul, add or expand of the parameter and a tensor whose first dimension is the batch"
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = cls.rules.get(func) if torch.is_grad_enabled() else None
        if rule is not None:
            with torch._C.DisableTorchFunctionSubclass():
                result = rule(*args, **kwargs)
            if result is not NotImplemented:
                return result
        leaves, spec = pytree.tree_flatten((args, kwargs))
        taps = [leaf for leaf in leaves if isinstance(leaf, Tap)]
        values = [leaf.value if isinstance(leaf, Tap) else leaf for leaf in leaves]
        plain_args, plain_kwargs = pytree.tree_unflatten(values, spec)
        graph = saving_themselves() if taps[0].observation.derives else contextlib.nullcontext()
        with torch._C.DisableTorchFunctionSubclass(), graph:
            result = func(*plain_args, **plain_kwargs)
        if torch.is_grad_enabled() and any(
            isinstance(leaf, Tensor) and leaf.requires_grad and not any(leaf is value for value in values)
            for leaf in pytree.tree_leaves(result)
        ):
            name = getattr(func, "__name__", str(func))
            met = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, Tap)]
            of_parameters = (
                not met and len(taps) > 1
            )  # perhaps not for a gradient, as in DoRA: refused where it is used
            derives = taps[0].observation.derives or of_parameters
            if not derives or any(tap.looked_up is not None for tap in taps):
                raise taps[0].refusal(name)
            with torch._C.DisableTorchFunctionSubclass():
                return cls.unruled(func, name, leaves, spec, result)
        return result


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
        elif torch.is_grad_enabled() and (slot := observation.slot_of(self, name, value)) is not None:
            if hasattr(value, "device_mesh"):
                raise observation.split_read(slot, self)
            if type(value) is not nn.Parameter and is_traceable_wrapper_subclass(value):
                raise observation.wrapped_read(slot, value)
            return Tap.of(observation, slot, value)
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
    observation.modules = frozenset(id(module) for _, module in modules)
    for index, (name, module) in enumerate(modules):
        if _SESSION in module.__dict__:
            release_modules(modules, observation)
            raise RuntimeError(
                f"{observation.who}: a model is observed by one block at a time, got {name or type(module).__name__}, "
                "which another open observe block observes; close that one first, or use one Meter for both"
            )
        if index == 0 or observation.verify or any(one is not None for one in module._parameters.values()):
            module.__dict__[_SESSION] = observation
            own: Any = type(module)
            _set_class(module, _observed_class(own))


def release_modules(modules: Sequence[tuple[str, nn.Module]], observation: Observation) -> None:
    """Give the modules their own classes back."""
    for _, module in modules:
        if module.__dict__.get(_SESSION) is observation:
            del module.__dict__[_SESSION]
            _set_class(module, vars(type(module))["_gradnorm_base"])
