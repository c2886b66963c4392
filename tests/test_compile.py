"""Compiled models: verified as they were written, then measured inside of their graphs."""

import copy
from contextlib import nullcontext

import oracle
import pytest
import torch
from oracle import Case, Transformer, group_norms, per_example_gradients, relative, token_loss
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from gradnorm_ext import IMTLG, ClipExamples, InverseNorm, Meter, Reweighted

CLOSE = 1e3 * torch.finfo(torch.float64).eps
TASKS = torch.tensor([0, 1, 1, 0])


@pytest.fixture(autouse=True)
def no_graphs():
    torch.compiler.reset()
    counters.clear()


def graphs():
    return counters["stats"]["unique_graphs"]


def make(head="own", length=6):
    torch.manual_seed(0)
    x, y = torch.randint(1, 13, (4, length)), torch.randint(0, 13, (4, length))
    return Case(Transformer(head), x, y, token_loss).to(torch.float64)


def whole(model, backend="aot_eager"):
    return torch.compile(model, fullgraph=True, backend=backend)


def in_place(model):
    model.compile(fullgraph=True, backend="aot_eager")
    return model


def blocks(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = whole(block)
    return model


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def truth_of(case):
    gradients = per_example_gradients(case)
    total = [sum(of[name] for of in gradients) for name, p in case.model.named_parameters() if p.requires_grad]
    return gradients, torch.cat([g.flatten() for g in total])


def assert_measured(meter, module, case):
    gradients, total = truth_of(case)
    examples = len(gradients)
    truth = group_norms(gradients, torch.arange(examples), examples)
    assert relative(meter.stats.example_norm, truth) <= CLOSE
    assert relative(meter.stats.task_norm, group_norms(gradients, TASKS[:examples], 2)) <= CLOSE
    assert relative(gradient(module), total) <= CLOSE


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's, of a block's input
@pytest.mark.parametrize("head", ("own", "tied", "functional"))
@pytest.mark.parametrize(("compiled", "kinds"), ((whole, 3), (in_place, 3), (blocks, 3)))
def test_graphs_are_measured_exactly_for_all_sizes(compiled, kinds, head):
    """At first of one size, then of any length, then of any number of examples: as often as plain graphs are made anew.

    Both of the compiled blocks are one graph.
    """
    case = make(head)
    module = copy.deepcopy(case.model)
    model = compiled(module)
    meter = Meter(model, tasks=2)
    for count, (examples, length) in enumerate([(4, 6), (4, 6), (4, 5), (4, 3), (3, 4), (4, 6), (3, 3), (4, 4)]):
        some = Case(case.model, case.x[:examples, :length], case.y[:examples, :length], token_loss)
        module.zero_grad()
        with meter.observe(tasks=TASKS[:examples]):
            token_loss(model(some.x), some.y).backward()
        assert_measured(meter, module, some)
        assert (graphs() > 0) == (count > 0)  # the first block verifies
    assert graphs() == kinds
    assert meter.memory.unobservable is None


def test_graphs_of_one_backend_serve_every_meter_and_stay_apart_from_plain_ones():
    case = make()
    module = copy.deepcopy(case.model)
    model = whole(module)
    token_loss(model(case.x), case.y).backward()
    for made in (2, 2):
        meter = Meter(model, tasks=2)
        for _ in range(2):
            module.zero_grad()
            with meter.observe(tasks=TASKS):
                token_loss(model(case.x), case.y).backward()
            assert_measured(meter, module, case)
        assert graphs() == made
    token_loss(model(case.x), case.y).backward()
    assert graphs() == 2


@pytest.mark.parametrize(("head", "policy"), (("own", InverseNorm()), ("tied", ClipExamples(0.5))))
def test_numbers_of_inductor(head, policy):
    """Which writes over what it has no more use for, while a block may still have."""
    case, found = make(head), []
    for compiled in (lambda model: model, lambda model: whole(model, "inductor")):
        module = copy.deepcopy(case.model)
        model = compiled(module)
        optimizer = Reweighted(torch.optim.SGD(module.parameters(), 0.1), model, policy, tasks=2)
        for _ in range(3):
            optimizer.zero_grad()
            with optimizer.observe(tasks=TASKS):
                token_loss(model(case.x), case.y).backward()
            optimizer.step()
        found.append((gradient(module), optimizer.stats.example_norm, optimizer.stats.task_norm))
    assert all(relative(ours, truth) <= CLOSE for truth, ours in zip(*found, strict=True))
    assert graphs() == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ("default", "reduce-overhead"))
def test_numbers_on_a_gpu(mode):
    """With "reduce-overhead" what lies between our operations is recorded as CUDA graphs, and then replayed."""
    case = make()
    gradients, total = truth_of(case)
    module, x, y = copy.deepcopy(case.model).cuda(), case.x.cuda(), case.y.cuda()
    model = torch.compile(module, fullgraph=True, mode=mode)
    meter = Meter(model, tasks=2)
    for _ in range(5):
        module.zero_grad()
        with meter.observe(tasks=TASKS.cuda()):
            token_loss(model(x), y).backward()
        assert relative(meter.stats.example_norm.cpu(), group_norms(gradients, torch.arange(4), 4)) <= CLOSE
        assert relative(meter.stats.task_norm.cpu(), group_norms(gradients, TASKS, 2)) <= CLOSE
        assert relative(gradient(module).cpu(), total) <= CLOSE
    assert graphs() > 0
    assert meter.memory.unobservable is None


class Memories(TorchDispatchMode):
    """Where what an operation of ours got lies, and what it gave."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.gradnorm.observed_backward.default:
            self.calls.append([{one.untyped_storage().data_ptr() for one in some} for some in (args[0], result)])
        return result


def test_what_a_graph_gets_is_no_memory_of_its_own():
    """It may write over either while it needs the other; the gradient of a sum is the one it is given."""
    case = make()  # its positions are added
    meter = Meter(whole(case.model))
    with meter.observe():
        token_loss(meter.model(case.x), case.y).backward()
    with meter.observe():
        loss = token_loss(meter.model(case.x), case.y)
        with Memories() as seen:
            loss.backward()
    assert meter.memory.unobservable is None and seen.calls
    assert not any(given & got for given, got in seen.calls)


@pytest.mark.parametrize("head", ("own", "tied"))
@pytest.mark.parametrize(
    ("options", "traced"),
    (
        ({"policy": ClipExamples(0.5)}, True),
        ({"policy": InverseNorm()}, True),
        ({"policy": InverseNorm(), "gradient_budget": 0}, True),
        ({"policy": InverseNorm(), "apply": "next_step"}, True),
        ({"policy": IMTLG(), "gram": True}, True),
        ({"policy": ClipExamples(0.5), "passes": 2}, False),
        ({"policy": InverseNorm(), "scope": "layer"}, False),
        ({"policy": InverseNorm(), "exact_tasks": True}, False),
    ),
)
def test_a_compiled_model_is_weighed_like_others(options, traced, head):
    case, found = make(head), []
    for compiled in (lambda model: model, whole):
        module = copy.deepcopy(case.model)
        model = compiled(module)
        plain = torch.optim.SGD(module.parameters(), 0.1)
        optimizer = Reweighted(
            plain, model, options["policy"], tasks=2, **{k: options[k] for k in options if k != "policy"}
        )
        for _ in range(3):
            optimizer.zero_grad()
            with optimizer.observe(tasks=TASKS):
                optimizer.backward(token_loss(model(case.x), case.y))
            optimizer.step()
        found.append((gradient(module), optimizer.stats.example_norm))
    assert all(relative(ours, truth) <= CLOSE for truth, ours in zip(*found, strict=True))
    assert graphs() == traced


EAGER = {  # functions of a parameter's entries, and what a compiler's trace cannot run
    *("functions of scales", "functions of as many scales as examples", "a bias per pair of positions"),
    *("embedding bag", "embedding bag, sums with padding", "embedding bag, means with padding"),
    *("embedding bag, weighted", "embedding bag with offsets, tied"),
}


@pytest.mark.filterwarnings("ignore:Meter. a compiled graph cannot be observed", "ignore:Using padding='same'")
@pytest.mark.parametrize("name", oracle.LAYERS)
def test_layers_in_a_graph(name):
    case = oracle.LAYERS[name]().to(torch.float64)
    gradients, total = truth_of(case)
    module, examples = case.model, len(gradients)
    case.model = whole(module)
    meter = Meter(case.model)
    for _ in range(3):
        module.zero_grad()
        with meter.observe():
            case.run().backward()
        assert relative(meter.stats.example_norm, group_norms(gradients, torch.arange(examples), examples)) <= CLOSE
        assert relative(gradient(module), total) <= CLOSE
    assert (meter.memory.unobservable is None) == (name not in EAGER), meter.memory.unobservable
    assert graphs() == 1


class TurnedTable(nn.Module):
    """Looks positions up in a view of their table, twice."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(3, 5)), nn.Linear(3, 2)

    def forward(self, x):
        here = torch.arange(x.shape[1])
        x = torch.tanh(x + torch.nn.functional.embedding(here, self.table.t()))
        return self.head(x + torch.nn.functional.embedding(here, self.table.t()))


def test_positions_that_are_looked_up_in_a_view_of_their_table():
    torch.manual_seed(0)
    x, y = torch.randn(4, 5, 3, dtype=torch.float64), torch.zeros(4, 10, dtype=torch.float64)
    case = Case(TurnedTable().double(), x, y, oracle.square_loss)
    module = copy.deepcopy(case.model)
    model = whole(module)
    meter = Meter(model, tasks=2)
    for _ in range(3):
        module.zero_grad()
        with meter.observe(tasks=TASKS):
            oracle.square_loss(model(x), y).backward()
        assert_measured(meter, module, case)
    assert graphs() == 1 and meter.memory.unobservable is None


class Exponential(nn.Module):
    """Scales by a function of its weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, dtype=torch.float64))

    def forward(self, x):
        return x * self.weight.exp()


def test_what_cannot_be_traced_is_said_once_and_runs_as_it_was_written():
    torch.manual_seed(0)
    x = torch.randn(4, 2, dtype=torch.float64)
    case = Case(Exponential(), x, torch.zeros(4, 2, dtype=torch.float64), oracle.square_loss)
    module = copy.deepcopy(case.model)
    model = whole(module)
    meter = Meter(model, tasks=2)
    for block in range(4):
        module.zero_grad()
        said = pytest.warns(UserWarning, match="cannot be observed.*consumes _orig_mod.weight by way of curved")
        with said if block == 1 else nullcontext(), meter.observe(tasks=TASKS):
            oracle.square_loss(model(x), case.y).backward()
        assert_measured(meter, module, case)
    assert graphs() == 1


@pytest.mark.parametrize("given", ({"cu_seqlens": [0, 2, 3, 7, 9]}, {"example_ids": [3, 0, 0, 1, 2, 2, 3, 2, 2]}))
def test_packed_rows_in_a_graph(given):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 7)).double()
    ids = torch.randint(0, 7, (1, 9))
    meters = [Meter(model, tasks=2), Meter(whole(model), tasks=2)]
    for meter in meters:
        for _ in range(2):
            model.zero_grad()
            with meter.observe(tasks=TASKS, **given):
                meter.model(ids).square().sum().backward()
    assert torch.equal(meters[0].stats.example_norm, meters[1].stats.example_norm)
    assert graphs() == 1


def test_sequence_first_rows_in_a_graph():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = torch.randn(4, 4, 3, dtype=torch.float64)
    meters = [Meter(model, tasks=2), Meter(whole(model), tasks=2)]
    for meter in meters:
        for _ in range(2):
            with meter.observe(tasks=TASKS, batch_dim=1):
                meter.model(x).square().sum().backward()
    assert relative(meters[1].stats.example_norm, meters[0].stats.example_norm) <= CLOSE
    assert graphs() == 1


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_in_a_graph(dtype):
    case, found = make(), []
    module = case.model.float()
    for compiled in (lambda model: model, whole):
        meter = Meter(compiled(module), tasks=2)
        for _ in range(2):
            module.zero_grad()
            with meter.observe(tasks=TASKS), torch.autocast("cpu", dtype):
                token_loss(meter.model(case.x).float(), case.y).backward()
        found.append((meter.stats.example_norm, gradient(module)))
    assert all(relative(ours, plain) <= torch.finfo(dtype).eps for plain, ours in zip(*found, strict=True))
    assert graphs() == 1


def test_a_use_beside_the_graph_that_is_not_seen_is_an_error():
    case = make()
    model, weight = whole(case.model), case.model.head.weight
    for optimizer, message in (
        (Meter(model, tasks=2), "account for only in part"),
        (Reweighted(torch.optim.SGD(model.parameters(), 0.1), model, ClipExamples(1.0), tasks=2), "was not seen"),
    ):
        with optimizer.observe(tasks=TASKS):
            token_loss(model(case.x), case.y).backward()
        with (
            pytest.raises(RuntimeError, match=f"head.weight got a gradient .*{message}"),
            optimizer.observe(tasks=TASKS),
        ):
            (token_loss(model(case.x), case.y) + weight.square().sum()).backward()
        case.model.zero_grad()
        with optimizer.observe(tasks=TASKS):
            token_loss(model(case.x), case.y).backward()
        assert (
            relative(optimizer.stats.example_norm, group_norms(per_example_gradients(case), torch.arange(4), 4))
            <= CLOSE
        )


def test_other_calls_in_a_block_change_nothing():
    """Without gradients, of a gradient for the input, and of another compiled model."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, dtype=torch.float64)
    case = Case(oracle._mlp().double(), x, torch.zeros(4, 2, dtype=torch.float64), oracle.square_loss)
    x = torch.randn(4, *next(case.model.parameters()).shape[1:], dtype=torch.float64)
    module = copy.deepcopy(case.model)
    model, other = whole(module), whole(nn.Linear(x.shape[1], 2).double())
    y = torch.zeros_like(model(x)).detach()
    case = Case(case.model, x, y, oracle.square_loss)
    meter = Meter(model, tasks=2)
    for _ in range(3):
        module.zero_grad()
        with meter.observe(tasks=TASKS):
            with torch.no_grad():
                model(x)
            other(x).sum().backward()
            loss = oracle.square_loss(model(x.requires_grad_()), y)
            assert torch.autograd.grad(loss, x, retain_graph=True)[0].shape == x.shape
            loss.backward()
        x.requires_grad_(False)
        assert_measured(meter, module, case)


@pytest.mark.parametrize("measured_first", (True, False))
def test_a_model_of_the_same_class_that_is_not_measured_has_a_graph_of_its_own(measured_first):
    """Dynamo tells modules of one class apart by sizes alone; observed ones have another class."""
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64)
    case = Case(nn.Sequential(nn.Linear(3, 2)).double(), x, y, oracle.square_loss)
    module = copy.deepcopy(case.model)
    model, other = whole(module), whole(copy.deepcopy(case.model))
    meter = Meter(model, tasks=2)
    for _ in range(4):
        module.zero_grad()
        with meter.observe(tasks=TASKS):
            outputs = [one(x) for one in ((model, other) if measured_first else (other, model))]
            (oracle.square_loss(outputs[not measured_first], y) + outputs[measured_first].sum()).backward()
        assert_measured(meter, module, case)
    assert graphs() == 2 and meter.memory.unobservable is None


def test_a_backward_at_the_wrong_time_is_an_error():
    case = make()
    model = whole(case.model)
    meter = Meter(model, tasks=2)
    with meter.observe(tasks=TASKS):
        token_loss(model(case.x), case.y).backward()
    with pytest.raises(RuntimeError, match=r"loss.backward\(\) must run inside"), meter.observe(tasks=TASKS):
        loss = token_loss(model(case.x), case.y)
    with pytest.raises(RuntimeError, match=r"loss.backward\(\) must run inside the observe block of its forward"):
        loss.backward()
    torch.compiler.reset()
    keeping = torch._functorch.config.patch(donated_buffer=False)  # else torch refuses to go through its graphs twice
    with keeping, pytest.raises(RuntimeError, match="and once"), meter.observe(tasks=TASKS):
        loss = token_loss(model(case.x), case.y)
        loss.backward(retain_graph=True)
        loss.backward()


def test_blocks_of_compiled_models_do_not_overlap():
    cases = [make(), make()]
    models = [whole(case.model) for case in cases]
    meters = [Meter(model, tasks=2) for model in models]
    for meter, model, case in zip(meters, models, cases, strict=True):
        with meter.observe(tasks=TASKS):
            token_loss(model(case.x), case.y).backward()
    with meters[0].observe(tasks=TASKS):
        with pytest.raises(RuntimeError, match="observed by one block at a time"), meters[1].observe(tasks=TASKS):
            pass
        token_loss(models[0](cases[0].x), cases[0].y).backward()
    with meters[1].observe(tasks=TASKS):
        token_loss(models[1](cases[1].x), cases[1].y).backward()
    assert torch.equal(meters[0].stats.example_norm, meters[1].stats.example_norm)


def test_replays_of_cuda_graphs_are_out_of_the_question():
    """A replay would run no Python: inductor cuts its CUDA graphs at operations with this tag."""
    for operation in (torch.ops.gradnorm.observed_backward, torch.ops.gradnorm.look_up):
        assert torch.Tag.cudagraph_unsafe in operation.default.tags


def test_models_that_may_be_cut_into_graphs_run_as_they_were_written():
    case = make()
    module = copy.deepcopy(case.model)
    model = torch.compile(module, backend="aot_eager")
    meter = Meter(model, tasks=2)
    for _ in range(3):
        module.zero_grad()
        with meter.observe(tasks=TASKS):
            token_loss(model(case.x), case.y).backward()
        assert_measured(meter, module, case)
    assert graphs() == 0


def test_a_block_inside_a_compiled_function_is_refused():
    case = make()
    meter = Meter(case.model)

    @torch.compile(backend="eager")
    def step(x, y):
        with meter.observe():
            token_loss(case.model(x), y).backward()

    with pytest.raises(RuntimeError, match="must be opened outside of compiled functions"):
        step(case.x, case.y)


def test_blocks_that_close_in_the_order_in_which_they_opened_leave_compilation_as_it_was():
    cases = [make(), make()]
    blocks = [Meter(case.model).observe() for case in cases]
    for block in blocks:
        block.__enter__()
    for case, block in zip(cases, blocks, strict=True):
        case.run().backward()
        block.__exit__(None, None, None)
    whole(nn.Linear(2, 2))(torch.ones(1, 2))
    assert graphs() == 1
