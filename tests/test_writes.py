"""A parameter that is written into an activation: by a rule, differentiated by itself, or refused with the function's name."""

import re

import pytest
import right_or_refused
import torch
from torch import nn

from gradnorm_ext import Meter

B, T, D = 4, 3, 5


def setting(index):
    def write(h, p, mask):
        h[index(mask)] = p

    return write


def masked_scatter(h, p, mask):
    h.masked_scatter_(mask[..., None].expand_as(h), p.expand(B * T, D))


BY_A_RULE = {
    "h[mask] = p": setting(lambda mask: mask),
    "h[mask] = p[0]": lambda h, p, mask: h.__setitem__(mask, p[0]),
    "h[:, 0] = p": setting(lambda mask: (slice(None), 0)),
    "h[:, -1:] = p": setting(lambda mask: (slice(None), slice(-1, None))),
    "h[..., 1] = p[1]": lambda h, p, mask: h.__setitem__((..., 1), p[1]),
    "h[:, tensor] = p": lambda h, p, mask: h.__setitem__((slice(None), torch.tensor(1)), p),
    "copy_": lambda h, p, mask: h[:, 1].copy_(p),
    "copy_(other=)": lambda h, p, mask: h[:, 1].copy_(other=p),
    "fill_": lambda h, p, mask: h[:, 1].fill_(p[2]),
    "masked_fill_": lambda h, p, mask: h.masked_fill_(mask[..., None], p[2]),
    "masked_fill": lambda h, p, mask: h.copy_(h.masked_fill(mask[..., None], p[2])),
    "masked_fill(value=)": lambda h, p, mask: h.copy_(torch.masked_fill(h, mask=mask[..., None], value=p[2])),
    "add_(alpha=2)": lambda h, p, mask: h.add_(p, alpha=2),
    "add_(other=)": lambda h, p, mask: h.add_(other=p),
    "sub_(alpha=2)": lambda h, p, mask: h.sub_(p, alpha=2),
    "mul_": lambda h, p, mask: h.mul_(p),
    "div_": lambda h, p, mask: h.div_(p),
    "+=": lambda h, p, mask: h.__iadd__(p),
    "h[:, 0] += p": lambda h, p, mask: h[:, 0].add_(p),
    "where": lambda h, p, mask: h.copy_(torch.where(mask[..., None], p, h)),
    "h.where": lambda h, p, mask: h.copy_(h.where(mask[..., None], p)),
    "where of a number": lambda h, p, mask: h.add_(torch.where(mask[..., None], p, 0.0)),
    "where(input=)": lambda h, p, mask: h.copy_(torch.where(condition=mask[..., None], input=h, other=p)),
}
OTHERS = {
    "h[rows, columns] = p": lambda h, p, mask: h.__setitem__((torch.arange(B), torch.arange(B) % T), p),
    "h[list] = p": lambda h, p, mask: h.__setitem__((slice(None), [0, 2]), p),
    "index_put_": lambda h, p, mask: h.index_put_((mask,), p),
    "index_put_(accumulate=True)": lambda h, p, mask: h.index_put_((mask,), p, accumulate=True),
    "masked_scatter_": masked_scatter,
    "lerp_": lambda h, p, mask: h.lerp_(p, 0.3),
    "lerp_(weight=p)": lambda h, p, mask: h.lerp_(h.detach().cos(), p),
    "clamp_(min=p)": lambda h, p, mask: h.clamp_(min=p),
    "clamp_max_": lambda h, p, mask: h.clamp_max_(p),
    "addcmul_": lambda h, p, mask: h.addcmul_(p, h.detach().cos()),
    "addcdiv_": lambda h, p, mask: h.addcdiv_(h.detach().cos(), p),
    "index_add_": lambda h, p, mask: h.index_add_(1, torch.tensor([0]), p.expand(B, 1, D)),
    "index_copy_": lambda h, p, mask: h.index_copy_(1, torch.tensor([0]), p.expand(B, 1, D).contiguous()),
    "index_fill_": lambda h, p, mask: h.index_fill_(1, torch.tensor([0]), p[0]),
    "scatter_": lambda h, p, mask: h.scatter_(1, torch.zeros(B, 1, D, dtype=torch.long), p.expand(B, 1, D)),
    "scatter_add_": lambda h, p, mask: h.scatter_add_(1, torch.zeros(B, 1, D, dtype=torch.long), p.expand(B, 1, D)),
    "pow_": lambda h, p, mask: h.exp_().pow_(p),
    "baddbmm_": lambda h, p, mask: h.baddbmm_(h.detach().cos(), torch.diag(p).expand(B, D, D)),
    "atan2_": lambda h, p, mask: h.atan2_(p),
    "copysign_": lambda h, p, mask: h.copysign_(p),
    "remainder_": lambda h, p, mask: h.remainder_(p),
    "maximum by out=": lambda h, p, mask: torch.maximum(h, p, out=torch.empty(B, T, D, dtype=h.dtype)),
    "where by out=": lambda h, p, mask: torch.where(mask[..., None], h, p, out=torch.empty(B, T, D, dtype=h.dtype)),
    "_foreach_add_": lambda h, p, mask: torch._foreach_add_([h], [p]),
    "slice_scatter": lambda h, p, mask: h.copy_(h.slice_scatter(p.expand(B, 1, D), 1, 0, 1)),
    "select_scatter": lambda h, p, mask: h.copy_(h.select_scatter(p.expand(B, D), 1, 0)),
    "scatter": lambda h, p, mask: h.copy_(h.scatter(1, torch.zeros(B, 1, D, dtype=torch.long), p.expand(B, 1, D))),
    "a parameter's own view": lambda h, p, mask: p[:2].mul_(2),
    "a parameter's own double": lambda h, p, mask: h.add_((p * 2).add_(1)),
    "into new zeros": lambda h, p, mask: h.add_(
        torch.zeros_like(h).index_copy_(1, torch.tensor([0]), p.expand(B, 1, D) * 1)
    ),
}


class Written(nn.Module):
    def __init__(self, write, last):
        super().__init__()
        self.first, self.p = nn.Linear(D, D), nn.Parameter(torch.rand(D) + 0.5)
        self.last = nn.Linear(D, D) if last else nn.Identity()
        self.write, self.writes = write, True

    def forward(self, x, mask):
        h = self.first(x).sin()
        if self.writes:
            self.write(h, self.p, mask)
        return self.last(h.tanh() * self.p).cos()


def outcome(write, mode, on, last=True, first=True, dtype=torch.float64):
    model, x = Written(write, last).to(dtype), torch.randn(B, T, D, dtype=dtype)
    mask = torch.tensor([[True, False, False], [False, False, False], [True, True, False], [False, False, True]])

    def losses():
        return model(x, mask).square().flatten(1).sum(1)

    if not first:
        model.writes = False
        assert right_or_refused.refusal_of(model, losses, mode, on) is None
        model.writes = True
    try:
        losses().sum().backward()
    except RuntimeError as error:
        plain = str(error)
        with pytest.raises(AssertionError, match="a foreign error"):
            try:
                right_or_refused.refusal_of(model, losses, mode, on)
            except RuntimeError as same:
                raise AssertionError(f"a foreign error: {same}") from None
        return plain
    return right_or_refused.refusal_of(model, losses, mode, on)


@pytest.mark.parametrize("on", ["error", "vmap"])
@pytest.mark.parametrize("mode", right_or_refused.MODES)
@pytest.mark.parametrize("write", BY_A_RULE.values(), ids=BY_A_RULE)
def test_writes_that_a_rule_knows_are_measured(write, mode, on):
    assert outcome(write, mode, on) is None


@pytest.mark.parametrize("on", ["error", "vmap"])
@pytest.mark.parametrize("mode", ["Meter", "same_step"])
@pytest.mark.parametrize("name", OTHERS)
def test_others_are_differentiated_or_refused_by_name(name, mode, on):
    refused = outcome(OTHERS[name], mode, on)
    if refused is not None and refused.startswith(("Meter", "Reweighted")):
        assert re.search(r"no rule for \w+( \(in place\))? of p .*called at .*test_writes.py", refused), refused


@pytest.mark.parametrize("on", ["error", "vmap"])
@pytest.mark.parametrize("write", [*BY_A_RULE.values(), *OTHERS.values()], ids=[*BY_A_RULE, *OTHERS])
def test_also_where_nothing_trained_follows(write, on):
    outcome(write, "Meter", on, last=False)


@pytest.mark.parametrize("write", [*BY_A_RULE.values(), *OTHERS.values()], ids=[*BY_A_RULE, *OTHERS])
def test_also_where_it_begins_in_a_later_block(write):
    model, x = Written(write, True).double(), torch.randn(B, T, D, dtype=torch.float64)
    mask = torch.rand(B, T) < 0.5

    def losses():
        return model(x, mask).square().flatten(1).sum(1)

    try:
        losses().sum().backward()
    except RuntimeError:
        pytest.skip("plain torch refuses it")
    truth = right_or_refused.contributions(model, losses)
    meter = Meter(model)
    for block in range(4):
        model.writes = block > 1
        try:
            with meter.observe():
                losses().sum().backward()
        except (RuntimeError, ValueError) as error:
            assert block > 1 and str(error).startswith("Meter: "), error
            return
    norms = torch.stack([torch.cat([g.flatten() for g in one]).norm() for one in truth])
    torch.testing.assert_close(meter.stats.example_norm, norms)
