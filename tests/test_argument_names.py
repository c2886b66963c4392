"""Every function that has a rule, called as torch's own signature allows: each argument by its place or by its name."""

import functools

import pytest
import right_or_refused
import torch
from torch import Tensor, nn

from gradnorm_ext.layers.taps import Tap

B = 5
w, x = "parameter", "activation"  # an argument of this kind, with its sizes


def both(function, first=(B, 4), second=(4,), **more):
    """A function of two tensors, either of which is the parameter."""
    return [
        (function, {"input": (x, first), "other": (w, second), **more}),
        (function, {"input": (w, second), "other": (x, first), **more}),
    ]


def of_one(*functions, shape=(4, 4), name="input", **more):
    return [(function, {name: (w, shape), **more}) for function in functions]


F, T = nn.functional, Tensor
IDS, MASK = torch.arange(2 * B).view(B, 2) % 4, torch.arange(4 * B).view(B, 4) % 3 == 0
OFFSETS = torch.arange(B) * 2
CALLS = [
    (F.linear, {"input": (x, (B, 4)), "weight": (w, (3, 4)), "bias": (w, (3,))}),
    (torch.addmm, {"input": (w, (3,)), "mat1": (x, (B, 4)), "mat2": (w, (4, 3))}),
    (torch.addmm, {"input": (w, (3,)), "mat1": (x, (B, 4)), "mat2": (w, (4, 3)), "beta": 2, "alpha": 3}),
    *[(f, {"input": (x, (B, 4)), "other": (w, (4, 3))}) for f in (torch.matmul, T.matmul, T.__matmul__)],
    *[(f, {"input": (w, (3, 4)), "other": (x, (B, 4, 2))}) for f in (torch.matmul, T.matmul, T.__matmul__)],
    *[(f, {"input": (x, (B, 4)), "mat2": (w, (4, 3))}) for f in (torch.mm, T.mm)],
    *[
        (
            f,
            {
                "input": (x, (B, 2, *[3] * n)),
                "weight": (w, (4, 2, *[2] * n)),
                "bias": (w, (4,)),
                "stride": 1,
                "padding": 1,
                "dilation": 1,
                "groups": 1,
            },
        )
        for n, f in enumerate((F.conv1d, F.conv2d, F.conv3d), 1)
    ],
    *[
        (
            f,
            {
                "input": (x, (B, 2, *[3] * n)),
                "weight": (w, (2, 4, *[2] * n)),
                "bias": (w, (4,)),
                "stride": 2,
                "padding": 0,
                "output_padding": 1,
                "groups": 1,
                "dilation": 2,
            },
        )
        for n, f in enumerate((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), 1)
    ],
    (
        F.multi_head_attention_forward,
        {
            **dict.fromkeys(("query", "key", "value"), (x, (3, B, 4))),
            "embed_dim_to_check": 4,
            "num_heads": 2,
            "in_proj_weight": (w, (12, 4)),
            "in_proj_bias": (w, (12,)),
            "bias_k": None,
            "bias_v": None,
            "add_zero_attn": False,
            "dropout_p": 0.0,
            "out_proj_weight": (w, (4, 4)),
            "out_proj_bias": (w, (4,)),
        },
    ),
    (F.bilinear, {"input1": (x, (B, 4)), "input2": (x, (B, 2)), "weight": (w, (3, 4, 2)), "bias": (w, (3,))}),
    (
        F.embedding,
        {
            "input": IDS,
            "weight": (w, (4, 3)),
            "padding_idx": 1,
            "max_norm": None,
            "norm_type": 2.0,
            "scale_grad_by_freq": False,
            "sparse": False,
        },
    ),
    (
        F.embedding_bag,
        {
            "input": IDS.flatten(),
            "weight": (w, (4, 3)),
            "offsets": OFFSETS,
            "max_norm": None,
            "norm_type": 2,
            "scale_grad_by_freq": False,
            "mode": "sum",
            "sparse": False,
            "per_sample_weights": None,
            "include_last_offset": False,
            "padding_idx": 0,
        },
    ),
    (
        F.layer_norm,
        {"input": (x, (B, 4)), "normalized_shape": (4,), "weight": (w, (4,)), "bias": (w, (4,)), "eps": 1e-3},
    ),
    (F.group_norm, {"input": (x, (B, 4, 3)), "num_groups": 2, "weight": (w, (4,)), "bias": (w, (4,)), "eps": 1e-3}),
    (
        F.instance_norm,
        {
            "input": (x, (B, 4, 3)),
            "running_mean": None,
            "running_var": None,
            "weight": (w, (4,)),
            "bias": (w, (4,)),
            "use_input_stats": True,
            "momentum": 0.1,
            "eps": 1e-3,
        },
    ),
    (
        F.batch_norm,
        {
            "input": (x, (B, 4)),
            "running_mean": torch.ones(4),
            "running_var": torch.ones(4),
            "weight": (w, (4,)),
            "bias": (w, (4,)),
            "training": False,
            "momentum": 0.1,
            "eps": 1e-3,
        },
    ),
    *[
        (f, {"input": (x, (B, 4)), "normalized_shape": (4,), "weight": (w, (4,)), "eps": 1e-3})
        for f in (F.rms_norm, torch.rms_norm)
    ],
    *[call for f in (torch.mul, T.mul, torch.multiply, T.__mul__, T.__rmul__, T.__rsub__) for call in both(f)],
    *[call for f in (torch.add, T.add, torch.sub, T.sub, torch.subtract, torch.rsub) for call in both(f, alpha=2)],
    *[call for f in (T.__add__, T.__radd__, T.__sub__, T.__truediv__) for call in both(f)],
    *[call for f in (torch.div, T.div) for call in both(f, rounding_mode=None)],
    *both(torch.div, rounding_mode="floor"),
    *both(torch.true_divide),
    *[both(f)[0] for f in (T.mul_, T.__imul__, T.div_, T.__itruediv__, T.__iadd__, T.__isub__, T.copy_)],
    *[both(f, alpha=2)[0] for f in (T.add_, T.sub_)],
    (F.prelu, {"input": (x, (B, 4)), "weight": (w, (4,))}),
    (torch.where, {"condition": MASK, "input": (x, (B, 4)), "other": (w, (4,))}),
    (torch.where, {"condition": MASK, "input": (w, (4,)), "other": (x, (B, 4))}),
    (T.where, {"input": (x, (B, 4)), "condition": MASK, "other": (w, (4,))}),
    (T.where, {"input": (w, (4,)), "condition": MASK, "other": (x, (B, 4))}),
    *[
        (f, {"input": (x, (B, 4)), "mask": MASK, "value": (w, ())})
        for f in (torch.masked_fill, T.masked_fill, T.masked_fill_)
    ],
    (T.fill_, {"input": (x, (B, 4)), "value": (w, ())}),
    (lambda x, i, v: T.__setitem__(x, i, v) or x, {"input": (x, (B, 4)), "key": MASK, "value": (w, ())}),
    (
        F.scaled_dot_product_attention,
        {
            **dict.fromkeys(("query", "key", "value"), (x, (B, 2, 3, 4))),
            "attn_mask": (w, (3, 3)),
            "dropout_p": 0.0,
            "is_causal": False,
            "scale": 0.5,
            "enable_gqa": False,
        },
    ),
    *of_one(torch.neg, T.neg, T.__neg__, torch.negative),
    *of_one(torch.exp, T.exp, torch.log, T.log, torch.sqrt, T.sqrt, torch.rsqrt, T.rsqrt, torch.square, T.square),
    *of_one(torch.sigmoid, T.sigmoid, torch.tanh, T.tanh, torch.relu, T.relu, torch.reciprocal, T.reciprocal),
    *of_one(torch.abs, T.abs),
    *of_one(F.softplus, beta=2, threshold=10),
    *of_one(F.silu, F.relu, inplace=False),
    *of_one(torch.pow, T.pow, T.__pow__, exponent=3),
    *of_one(torch.clamp, T.clamp, min=0.1, max=0.7),
    *of_one(T.expand, shape=(1, 4), size=(B, 4)),
    *of_one(T.repeat, shape=(1, 4), repeats=(B, 1)),
    *of_one(T.t, torch.t),
    *of_one(T.transpose, torch.transpose, dim0=0, dim1=1),
    *of_one(T.permute, torch.permute, dims=(1, 0)),
    *of_one(T.movedim, torch.movedim, source=0, destination=1),
    *of_one(T.view, size=(2, 8)),
    *of_one(T.reshape, torch.reshape, shape=(4, 4), **{"shape_": (2, 8)}),
    *of_one(T.flatten, torch.flatten, start_dim=0, end_dim=1),
    *of_one(T.unflatten, dim=0, sizes=(2, 2)),
    *of_one(T.view_as, T.reshape_as, other=torch.ones(2, 8)),
    *of_one(T.unsqueeze, torch.unsqueeze, dim=1),
    *of_one(T.squeeze, torch.squeeze, shape=(4, 1), dim=1),
    *of_one(T.__getitem__, key=2),
    *of_one(T.narrow, torch.narrow, dim=0, start=1, length=2),
    *of_one(T.select, torch.select, dim=0, index=1),
    *of_one(T.to, dtype=torch.float64, copy=True),
    *of_one(T.float, T.double, T.half, T.bfloat16, T.contiguous, memory_format=torch.contiguous_format),
    *of_one(T.clone, torch.clone, memory_format=torch.contiguous_format),
    *of_one(T.type, dtype=torch.float64),
    *of_one(T.cpu, memory_format=torch.preserve_format),
    *of_one(T.type_as, other=torch.ones(1, dtype=torch.float64)),
    *of_one(T.requires_grad_, requires_grad=True),
    *of_one(T.split, split_size=2, dim=1),
    *of_one(torch.split, name="tensor", split_size_or_sections=2, dim=1),
    *of_one(T.chunk, torch.chunk, chunks=2, dim=1),
    *of_one(T.unbind, torch.unbind, dim=1),
    *of_one(T.tensor_split, indices=(1, 3), dim=1),
    *of_one(torch.tensor_split, sections=2, dim=1),
    *of_one(T.split_with_sizes, torch.split_with_sizes, split_sizes=(1, 3), dim=1),
    *of_one(T.__iter__),
]
NARROW = {T.float: torch.float32, T.half: torch.float16, T.bfloat16: torch.bfloat16}
NO_NAMES = {T.T.__get__, T.mT.__get__, T.cuda, T.__setitem__}  # called as attributes; on a GPU; above


def test_every_function_that_has_a_rule_is_among_them():
    assert set(Tap.rules) - {function for function, _ in CALLS} <= NO_NAMES


class Calls(nn.Module):
    """One call, and what makes a loss per example of its result."""

    def __init__(self, function, arguments, positional):
        super().__init__()
        self.function, self.arguments, self.positional = function, arguments, positional
        sizes = [one[1] for one in arguments.values() if isinstance(one, tuple) and one[:1] == (w,)]
        self.parameters_ = nn.ParameterList(torch.rand(size, dtype=torch.float64) + 0.5 for size in sizes)
        self.first = nn.Linear(6, 54).double()
        self.last = nn.Linear(1, 2).double()

    def forward(self, data):
        h, given = self.first(data).sin(), []
        own = iter([self.parameters_[i] for i in range(len(self.parameters_))])
        for one in self.arguments.values():
            if isinstance(one, tuple) and one[:1] == (w,):
                one = next(own)
            elif isinstance(one, tuple) and one[:1] == (x,):
                size = [n for n in one[1] if n != B]
                one = h[:, : torch.Size(size).numel()].reshape(-1, *size).movedim(0, one[1].index(B)) * 1
            elif isinstance(one, Tensor) and one.is_floating_point():
                one = one.double()
            given.append(one)
        named = dict(list(zip(self.arguments, given, strict=True))[self.positional :])
        result = self.function(*given[: self.positional], **{name.rstrip("_"): value for name, value in named.items()})
        if not isinstance(result, Tensor):
            result = next(iter(result))
        if result.shape[:1] == (B,):
            of_example = result.flatten(1)
        elif result.shape[1:2] == (B,):
            of_example = result.transpose(0, 1).flatten(1)
        else:
            of_example = h[:, :2] * result.double().reshape(-1)[:2]
        return self.last(of_example.double()[:, :, None].tanh()).flatten(1).sum(1)


def names(call):
    function, arguments = call
    tensors = "".join(one[0][0] if isinstance(one, tuple) and one[0] in (w, x) else "." for one in arguments.values())
    kind = "Tensor." if "method" in type(function).__name__ or "wrapper" in type(function).__name__ else ""
    return f"{kind}{getattr(function, '__name__', '')}-{tensors}"


@pytest.mark.parametrize("on", ["error", "vmap"])
@pytest.mark.parametrize("call", CALLS, ids=names)
def test_each_argument_by_its_place_or_by_its_name(call, on):
    function, arguments = call
    ran = 0
    for positional in range(len(arguments) + 1):
        model, data = Calls(function, arguments, positional), torch.randn(B, 6, dtype=torch.float64)
        try:
            model(data)
        except TypeError:
            continue  # not so in torch either
        ran += 1
        refused = right_or_refused.refusal_of(
            model, functools.partial(model, data), on=on, blocks=1, narrow=NARROW.get(function, torch.float64)
        )
        assert refused is None or "no rule for" in refused or "rows" in refused, refused
    assert ran > 0


@pytest.mark.parametrize("on", ["error", "vmap"])
@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("layer", ["embedding", "shared", "tied", "bag", "bag of offsets"])
def test_ids_may_be_of_any_integer_type(layer, dtype, backend, on):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.last = nn.Parameter(torch.randn(9, 4)), nn.Linear(4, 2)

        def forward(self, ids):
            if layer == "bag":
                h = F.embedding_bag(ids, self.table, padding_idx=0)
            elif layer == "bag of offsets":
                h = F.embedding_bag(ids.flatten(), self.table, torch.arange(B, dtype=dtype) * 3, mode="sum")
            else:
                h = F.embedding(ids, self.table, padding_idx=0).sum(1)
            if layer == "shared":
                h = h[:, None] + F.embedding(torch.arange(2, dtype=dtype), self.table)
            return F.linear(h, self.table) if layer == "tied" else self.last(h)

    model, ids = Model().double(), torch.randint(0, 9, (B, 3), dtype=dtype)
    refused = right_or_refused.refusal_of(
        model, lambda: model(ids).square().flatten(1).sum(1), on=on, blocks=2, backend=backend
    )
    assert refused is None
