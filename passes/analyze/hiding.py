"""May a tensor that is added to scores hide keys, by numbers so low that their weights are 0?

A mask with a finite fill can be left to a kernel only if nothing else hides keys: of a row whose
seen keys are all hidden by -inf or by a number below the fill, the author's softmax weighs those at
the fill, a kernel none. What a user's input or a constant says may be such a mask; what a model
computes may be too, where a fill (`masked_fill(~chosen, -inf)`), a logarithm, a parameter that
holds a mask or an input by itself takes part. Products and normalisers end the search: their
results are of the size of scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx

from attnopt.passes.analyze.lift_contractions import CONTRACTIONS
from attnopt.passes.normalize import op_name
from attnopt.passes.recognize.program import SOFTMAX

#: numbers from which on a weight may vanish beside others, and in half precision
LARGE, LARGE_HALF = 1e8, 3e4
_BOUNDED = frozenset(CONTRACTIONS) | SOFTMAX | {
    "linear", "addmm", "baddbmm", "addbmm", "conv1d", "conv2d", "conv3d", "convolution",
    "scaled_dot_product_attention", "layer_norm", "native_layer_norm", "rms_norm", "batch_norm",
    "group_norm", "sigmoid", "tanh", "sin", "cos", "exp", "logsigmoid", "log_sigmoid"}
_LOGARITHMS = frozenset(("log", "log2", "log10", "logit", "xlogy", "special_logit"))
_FILLS = frozenset(("where", "masked_fill", "full", "full_like", "new_full", "fill", "scatter",
                    "index_fill", "index_put", "constant_pad_nd", "pad", "masked_scatter"))


def may_hide(node: fx.Node, kind_of: Mapping[str, str],
             value_of: Callable[[str], Tensor | None]) -> bool:
    """Whether numbers that hide keys may be among those of `node`.

    kind_of, value_of: of placeholders, their kinds and their tensors if these are at hand
    """
    val = node.meta.get("val")
    large = LARGE_HALF if isinstance(val, Tensor) and val.dtype == torch.float16 else LARGE
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        n = stack.pop()
        val = n.meta.get("val")
        if n in seen or not isinstance(val, Tensor) or val.dtype == torch.bool:
            continue
        seen.add(n)
        if n.op == "placeholder":
            if kind_of.get(n.name) == "input":
                if val.is_floating_point():
                    return True
            elif _holds_low(value_of(n.name), large):
                return True
            continue
        name = op_name(n) if n.op == "call_function" else ""
        if name in _LOGARITHMS or _fills(n, name, large):
            return True
        if name not in _BOUNDED:
            stack.extend(n.all_input_nodes)
    return False


def _holds_low(value: Tensor | None, large: float) -> bool:
    if value is None or value.is_meta or isinstance(value, torch._subclasses.FakeTensor) \
            or not value.is_floating_point() or not value.numel():
        return False
    return bool((value.detach().abs() >= large).any())


def _fills(node: fx.Node, name: str, large: float) -> bool:
    """Does an operation bring in a number of that size?"""
    target = node.target
    counts = name in _FILLS or isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in target.tags and not name.startswith("clamp"))
    return counts and any(isinstance(x, int | float) and abs(x) >= large
                          for x in (*node.args, *node.kwargs.values()))
