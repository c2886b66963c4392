"""Padding-free batches, as the collators of transformers make them: several examples a row."""

import functools

import architectures
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DataCollatorWithFlattening

from gradnorm_ext import InverseNorm, Meter, Reweighted, check, cu_seqlens

pytestmark = pytest.mark.usefixtures("in_float64")
EXACT = 1e3 * torch.finfo(torch.float64).eps
LENGTHS, TASKS = [3, 6, 2, 4], torch.tensor([0, 1, 1, 0])


def collated():
    generator = torch.Generator().manual_seed(1)
    features = [
        {"input_ids": torch.randint(3, architectures.VOCABULARY, (n,), generator=generator).tolist()} for n in LENGTHS
    ]
    return DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)(features), features


def loss_of(model, input_ids, position_ids, labels):
    """Of next tokens, as the models shift them: the first label of each example is -100."""
    logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
    return F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")


def gradients_of(model, features):
    def loss(one):
        ids = torch.tensor([one["input_ids"]])
        return loss_of(model, ids, torch.arange(ids.shape[1])[None], ids)

    return oracle.gradients_of(model, [functools.partial(loss, one) for one in features])


def built(name, attention, checkpointing=False):
    experts = {"experts_implementation": "eager"} if name in architectures.MIXTURES else {}
    return architectures.build(name, attention, checkpointing, **experts)


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize(
    ("name", "attention"),
    [
        *((name, "sdpa") for name in ("gpt2", "llama, tied", "qwen3", "qwen3 moe", "mixtral", "gemma3")),
        *((name, "eager") for name in ("gpt2", "llama", "gemma")),
    ],
)
def test_equals_autograd_one_example_at_a_time(name, attention, checkpointing):
    model, (batch, features) = built(name, attention, checkpointing), collated()
    gradients = gradients_of(model, features)
    optimizer = Reweighted(torch.optim.SGD(model.parameters(), 0.0), model, InverseNorm(), tasks=2)
    offsets = batch["cu_seq_lens_q"]
    assert torch.equal(offsets.long(), cu_seqlens(batch["position_ids"]))
    for _ in range(2):
        model.zero_grad()
        with optimizer.observe(tasks=TASKS, cu_seqlens=offsets):
            loss_of(model, batch["input_ids"], batch["position_ids"], batch["labels"]).backward()
        stats = optimizer.stats
        assert oracle.relative(stats.example_norm, oracle.group_norms(gradients, torch.arange(4), 4)) < EXACT
        assert oracle.relative(stats.task_norm, oracle.group_norms(gradients, TASKS, 2)) < EXACT
        architectures.same_gradients(model, gradients, optimizer.weights[TASKS])
        optimizer.step()


def test_the_models_own_loss_of_kept_logits():
    """Heads on some of the positions (``logits_to_keep``), and the model's own shift of the labels."""
    model, (batch, features) = built("llama", "sdpa"), collated()
    gradients, meter = gradients_of(model, features), Meter(model, tasks=2)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    with meter.observe(tasks=TASKS, cu_seqlens=cu_seqlens(batch["position_ids"])):
        outputs = model(**inputs, labels=batch["labels"], use_cache=False)
        (outputs.loss * (batch["labels"] != -100).sum()).backward()
    assert oracle.relative(meter.stats.example_norm, oracle.group_norms(gradients, torch.arange(4), 4)) < EXACT
    kept = torch.arange(1, sum(LENGTHS) - 1)
    model.zero_grad()
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))[kept]

    def loss(b):
        return model(**inputs, use_cache=False).logits[:, kept][0, owner == b].square().sum()

    gradients = oracle.gradients_of(model, [functools.partial(loss, b) for b in range(4)])
    with meter.observe(tasks=TASKS, cu_seqlens=batch["cu_seq_lens_q"]):
        model(**inputs, use_cache=False, logits_to_keep=kept).logits.square().sum().backward()
    assert oracle.relative(meter.stats.example_norm, oracle.group_norms(gradients, torch.arange(4), 4)) < EXACT


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("llama", RuntimeError, r"do not belong to one example each"),
        (
            "mamba2",
            ValueError,
            r"the rows of .*conv1d.weight must belong to the batch's 4 examples, got rows of shape \[1\]",
        ),
    ],
)
def test_examples_that_see_each_other_are_refused(name, error, message):
    """Without positions attention does not know where examples end, and GPT-OSS builds its masks without them; a state
    space model runs on over the ends."""
    model, (batch, _) = built(name, "eager"), collated()
    positions = {"position_ids": batch["position_ids"]} if name == "gpt-oss" else {}
    with pytest.raises(error, match=message), Meter(model).observe(cu_seqlens=batch["cu_seq_lens_q"]):
        model(input_ids=batch["input_ids"], **positions, use_cache=False).logits.square().sum().backward()


class Sinks(nn.Module):
    """Attention with a learned logit that takes part in every softmax, given to the rows as GPT-OSS does."""

    def __init__(self):
        super().__init__()
        self.qkv, self.sinks, self.head = nn.Linear(3, 12), nn.Parameter(torch.randn(2)), nn.Linear(4, 2)

    def forward(self, x, document):
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = (q @ k.mT).masked_fill(document[:, None] != document, -torch.inf)
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        return self.head((weights @ v).transpose(1, 2).flatten(2))


def test_parameters_that_are_given_to_every_packed_row():
    torch.manual_seed(0)
    model, document = Sinks().double(), torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    x = torch.randn(1, sum(LENGTHS), 3, dtype=torch.float64)

    def loss(b):
        return model(x[:, document == b], document[document == b]).square().sum()

    gradients = oracle.gradients_of(model, [functools.partial(loss, b) for b in range(4)])
    meter = Meter(model)
    for _ in range(2):
        with meter.observe(example_ids=document):
            model(x, document).square().sum().backward()
        assert oracle.relative(meter.stats.example_norm, oracle.group_norms(gradients, torch.arange(4), 4)) < EXACT


def test_the_checker():
    model, (batch, _) = built("qwen3", "sdpa"), collated()
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}

    def loss(outputs):
        return outputs.logits.square().sum()

    kwargs = {**inputs, "use_cache": False}
    assert check(model, loss, kwargs=kwargs, cu_seqlens=batch["cu_seq_lens_q"]).differing == []


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[0, 1], [0, 1]], r"must be \[N\] or \[1, N\], got \[2, 2\]"),
        ([1, 2, 0], r"must count up from 0 in every example, got \[1, 2, 0\]"),
        ([0, 1, 3, 0], r"must count up from 0"),
        ([], r"must count up from 0"),
    ],
)
def test_positions_that_say_nothing_are_refused(positions, message):
    with pytest.raises(ValueError, match="cu_seqlens: position_ids " + message):
        cu_seqlens(torch.tensor(positions))
