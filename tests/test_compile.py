"""Compiled models: inside a block they run as they were written, and are measured like others."""

import copy

import pytest
import torch
from oracle import Case, Transformer, group_norms, per_example_gradients, relative, token_loss
from torch._dynamo.utils import counters

from gradnorm_ext import ClipExamples, Meter, Reweighted

CLOSE = 1e3 * torch.finfo(torch.float64).eps


def make(length=6):
    torch.manual_seed(0)
    x, y = torch.randint(1, 13, (4, length)), torch.randint(0, 13, (4, length))
    return Case(Transformer(), x, y, token_loss).to(torch.float64)


def compiled_whole(model):
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def compiled_in_place(model):
    model.compile(fullgraph=True, backend="aot_eager")
    return model


def compiled_blocks(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, fullgraph=True, backend="aot_eager")
    return model


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's, of a block's input
@pytest.mark.parametrize("meter_of", ("module", "compiled"))
@pytest.mark.parametrize("compiled", (compiled_whole, compiled_in_place, compiled_blocks))
def test_a_compiled_model_is_measured_like_others(compiled, meter_of):
    """Also where its graph was made before the block, and is used again after it; other lengths compile nothing."""
    torch.compiler.reset()
    case = make()
    module = copy.deepcopy(case.model)
    model = compiled(module)
    token_loss(model(case.x), case.y).backward()
    meter = Meter(module if meter_of == "module" else model)
    graphs = counters["stats"]["unique_graphs"]
    for length in (6, 6, 5, 3):
        some = Case(case.model, case.x[:, :length], case.y[:, :length], token_loss)
        truth = group_norms(per_example_gradients(some), torch.arange(4), 4)
        module.zero_grad()
        with meter.observe():
            token_loss(model(some.x), some.y).backward()
        assert relative(meter.stats.example_norm, truth) <= CLOSE
    assert counters["stats"]["unique_graphs"] == graphs
    token_loss(model(case.x), case.y).backward()
    assert counters["stats"]["unique_graphs"] == graphs  # what was compiled is still good


@pytest.mark.parametrize("options", ({}, {"passes": 2}))
def test_a_compiled_model_is_weighed_like_others(options):
    torch.compiler.reset()
    case, found = make(), []
    for compiled in (lambda model: model, compiled_whole):
        module = copy.deepcopy(case.model)
        model = compiled(module)
        optimizer = Reweighted(torch.optim.SGD(module.parameters(), 0.1), module, ClipExamples(0.5), **options)
        for _ in range(2):
            optimizer.zero_grad()
            with optimizer.observe():
                optimizer.backward(token_loss(model(case.x), case.y))
        found.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    assert torch.equal(*found)


def test_a_block_inside_a_compiled_function_is_refused():
    torch.compiler.reset()
    case = make()
    meter = Meter(case.model)

    @torch.compile(backend="eager")
    def step(x, y):
        with meter.observe():
            token_loss(case.model(x), y).backward()

    with pytest.raises(RuntimeError, match="must be opened outside of compiled functions"):
        step(case.x, case.y)


def test_blocks_that_close_in_the_order_in_which_they_opened_leave_compilation_as_it_was():
    torch.compiler.reset()
    cases = [make(), make()]
    blocks = [Meter(case.model).observe() for case in cases]
    for block in blocks:
        block.__enter__()
    for case, block in zip(cases, blocks, strict=True):
        case.run().backward()
        block.__exit__(None, None, None)
    graphs = counters["stats"]["unique_graphs"]
    compiled_whole(torch.nn.Linear(2, 2))(torch.ones(1, 2))
    assert counters["stats"]["unique_graphs"] == graphs + 1
