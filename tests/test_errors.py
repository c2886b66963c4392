"""Bad input: one clear message, nothing changed, and the next block works."""

import re

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradnorm_ext import InverseNorm, Meter, Reweighted, check

OPTIONS = [
    ({"tasks": [0, 1, 2]}, ValueError, "Meter: the rows of 0.weight must belong to the batch's 3 examples, got rows of "
     "shape [4], neither 3 in front nor as many rows as this block's tensors with the batch in front (none yet); give tasks"),
    ({"tasks": [0, 1, 2, 0], "prompts": [0, 0, 1]}, ValueError,
     "Meter: tasks, prompts and rewards must have one entry per example, got tasks of 4, prompts of 3"),
    ({"tasks": [0.0, 1.0, 2.0, 0.0]}, TypeError, "Meter: tasks must be integers, got torch.float32; pass int64 ids"),
    ({"tasks": [True, False, True, False]}, TypeError, "Meter: tasks must be integers, got torch.bool"),
    ({"tasks": [[0, 1], [1, 0]]}, ValueError, "Meter: tasks must be one integer per example, got shape [2, 2]"),
    ({"tasks": [0, 1, 2, 3]}, ValueError, "Meter: tasks must lie in [0, 3), got 0 to 3; give the meter all tasks"),
    ({"tasks": [0, -1, 2, 1]}, ValueError, "Meter: tasks must lie in [0, 3), got -1 to 2"),
    ({"tasks": torch.zeros(4, dtype=torch.long, device="meta")}, ValueError,
     "Meter: tasks must be on the CPU or on the model's device cpu, got meta; move them"),
    ({}, ValueError, "Meter: tasks must be given, one integer per example, since the meter has 3 tasks, got None"),
    ({"tasks": ["0", "2", "1", "3"]}, ValueError,
     "Meter: tasks must be among '0', '1', '2', got '3'; give one name or one number per example"),
    ({"tasks": ["0", 2, 1, "0"]}, ValueError, "Meter: tasks must be among '0', '1', '2', got 2; give one name or one"),
    ({"tasks": "0120"}, ValueError, "Meter: tasks must be a sequence of names, got '0120'; give one name or one number"),
    ({"tasks": [0, None, 2, 0]}, TypeError, "Meter: tasks must be integers, got None; pass int64 ids"),
    ({"tasks": [0, 1, 2, 0], "prompts": ["a", "b", "c", "a"]}, TypeError, "Meter: prompts must be integers, got 'a'; pass"),
    ({"tasks": [0, 1, 2, 2**70]}, TypeError, "Meter: tasks must be integers, got list; pass int64 ids"),
    ({"tasks": [0, 1, 2, 0], "prompts": [0, 1, 2, 0], "rewards": [1.0, None, 0.0, 1.0]}, TypeError,
     "Meter: rewards must be one number per example, got None; leave examples without a reward out of prompts and rewards"),
    ({"tasks": [0, 1, 2, 0], "prompts": [0, 1, 2, 0], "rewards": [[1.0], [0.0, 1.0]]}, TypeError,
     "Meter: rewards must be one number per example, got [1.0]"),
    ({"tasks": [0, 1, 2, 0], "prompts": [0, 1, 2, 0], "rewards": torch.ones(4, 2)}, ValueError,
     "Meter: rewards must be one real number per example, got torch.float32 of shape [4, 2]; add up the reward functions"),
    ({"tasks": 0}, ValueError, "Meter: tasks must be one integer per example, got shape []; flatten it"),
    ({"tasks": [0, 1, 2, 0], "prompts": [5, 6, 7, 6]}, ValueError,
     "Meter: a prompt must lie in one task, got prompt 6 in tasks [0, 1]; give each task's prompts ids of their own"),
    ({"tasks": [0, 1, 2, 0], "rewards": [0.0, 1.0, 0.0, 1.0]}, ValueError,
     "Meter: rewards need prompts, one integer per example, got None; pass observe(prompts=...)"),
    ({"tasks": [0, 1, 2, 0], "loss_scale": 0.0}, ValueError, "Meter: loss_scale must be positive, got 0.0"),
]  # fmt: skip


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2))


@pytest.mark.parametrize(("given", "error", "message"), OPTIONS, ids=range(len(OPTIONS)))
def test_bad_ids_are_named_and_nothing_is_lost(given, error, message):
    model, x = mlp(), torch.randn(4, 7)
    meter = Meter(model, tasks=3)
    with pytest.raises(error, match=re.escape(message)), meter.observe(**given):
        model(x).sum().backward()
    assert [type(m) for m in model.modules()] == [type(m) for m in mlp().modules()]
    assert all(p.grad is None for p in model.parameters())
    works(meter, model, x)


def works(meter, model, x):
    model.zero_grad()
    tasks = torch.arange(len(x)) % len(meter.task_names)
    with meter.observe(tasks=tasks):
        model(x).square().sum().backward()
    expected = oracle.per_example_gradients(oracle.Case(model, x, x, lambda output, _: output.square().sum()))
    torch.testing.assert_close(
        meter.stats.example_norm.double(), oracle.group_norms(expected, torch.arange(len(x)), len(x)), rtol=1e-5, atol=0
    )


def refused(model, x, error, message, run=None):
    meter = Meter(model)
    with pytest.raises(error, match=re.escape(message)), meter.observe():
        (run or (lambda: model(x).square().sum().backward()))()
    return meter


def test_no_backward_in_the_block():
    model, x = mlp(), torch.randn(4, 7)
    meter = refused(
        model,
        x,
        RuntimeError,
        "loss.backward() must run inside the observe block, got a forward without it",
        lambda: model(x),
    )
    works(meter, model, x)


def test_no_forward_in_the_block():
    model, x = mlp(), torch.randn(4, 7)
    meter = refused(
        model,
        x,
        RuntimeError,
        "the model must be called with gradients inside the observe block, got no call",
        lambda: None,
    )
    works(meter, model, x)


def test_backward_after_the_block():
    model, x = mlp(), torch.randn(4, 7)
    meter = Meter(model)
    with (
        pytest.raises(RuntimeError, match=re.escape("loss.backward() must run inside the observe block")),
        meter.observe(),
    ):
        loss = model(x).sum()
    assert loss.grad_fn is not None
    works(meter, model, x)


def test_backward_twice_through_one_forward():
    model, x = mlp(), torch.randn(4, 7)

    def twice():
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()

    works(refused(model, x, RuntimeError, "must run once per use", twice), model, x)


def test_two_backwards_over_the_same_examples():
    model, x = mlp(), torch.randn(4, 7)

    def separately():
        model(x).square().sum().backward()
        model(-x).square().sum().backward()

    message = "run all forwards before one backward, say how many backward passes there are with observe(backwards=2)"
    works(refused(model, x, RuntimeError, message, separately), model, x)


def test_second_derivatives_are_refused():
    model, x = mlp(), torch.randn(4, 7, requires_grad=True)

    def penalty():
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()

    meter = refused(model, x, RuntimeError, "trying to differentiate twice", penalty)
    works(meter, model, x.detach())


def test_empty_batch():
    model, x = mlp(), torch.randn(0, 7)
    meter = refused(model, x, ValueError, "must have the examples as its first dimension, got an empty batch")
    works(meter, model, torch.randn(4, 7))


def test_no_examples_where_the_batch_has_some():
    model, x = mlp(), torch.randn(4, 7)
    meter = Meter(model, tasks=2)
    message = (
        "a block of no examples must have a batch without rows, got a call with [4, 7]; call the model with an empty"
    )
    with pytest.raises(ValueError, match=re.escape(message)), meter.observe(tasks=[]):
        model(x).square().sum().backward()
    works(meter, model, x)


def test_rows_that_no_layout_explains():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(7, 5)

        def forward(self, x):
            return self.inner(x[:3])

    model, x = Pooled(), torch.randn(4, 7)
    refused(
        model,
        x,
        ValueError,
        "the rows of inner.weight must belong to the batch's 4 examples, got rows of shape [3]",
    )


class Masked(nn.Module):
    """A head on the rows that a mask selects, in batch-major order: not equally many per example."""

    def __init__(self, train_body):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6).requires_grad_(train_body), nn.Linear(6, 2)

    def forward(self, x, mask):
        return self.head(torch.tanh(self.body(x))[mask])


@pytest.mark.parametrize("lengths", [(4, 2), (4, 4)])
def test_rows_that_a_mask_selected_from_what_nothing_says(lengths):
    """Where the body is trained the graph says whose they are: tests/test_provenance.py."""
    model, x = Masked(train_body=False), torch.randn(2, 4, 6)
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]

    def run():
        model(x, mask).square().sum().backward()

    if lengths == (4, 4):
        message = "head.weight (linear, rows [8]) has the rows of an argument in an order of the model's own"
        refused(model, x, RuntimeError, message, run)
    else:
        message = "the rows of head.weight must belong to the batch's 2 examples, got rows of shape [6]"
        refused(model, x, ValueError, message, run)


def test_time_first_rows_are_not_taken_for_batch_major_ones():
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(4, 2, 6)
    meter = Meter(model, tasks=2)
    with pytest.raises(ValueError, match="got rows of shape"), meter.observe(tasks=[0, 1]):
        model(x).square().sum().backward()


def test_batch_norm_in_training_mode():
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
    meter = refused(
        model,
        torch.randn(4, 7),
        ValueError,
        "examples must not influence each other, got 1 (BatchNorm1d) in training mode; put it in eval mode",
    )
    model(torch.randn(9, 7))  # statistics that are not those of the start
    model.eval()
    works(meter, model, torch.randn(4, 7))


@pytest.mark.parametrize("who", [Meter, Reweighted], ids=lambda who: who.__name__)
def test_a_model_on_several_devices(who):
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2).to("meta"))
    given = (torch.optim.SGD(model.parameters(), 0.1), model, InverseNorm()) if who is Reweighted else (model,)
    message = (
        f"{who.__name__}: trainable parameters must lie on one device, got 0.weight on cpu and 2.weight on meta; move the "
        "model to one device, or freeze what lies on the others"
    )
    with pytest.raises(ValueError, match=re.escape(message)), who(*given).observe():
        pass
    model[2].requires_grad_(False)  # what is frozen may lie anywhere
    meter = Meter(model)
    with meter.observe():
        model[0](torch.ones(3, 2)).sum().backward()
    assert meter.stats.example_norm.tolist() == pytest.approx([6**0.5] * 3)


def test_batch_norm_with_the_batchs_statistics_and_no_module():
    class Model(nn.BatchNorm1d):
        def forward(self, x):
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True)

    refused(Model(7).eval(), torch.randn(4, 7), RuntimeError, "no rule for batch_norm of weight [7]")


def test_examples_that_influence_each_other_are_found_by_the_row_test():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(7, 5), nn.Linear(5, 2)

        def forward(self, x):
            h = self.inner(x)
            return self.head(h - h.mean(0))

    refused(
        Centred(), torch.randn(4, 7), RuntimeError, "inner.weight (linear, rows [4]) was used with rows that do not"
    )


@pytest.mark.parametrize(
    ("use", "name"),
    [
        (lambda x, w: torch.cdist(x, w), "cdist"),
        (lambda x, w: torch.einsum("bi,oi->bo", x, w), "einsum"),
        (lambda x, w: x @ torch.exp(w).t(), r"matmul \(of a function of it\)"),
        (lambda x, w: F.conv1d(x[:, None], (2 * w)[:, None]), r"conv1d \(of a function of it\)"),
        (lambda x, w: x[:, :1, None] + F.embedding(x.long().clamp(0, 2), w / 3), r"embedding \(of a function of it\)"),
        (lambda x, w: torch.maximum(x, w[0]), "maximum"),
        (lambda x, w: torch.cat([x, w], 0), "cat"),
        (lambda x, w: F.linear(x, w[torch.tensor([0, 0])]), "linear"),
        (lambda x, w: F.linear(x, w[torch.tensor([True, False, True])]), "__getitem__"),
        (lambda x, w: F.linear(x, w * w), "mul"),
    ],
)
def test_a_use_that_no_rule_knows_is_refused_by_name(use, name):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.odd = nn.Linear(7, 7), nn.Parameter(torch.randn(3, 7))

        def forward(self, x):
            return use(self.first(x), self.odd)

    model = Model()
    meter = refused(model, torch.randn(4, 7), RuntimeError, "Meter: no rule for ")
    with (
        pytest.raises(RuntimeError, match=rf"no rule for {name} of odd .*, which is trainable.*; make the Meter with"),
        meter.observe(),
    ):
        model(torch.randn(4, 7)).sum().backward()
    model.odd.requires_grad_(False)
    with meter.observe():
        model(torch.randn(4, 7)).sum().backward()


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_embedding_options_that_change_the_gradient_are_refused(option):
    model = nn.Sequential(nn.Embedding(5, 3, **option), nn.Linear(3, 2))
    name = next(iter(option))
    refused(model, torch.tensor([[1, 2], [3, 4]]), RuntimeError, f"no rule for embedding with {name}=")


def test_lstm_is_refused_by_name():
    model = nn.LSTM(3, 4, batch_first=True)
    x = torch.randn(2, 5, 3)
    refused(model, x, RuntimeError, "no rule for LSTM of weight_ih_l0", lambda: model(x)[0].sum().backward())


def test_one_block_at_a_time_on_a_model():
    model, x = mlp(), torch.randn(4, 7)
    first, second = Meter(model), Meter(model)
    with first.observe():
        with pytest.raises(RuntimeError, match=r"a model is observed by one block at a time"), second.observe():
            pass
        with pytest.raises(RuntimeError, match=r"a model is observed by one block at a time"), first.observe():
            pass
        model(x).square().sum().backward()
    works(second, model, x)
    works(first, model, x)


def test_models_that_cannot_be_measured_at_all():
    frozen = mlp().requires_grad_(False)
    with pytest.raises(ValueError, match=r"the model must have a trainable parameter, got none; unfreeze one"):
        Meter(frozen)
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"parameters must be real floating point, got w of torch.complex64"):
        Meter(model)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        Meter([mlp()])
    with pytest.raises(ValueError, match=r"tasks must be at least one, with distinct names"):
        Meter(mlp(), tasks=["a", "a"])
    with pytest.raises(ValueError, match=r"tasks must be at least one"):
        Meter(mlp(), tasks=0)


def test_a_closed_meter_and_one_that_measured_nothing():
    model = mlp()
    with Meter(model) as meter, pytest.raises(RuntimeError, match=r"nothing was measured yet"):
        _ = meter.stats
    with pytest.raises(RuntimeError, match=r"the meter must be open, got one that was closed"), meter.observe():
        pass


def test_an_exception_in_a_block_leaves_the_model_as_it_was():
    model, x = mlp(), torch.randn(4, 7)
    meter = Meter(model)
    for when in ("before", "between", "after"):
        with pytest.raises(ZeroDivisionError), meter.observe():
            if when == "before":
                raise ZeroDivisionError
            loss = model(x).sum()
            if when == "between":
                raise ZeroDivisionError
            loss.backward()
            raise ZeroDivisionError
        assert type(model[0]) is nn.Linear
        works(meter, model, x)


def test_a_use_that_begins_later_is_found_when_the_tenth_block_verifies_itself():
    model, x = mlp(), torch.randn(4, 7)
    meter = Meter(model)
    hidden = next(model.parameters())

    def penalised():
        (model(x).square().sum() + hidden.square().sum()).backward()

    works(meter, model, x)
    for _ in range(8):
        with meter.observe():
            penalised()
    message = r"0.weight got a gradient that its seen uses account for only in part"
    with pytest.raises(RuntimeError, match=message), meter.observe():
        penalised()


def test_gradient_hooks_of_others_are_not_taken_for_unseen_uses():
    """Norms are of what the hook hands on: tests/test_parameter_hooks.py."""
    model, x = mlp(), torch.randn(4, 7)
    meter = Meter(model)
    works(meter, model, x)
    before = meter.parameter_sqnorm["0.weight"]
    model[0].weight.register_hook(lambda gradient: gradient * 0.5)
    with meter.observe():
        model(x).square().sum().backward()
    torch.testing.assert_close(meter.parameter_sqnorm["0.weight"], before / 4)


def test_backward_restricted_to_inputs_measures_nothing():
    model, x = mlp(), torch.randn(4, 7)
    parameters = list(model.parameters())
    refused(
        model,
        x,
        RuntimeError,
        "loss.backward() must run inside the observe block",
        lambda: model(x).sum().backward(inputs=parameters),
    )


def test_checker_says_what_it_needs():
    with pytest.raises(ValueError, match=r"tasks must have one entry per example of the first input, got 2 for 4"):
        check(mlp(), torch.sum, torch.randn(4, 7), tasks=[0, 1])
    with pytest.raises(
        ValueError, match=r"an input must be a tensor with the examples as its first dimension, got none"
    ):
        check(mlp(), torch.sum)
    pooled = nn.Sequential(nn.Linear(7, 2), nn.Flatten(0))
    with pytest.raises(ValueError, match=r"outputs must have the 4 examples as their first dimension, got"):
        check(pooled, torch.sum, torch.randn(4, 7))


def test_a_broken_native_build_is_an_error_and_never_a_fallback(monkeypatch):
    from gradnorm_ext import backends

    def broken(name):
        raise ImportError("undefined symbol: torch_gone")

    monkeypatch.setattr(backends.importlib, "import_module", broken)
    backends.load.cache_clear()
    backends.find.cache_clear()
    try:
        with pytest.raises(
            ImportError, match=r"the native backend is installed but does not load .*torch_gone.*; rebuild it"
        ):
            backends.find("outer_wgrad", "cpu", "auto")
    finally:
        backends.load.cache_clear()
        backends.find.cache_clear()


def test_backend_names_are_checked():
    with pytest.raises(ValueError, match=r"backend must be one of auto, triton, native, reference, got 'fast'"):
        model = mlp()
        with Meter(model, backend="fast").observe():
            model(torch.randn(4, 7)).sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "max"}, "no rule for embedding_bag with mode='max' of weight [11, 4]"),
        ({"max_norm": 1.0}, "no rule for embedding_bag with max_norm=1.0 of weight [11, 4]"),
        ({"scale_grad_by_freq": True}, "no rule for embedding_bag with scale_grad_by_freq=True of weight [11, 4]"),
    ],
)
def test_bags_whose_gradient_is_no_sum_are_refused(options, message):
    model = nn.EmbeddingBag(11, 4, **options)
    refused(model, torch.randint(0, 11, (4, 3)), RuntimeError, message)


def test_bags_of_something_else_than_examples_are_refused():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.bags = nn.EmbeddingBag(11, 4)

        def forward(self, x):
            return self.bags(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    refused(
        Words(), torch.randint(0, 11, (2, 3, 5)), RuntimeError, "embedding_bag of 6 bags, where there are 2 examples"
    )


def test_slices_of_one_parameter_with_rows_of_other_examples():
    class Rolled(nn.Module):
        def __init__(self):
            super().__init__()
            self.both, self.head = nn.Parameter(torch.randn(6, 3)), nn.Linear(3, 2)

        def forward(self, x):
            for matrix in self.both.chunk(2):
                x = torch.tanh(F.linear(x.roll(1, 0), matrix))
            return self.head(x.roll(-2, 0))

    refused(Rolled(), torch.randn(4, 3), RuntimeError, "both (linear, rows [4]) was used with rows that do not")


def test_bags_that_all_examples_share_are_not_taken_for_the_examples():
    class Classes(nn.Module):
        """As many classes, each a bag of words, as examples."""

        def __init__(self):
            super().__init__()
            self.words, self.mix = nn.EmbeddingBag(11, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.mix(x) @ self.words(torch.arange(8) % 5, torch.tensor([0, 2, 4, 6])).T

    refused(
        Classes(), torch.randn(4, 3), RuntimeError, "words.weight (embedding_bag, rows [4]) was used with rows that"
    )


def test_bags_with_offsets_as_the_models_input_need_no_other_layer():
    model, ids = nn.EmbeddingBag(11, 3), torch.arange(8) % 5
    offsets, meter = torch.tensor([0, 1, 4, 6]), Meter(model)
    with meter.observe(tasks=[0] * 4):
        model(ids, offsets).square().sum().backward()
    expected = []
    for bag in ids.tensor_split(offsets[1:]):
        (gradient,) = torch.autograd.grad(model(bag[None]).square().sum(), model.weight)
        expected.append(gradient.norm())
    torch.testing.assert_close(meter.stats.example_norm, torch.stack(expected))


@pytest.mark.parametrize("layer", [nn.Linear(3, 3), nn.Conv1d(3, 3, 1), nn.GroupNorm(1, 3), nn.BatchNorm1d(3).eval()])
def test_a_buffer_of_as_many_rows_as_examples_is_not_taken_for_the_batch(layer):
    class Prototypes(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.layer = nn.Linear(3, 3), layer
            self.register_buffer("prototypes", torch.randn(4, 3, *[1] * (not isinstance(layer, nn.Linear))))

        def forward(self, x):
            return self.mix(x) @ self.layer(self.prototypes).view(4, 3).T

    refused(Prototypes(), torch.randn(4, 3), RuntimeError, "layer.weight")
