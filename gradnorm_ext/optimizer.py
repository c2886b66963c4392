"""Reweighting: an optimizer around an optimizer, whose gradients are a policy's mixture of the examples' or tasks'."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gradnorm_ext.distributed import How, Ranks, find_ranks, split_among
from gradnorm_ext.history import History
from gradnorm_ext.layers import Plan, accumulate
from gradnorm_ext.meter import Block, Given, Meter, named_modules
from gradnorm_ext.policies import Policy, weighs_of
from gradnorm_ext.stats import Stats

if TYPE_CHECKING:
    from typing_extensions import Unpack


_TAKE_FOUND_INF = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)  # where they are fused
_UNDECIDED = 256  # steps, of which nobody asks what became of them


def _would_wait(tensor: Tensor) -> bool:
    """Whether to look at its numbers is to wait for a device."""
    return tensor.device.type != "cpu"


class Reweighted(torch.optim.Optimizer):
    """An optimizer that steps along reweighted gradients:  ``.grad = Σ_k w_k g_k`` (tasks) or ``Σ_b w_b g_b`` (examples).

    ``.grad`` is complete when an observe block closes, so clipping, gradient accumulation and hooks see it as usual;
    ``param_groups``, ``state`` and hooks are the wrapped optimizer's own. A step whose norms or rewards are not finite
    is skipped and counted in ``skipped_steps``; the optimizer's state stays as it was. ``history`` has every block's
    figures and their running means. ``state_dict`` holds these means and what the policy remembers too.

    Args:
        optimizer: the optimizer that steps; of the model's parameters.
        model_or_meter: the model, or a Meter of it.
        policy: ``policy(stats) -> weights``, ``[K]`` or, where its attribute ``weighs`` is "examples", ``[B]``.
            A plain function weighs tasks.
        apply: whose statistics the weights come from. "same_step" (default): of this very batch; what the layers'
            backward needs is kept until the block closes, which gives up what activation checkpointing saves.
            "next_step": running means over earlier steps, per task, at no extra cost; the first step's weights are 1.
        passes: "same_step": 1, or 2: ``optimizer.backward(loss)`` in place of ``loss.backward()`` runs a backward that
            takes norms only, and then one with the weights; nothing is kept between them but the graph, so memory and
            activation checkpointing stay as they are, for the price of a second backward.
        scope: "same_step": "model": one weight for the whole gradient of a task or example; "layer": the policy is asked
            for every parameter with the statistics of that parameter alone (``optimizer.layer_weights``), as soon as
            its norms are known: nothing is kept but for parameters with several uses.
        decay: how much of the running means (of ``history``) a step keeps.
        gradient_budget: "same_step" with weights per task: bytes that may hold separate task gradients, from step to
            step; layers beyond it keep their rows until the block closes instead.
        unobserved: what ``step()`` does where nothing was observed since the last: "error", or the "plain" step.
        meter_options: of :class:`Meter`, where a model is given (``tasks=["math", "code"]``). With ``exact_tasks=True``,
            for gradient accumulation, the policy is asked for the weights of all that was observed since the last step
            or ``zero_grad``, and ``.grad`` is their mixture anew when each block closes; this needs a policy that weighs
            tasks, ``apply="same_step"`` and ``passes=1``.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> optimizer = Reweighted(torch.optim.SGD(model.parameters(), 0.1), model, lambda stats: 1 / stats.task_norm,
        ...                        tasks=2)
        >>> with optimizer.observe(tasks=[0, 1]):
        ...     model(torch.tensor([[3., 0.], [0., 5.]])).sum().backward()
        >>> model.weight.grad
        tensor([[1., 1.]])
        >>> optimizer.step()
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model_or_meter: nn.Module | Meter,
        policy: Policy,
        *,
        apply: Literal["same_step", "next_step"] = "same_step",
        passes: Literal[1, 2] = 1,
        scope: Literal["model", "layer"] = "model",
        decay: float = 0.9,
        gradient_budget: int = 1 << 28,
        unobserved: Literal["error", "plain"] = "error",
        **meter_options: Any,
    ) -> None:
        # Not Optimizer.__init__: it would make param_groups and state of our own beside the wrapped optimizer's.
        if apply not in ("same_step", "next_step"):
            raise ValueError(f'Reweighted: apply must be "same_step" or "next_step", got {apply!r}')
        if unobserved not in ("error", "plain"):
            raise ValueError(f'Reweighted: unobserved must be "error" or "plain", got {unobserved!r}')
        if passes not in (1, 2) or scope not in ("model", "layer"):
            raise ValueError(
                f'Reweighted: passes must be 1 or 2, and scope "model" or "layer", got {passes!r} and {scope!r}'
            )
        if (passes, scope) != (1, "model") and (apply == "next_step" or (passes, scope) == (2, "layer")):
            raise ValueError(
                'Reweighted: passes=2 and scope="layer" are two ways of apply="same_step", got '
                f"apply={apply!r}, passes={passes} and scope={scope!r}; choose one of them"
            )
        if scope == "layer" and hasattr(policy, "load_state_dict"):
            raise ValueError(
                f'Reweighted: scope="layer" asks the policy once for every parameter, got {policy!r}, which remembers what '
                'it was asked; use scope="model"'
            )
        if not 0 <= decay < 1:
            raise ValueError(f"Reweighted: decay must lie in [0, 1), got {decay}; 0 keeps the last step only")
        if apply == "next_step" and weighs_of(policy) != "tasks":
            raise ValueError(
                'Reweighted: apply="next_step" needs a policy that weighs tasks, since the next batch has other examples, '
                f'got {policy!r}; use apply="same_step"'
            )
        if isinstance(model_or_meter, Meter):
            if meter_options:
                raise TypeError(
                    f"Reweighted: meter options go to the Meter that was given, got {sorted(meter_options)}"
                )
            self.meter = model_or_meter
        else:
            self.meter = Meter(model_or_meter, **meter_options)
        if scope == "layer" and self.meter.modules is not None:
            raise ValueError(
                f'Reweighted: scope="layer" weighs each parameter by its own norms, got modules={self.meter.modules!r}, '
                'which leaves some unmeasured; measure all, or use scope="model"'
            )
        if self.meter.exact_tasks and (
            (apply, passes, scope) != ("same_step", 1, "model") or weighs_of(policy) != "tasks"
        ):
            raise ValueError(
                "Reweighted: exact_tasks=True mixes the tasks' gradients when a block closes, got "
                f"apply={apply!r}, passes={passes}, scope={scope!r} and a policy that weighs {weighs_of(policy)}; use "
                'apply="same_step", passes=1, scope="model" and a policy that weighs tasks'
            )
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in stepped for p in self.meter.model.parameters()):
            raise ValueError(
                "Reweighted: the optimizer must step the model's parameters, got one that has none of them; make it of "
                "model.parameters()"
            )
        self.optimizer, self.policy, self.apply, self.decay = optimizer, policy, apply, decay
        self.passes, self.scope = passes, scope
        self.gradient_budget, self.unobserved = gradient_budget, unobserved
        self._skipped_steps = 0  # that are known
        self._late: Tensor | None = None  # on the device: further ones, and those whose weights were not finite
        self._undecided = 0  # steps that these are of
        self.weights: Tensor | None = None
        self.layer_weights: dict[str, Tensor] = {}
        self._block: Block | None = None  # that is open
        self._ranks: Ranks | None = None  # of that block
        self.history = History(decay, self.meter.task_names)
        self._next_weights = torch.ones(len(self.meter.task_names))
        self._usable = torch.ones((), dtype=torch.bool)  # whether the last weights were finite
        self._observed: list[Tensor] = []  # of each block since the last step: whether it and its weights were finite
        self._buffers: dict[str, Tensor] = {}
        self._grads: dict[str, _Grad] = {}  # with exact_tasks: what the blocks since the last step left
        self._share_hooks()

    @contextmanager
    def observe(self, **batch: Unpack[Given]) -> Iterator[None]:
        """As :meth:`Meter.observe`; when it closes, ``.grad`` holds the reweighted gradient."""
        ranks = self._ranks = self._check_ranks()
        if self.passes == 2 and batch.get("backwards", 1) != 1:
            raise ValueError(
                "Reweighted: with passes=2 the weights are known after one backward for the norms, got backwards="
                f"{batch['backwards']}; add up the losses, or use passes=1"
            )
        if all(p.grad is None for group in self.param_groups for p in group["params"]):
            self._begin_step()  # what was observed is gone: model.zero_grad(), where a GradScaler skipped the step
        self._usable = torch.ones((), dtype=torch.bool)
        if self.meter.exact_tasks:
            self._keep_grads()
        plan = self._plan()
        if plan.keep or plan.layer_weights is not None:
            self._refuse_early_gradients()
        try:
            with self.meter.block("Reweighted", plan, batch) as self._block:
                yield
            block = self._block
        finally:
            self._block = None
        stats = self.stats
        if plan.keep:
            weights = self.weights = self._usable_weights(stats)
            by_task = weights if plan.by_task else None
            block.observation.accumulate_weighted(self._of_examples(weights, stats), by_task)
            if self.meter.exact_tasks:
                self._mix_tasks(weights)
        elif self.apply == "next_step":
            self.weights = self._next_weights
        self.history.append(stats, self.weights, weighs_of(self.policy))
        if self.apply == "next_step":
            following = self._weights(self.history.smoothed(stats))
            self._usable = following.isfinite().all()
            self._next_weights = torch.where(stats.finite & self._usable, following, self._next_weights.to(following))
            if ranks is not None:
                self._next_weights = ranks.same(self._next_weights)
        block.observation.forget()
        self._observed.append(torch.stack([stats.finite, self._usable.to(stats.finite.device, non_blocking=True)]))

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()``; with ``passes=2`` the two of them. Inside an observe block, in place of it.

        Raises:
            RuntimeError: no block is open.
        """
        if self._block is None:
            raise RuntimeError(
                "Reweighted: backward must be called inside an observe block, got no open one; use it in "
                "`with optimizer.observe(...):`"
            )
        if self.passes == 1:
            loss.backward()
            return
        observation = self._block.observation
        observation.norms_pass(loss)
        stats = self._block.measure()
        self.weights = self._usable_weights(stats)
        if self._ranks is not None and weighs_of(self.policy) == "tasks":
            self.weights = self._ranks.same(self.weights)
        observation.weighted_pass(loss, self._of_examples(self.weights, stats))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The wrapped optimizer's step along what the observe blocks since the last one left in ``.grad``.

        Args:
            closure: clears gradients, runs an observed forward and backward and returns the loss; the wrapped optimizer
                calls it, as often as it needs to (LBFGS: several times, at several points, each weighed anew). Where one of
                its evaluations is not finite, parameters and state go back to where the step began, which costs a copy
                of both with optimizers that may move before they call it.

        Returns:
            What the wrapped optimizer's step returns; with a closure and a skipped step, its last loss.

        Raises:
            RuntimeError: nothing was observed since the last step; the policy's weights were not finite, though what was
                measured was. Where the device decides (torch's fused optimizers on a GPU, from their second step on), it is
                raised when ``skipped_steps`` is read, or after 256 steps; none of the steps before was taken along such
                weights.
        """
        if closure is not None:
            return self._step_with(closure)
        if self._observed and self._device_decides():
            return self._step_on_device()
        if self._may_step():
            return self.optimizer.step()
        self.skipped_steps += 1
        return None

    @property
    def skipped_steps(self) -> int:
        """How many steps were not taken, for what they were made of was not finite. Where the device decides, it waits."""
        late, self._late, self._undecided = self._late, None, 0
        if late is not None:
            skipped, unusable = late.tolist()
            self._skipped_steps += skipped
            if unusable:
                raise RuntimeError(self._not_usable())
        return self._skipped_steps

    @skipped_steps.setter
    def skipped_steps(self, count: int) -> None:
        self._skipped_steps, self._late, self._undecided = count, None, 0

    def _device_decides(self) -> bool:
        """Whether the wrapped optimizer takes no step where a number on the device says so: nobody waits for it."""
        takes_it = type(self.optimizer) in _TAKE_FOUND_INF and all(group.get("fused") for group in self.param_groups)
        if not takes_it or not _would_wait(self._observed[0]):
            return False
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if hasattr(parameter, "device_mesh"):
                    return False
                if group.get("momentum") and self.state.get(parameter, {}).get("momentum_buffer") is None:
                    return False  # torch makes it of memory as it is, and does not fill it where it takes no step
        return True

    def _step_on_device(self) -> Any:
        finite, usable = torch.stack(self._observed, 1).unbind()
        skipped, unusable = ~finite.all(), (finite & ~usable).any()
        late = torch.stack([skipped & ~unusable, unusable]).long()
        self._late = late if self._late is None else self._late + late
        self._begin_step()
        self.optimizer.found_inf = (skipped | unusable).float()  # type: ignore[attr-defined]
        try:
            result = self.optimizer.step()
        finally:
            del self.optimizer.found_inf  # type: ignore[attr-defined]
        self._undecided += 1
        if self._undecided == _UNDECIDED:
            _ = self.skipped_steps
        return result

    def _not_usable(self) -> str:
        return (
            f"Reweighted: the policy must return finite weights for finite statistics, got others from {self.policy!r}; "
            "no step was taken: have it return 1 where it divides by a norm of 0"
        )

    def _step_with(self, closure: Callable[[], Any]) -> Any:
        loss, evaluations = None, 0

        def evaluate() -> Any:
            nonlocal loss, evaluations
            evaluations += 1
            with torch.enable_grad():
                loss = closure()
            if not self._may_step():
                raise _NotFiniteError
            return loss

        restore = self._remember()
        try:
            result = self.optimizer.step(evaluate)
            if not evaluations:
                raise RuntimeError(
                    f"Reweighted: the wrapped optimizer must call the closure, got {type(self.optimizer).__name__}, which "
                    "did not; run the observe block first, and step() without a closure"
                )
            return result
        except _NotFiniteError:
            restore()
            self.skipped_steps += 1
            return loss
        except BaseException:
            restore()
            raise

    def _remember(self) -> Callable[[], None]:
        """A function that brings parameters and state back to where they are now.

        Torch's optimizers call a closure before they touch either, all but LBFGS.
        """
        optimizer = self.optimizer
        if type(optimizer).__module__.startswith("torch.optim.") and not isinstance(optimizer, torch.optim.LBFGS):
            return lambda: None
        parameters = [(p, p.detach().clone()) for group in self.param_groups for p in group["params"]]
        state = {p: copy.deepcopy(of_parameter) for p, of_parameter in self.state.items()}

        def restore() -> None:
            with torch.no_grad():
                for parameter, value in parameters:
                    parameter.copy_(value)
            self.state.clear()
            self.state.update(state)

        return restore

    def _may_step(self) -> bool:
        """Whether all that was observed since the last step, which begins anew, was finite."""
        if not self._observed and self.unobserved == "error" and not self._makes_state():
            raise RuntimeError(
                "Reweighted: step needs an observe block since the last step, got none, so nothing was measured; wrap "
                'forward and backward in `with optimizer.observe(...)`, or pass unobserved="plain"'
            )
        blocks: list[list[bool]] = [block.tolist() for block in self._observed]
        self._begin_step()
        if any(finite and not usable for finite, usable in blocks):
            raise RuntimeError(self._not_usable())
        return all(finite for finite, _ in blocks)

    @property
    def stats(self) -> Stats:
        """The statistics of the last closed block."""
        return self.meter.stats

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._begin_step()
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's; under "gradnorm" running means, the next weights, the policy's state, skipped steps.

        ``torch.distributed.checkpoint.state_dict`` takes over an optimizer's "state" and "param_groups" and nothing else,
        so the first group has the same once more, as bytes.
        """
        own = {
            "history": self.history.state_dict(),
            "next_weights": self._next_weights,
            "skipped_steps": self.skipped_steps,
        }
        if hasattr(self.policy, "load_state_dict"):
            own["policy"] = {"type": type(self.policy).__name__, "state": self.policy.state_dict()}  # type: ignore[attr-defined]
        state = self.optimizer.state_dict()
        first, *groups = state["param_groups"]
        return {**state, "param_groups": [{**first, "gradnorm": _to_bytes(own)}, *groups], "gradnorm": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load one of ours, or the wrapped optimizer's own (the running means and the policy then start afresh)."""
        state, groups = dict(state_dict), [dict(group) for group in state_dict["param_groups"]]
        copies = [copy for group in groups if (copy := group.pop("gradnorm", None)) is not None]
        own = state.pop("gradnorm", None)
        if own is None and copies:
            own = torch.load(io.BytesIO(copies[0]), map_location="cpu", weights_only=True)
        if own is not None and len(own["next_weights"]) != len(self.meter.task_names):
            raise ValueError(
                f"Reweighted: the state must be of {len(self.meter.task_names)} tasks, got one of "
                f"{len(own['next_weights'])}; make the optimizer with the same tasks"
            )
        remembered = (own or {}).get("policy")
        if remembered is not None and remembered["type"] != type(self.policy).__name__:
            raise ValueError(
                f"Reweighted: the state must be of this policy, {type(self.policy).__name__}, got one of "
                f"{remembered['type']}; make the optimizer with the same policy, or leave the state's "
                '["gradnorm"]["policy"] out'
            )
        self.optimizer.load_state_dict({**state, "param_groups": groups})
        if own is not None:
            self.history.load_state_dict(own["history"])
            self._next_weights, self.skipped_steps = own["next_weights"].clone(), own["skipped_steps"]
        if remembered is not None:
            self.policy.load_state_dict(remembered["state"])  # type: ignore[attr-defined]

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults

    def __getstate__(self) -> dict[str, Any]:
        names = ("optimizer", "meter", "policy", "apply", "passes", "scope", "decay", "gradient_budget", "unobserved")
        more = ("_skipped_steps", "weights", "layer_weights", "history", "_next_weights", "_usable", "_observed")
        _ = self.skipped_steps  # waits for what the device decides
        return {name: getattr(self, name) for name in (*names, *more)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _buffers={}, _grads={}, _block=None, _ranks=None, _late=None, _undecided=0)
        self._share_hooks()

    def _share_hooks(self) -> None:
        """Hooks registered here are the wrapped optimizer's: it runs them."""
        self.__dict__.update(
            {name: hooks for name, hooks in vars(self.optimizer).items() if name.startswith("_optimizer_")}
        )

    def _makes_state(self) -> bool:
        """Whether a step is the one, at a rate of 0, by which ``torch.distributed.checkpoint`` makes the state it loads into."""
        return not self.state and all(float(group.get("lr", 1)) == 0 for group in self.param_groups)

    def _begin_step(self) -> None:
        self._observed.clear()
        self._grads.clear()
        self.meter.reset()

    def _keep_grads(self) -> None:
        """Of the first block of a step what ``.grad`` held before; of the others, see that it is what we left."""
        parameters = {name: p for name, p in self.meter.model.named_parameters() if p.requires_grad}
        if not self.meter.totals:
            self._grads = {name: _Grad(p.grad, None, 0) for name, p in parameters.items()}
        for name, grad in self._grads.items():
            left, now = grad.left, parameters[name].grad if name in parameters else None
            if left is not None and (now is not left or now._version != grad.version):
                raise RuntimeError(
                    "Reweighted: with exact_tasks=True, .grad is mixed anew by every block of a step and must not change "
                    f"between them, got another one of {name}; begin a new step with optimizer.zero_grad(), and clip or "
                    "unscale after the last block"
                )

    def _mix_tasks(self, weights: Tensor) -> None:
        """``.grad``: what it held before the step's first block, and the weighted sum of the tasks' totals."""
        for name, parameter in self.meter.model.named_parameters():
            if (total := self.meter.totals.get(name)) is None:
                continue
            before = self._grads.setdefault(name, _Grad(parameter.grad, None, 0)).before
            parameter.grad = None if before is None else before.clone()
            accumulate(parameter, torch.tensordot(weights.to(total), total, 1).to(parameter.dtype))
            assert parameter.grad is not None
            self._grads[name] = _Grad(before, parameter.grad, parameter.grad._version)

    def _plan(self) -> Plan:
        if self.apply == "next_step":
            return Plan(task_weights=self._next_weights)
        by_task = weighs_of(self.policy) == "tasks"
        if self.passes == 2:
            return Plan(passes=2, by_task=by_task)
        if self.scope == "layer":
            self.layer_weights = {}
            return Plan(layer_weights=self._weigh_layer)
        return Plan(keep=True, by_task=by_task, budget=self.gradient_budget, buffers=self._buffers)

    def _weigh_layer(self, name: str, sqnorms: Tensor) -> Tensor:
        """``[B]``: each example's weight in one parameter's gradient, by that parameter's squared norms."""
        assert self._block is not None
        stats = self._block.stats_of(sqnorms[None])
        usable_so_far = self._usable
        self.layer_weights[name] = self._usable_weights(stats)
        self._usable = self._usable & usable_so_far.to(self._usable.device, non_blocking=True)
        return self._of_examples(self.layer_weights[name], stats)

    def _of_examples(self, weights: Tensor, stats: Stats) -> Tensor:
        return weights[stats.tasks] if weighs_of(self.policy) == "tasks" else weights

    def _usable_weights(self, stats: Stats) -> Tensor:
        """The policy's weights; 1 where they or the statistics are not finite, since such a step is not taken anyway."""
        weights = self._weights(stats)
        self._usable = weights.isfinite().all()
        return torch.where(stats.finite & self._usable, weights, 1)

    def _weights(self, stats: Stats) -> Tensor:
        weighs = weighs_of(self.policy)
        weights = torch.as_tensor(self.policy(stats)).detach().to(stats.example_norm)
        expected = [len(stats.task_names) if weighs == "tasks" else len(stats.tasks)]
        if list(weights.shape) != expected:
            raise ValueError(
                f"Reweighted: the policy must return one weight for each of its {weighs}, {expected}, got "
                f"{list(weights.shape)} from {self.policy!r}; set its attribute `weighs` to what it returns"
            )
        return weights if weighs == "examples" else torch.where(stats.task_count > 0, weights, 1)  # 1 / norm may be inf

    def _check_ranks(self) -> Ranks | None:
        """The processes that weigh alike, or None; refuses what would let their weights or gradients differ."""
        how: How | None = "exact" if self.meter.ranks == "exact" else None
        ranks = find_ranks("Reweighted", named_modules(self.meter.model), how, self.meter.process_group)
        if ranks is not None and self.meter.ranks == "local":
            raise RuntimeError(
                f'Reweighted: the {ranks.size} ranks must weigh alike, got a meter with ranks="local"; leave ranks out'
            )
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        size = torch.distributed.get_world_size() if several else 1
        if ranks is None:
            if size > split_among(self.meter.model) and self.meter.ranks != "local":
                raise RuntimeError(
                    "Reweighted: processes that train one model must weigh alike, got a process group of "
                    f"{size} and a model that is neither DDP nor FSDP2; give the DDP module itself, or process_group=..., "
                    'or, where each process trains a model of its own, ranks="local"'
                )
            return None
        if self.scope == "layer" or (self.apply == "same_step" and self.passes == 1):
            late = 'scope="layer"' if self.scope == "layer" else 'apply="same_step" with passes=1'
            raise RuntimeError(
                f"Reweighted: over {ranks.size} ranks gradients are reduced during backward, got {late}, which forms them "
                'afterwards; use passes=2, or apply="next_step"'
            )
        if self.passes == 2 and ranks.one_backward:
            raise RuntimeError(
                "Reweighted: passes=2 has two backward passes, got DDP with static_graph=True, which reduces gradients "
                'after the first one; use apply="next_step", or DDP without static_graph'
            )
        return ranks

    def _refuse_early_gradients(self) -> None:
        """Whatever acts on ``.grad`` as soon as backward writes it would act before the weights are known."""
        for name, parameter in self.meter.model.named_parameters():
            if getattr(parameter, "_post_accumulate_grad_hooks", None):
                raise RuntimeError(
                    f'Reweighted: apply="same_step" forms gradients after backward, got {name} with a hook that acts on '
                    'its gradient during backward (post_accumulate_grad_hook); remove it, or use apply="next_step"'
                )


def _to_bytes(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


class _NotFiniteError(Exception):
    """What a closure observed was not finite: the step is left."""


class _Grad(NamedTuple):
    """Of one parameter: what ``.grad`` was before a step's first block, and what we left there."""

    before: Tensor | None
    left: Tensor | None
    version: int
