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
    curve_rule,
    divide,
    in_place,
    multiply,
    negative,
    prelu,
    subtract,
    subtract_from,
    where,
)
from gradnorm_ext.layers.embeddings import embedding
from gradnorm_ext.layers.linears import addmm, bilinear, linear, linear_module, matmul
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
    **dict.fromkeys((torch.matmul, torch.mm, _T.matmul, _T.mm, _T.__matmul__), matmul),
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
    **dict.fromkeys((torch.where, _T.where), where),
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
