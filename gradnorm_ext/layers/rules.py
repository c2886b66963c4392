"""Which torch functions may consume a parameter, and the rule of each, which hands on its gradient as a term.

A rule is called in place of the function, with at least one `Tap` among its arguments. It returns what the function
returns, or NotImplemented where it does not know the call. To support another function: write its autograd.Function,
whose backward hands `Observation.deliver` a `GradientTerm`, in the file of its family, and list the rule here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradnorm_ext.layers.attention import multi_head_attention_forward, scaled_dot_product_attention
from gradnorm_ext.layers.bags import embedding_bag
from gradnorm_ext.layers.convolutions import convolution, transposed_convolution
from gradnorm_ext.layers.elementwise import (
    CURVES,
    add,
    copy_,
    curve_rule,
    divide,
    fill_,
    in_place,
    masked_fill,
    multiply,
    negative,
    prelu,
    set_item,
    subtract,
    subtract_from,
    where,
    where_method,
)
from gradnorm_ext.layers.embeddings import embedding
from gradnorm_ext.layers.linears import addmm, bilinear, linear, linear_module, matmul, mm
from gradnorm_ext.layers.normalizations import (
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    layer_norm_module,
    rms_norm,
)
from gradnorm_ext.layers.taps import Tap
from gradnorm_ext.layers.views import SLICES, VIEWS, expand, repeat, slices_rule, view_rule

_T = Tensor
_RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: linear,
    torch.addmm: addmm,
    **dict.fromkeys((torch.matmul, _T.matmul, _T.__matmul__), matmul),
    **dict.fromkeys((torch.mm, _T.mm), mm),
    **{function: convolution(n) for n, function in enumerate((F.conv1d, F.conv2d, F.conv3d), 1)},
    **{
        function: transposed_convolution(n)
        for n, function in enumerate((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), 1)
    },
    F.multi_head_attention_forward: multi_head_attention_forward,
    F.bilinear: bilinear,
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.batch_norm: batch_norm,
    **dict.fromkeys((F.rms_norm, torch.rms_norm), rms_norm),  # the second in graphs
    **dict.fromkeys((torch.mul, _T.mul, _T.__mul__, _T.__rmul__, torch.multiply), multiply),
    **dict.fromkeys((_T.mul_, _T.__imul__), in_place(multiply)),
    **dict.fromkeys((torch.add, _T.add, _T.__add__, _T.__radd__), add),
    **dict.fromkeys((_T.add_, _T.__iadd__), in_place(add)),
    **dict.fromkeys((torch.sub, _T.sub, _T.__sub__, torch.subtract), subtract),
    **dict.fromkeys((_T.sub_, _T.__isub__), in_place(subtract)),
    **dict.fromkeys((_T.__rsub__, torch.rsub), subtract_from),
    **dict.fromkeys((torch.neg, _T.neg, _T.__neg__, torch.negative), negative),
    **dict.fromkeys((torch.div, _T.div, _T.__truediv__, torch.true_divide), divide),
    **dict.fromkeys((_T.div_, _T.__itruediv__), in_place(divide)),
    F.prelu: prelu,
    torch.where: where,
    _T.where: where_method,
    **dict.fromkeys((torch.masked_fill, _T.masked_fill), masked_fill),
    _T.masked_fill_: in_place(masked_fill),
    _T.copy_: copy_,
    _T.fill_: fill_,
    _T.__setitem__: set_item,
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    **{function: curve_rule(function) for function in CURVES},
    _T.expand: expand,
    _T.repeat: repeat,
    **{function: view_rule(function, name) for name, functions in VIEWS.items() for function in functions},
    **{function: slices_rule(function) for function in SLICES},
    _T.__iter__: lambda tap: iter(slices_rule(torch.unbind)(tap)),
}
Tap.rules.update(_RULES)
Tap.modules.update({nn.Linear.forward: linear_module, nn.LayerNorm.forward: layer_norm_module})
